"""Two conflicting rewards on the demo's task: GDPO against GRPO on their sum, for several scales and weights, on a CPU.

    python scripts/demo_two_rewards.py [--seeds 0 1 2] [--updates 60] [--folder runs/demo-two-rewards]

`truth` is 1 for an answer that is right in tone, fact and form, else 0; `brevity` is -words / unit, with a weight. The
policy is the SFT model of the demo of the same seed. One line of JSON for each model: its answers to the held-out
questions of the demo, sampled at temperature 1 (`truth`, `words`), and for each seed the fewest words of right answers.
Runs that are finished are not repeated.
"""

import argparse
import json
import statistics
from pathlib import Path
from typing import Literal, NamedTuple

from jaxrlhf import GRPOTrainer, config
from jaxrlhf.demo import pipeline, task
from jaxrlhf.evaluation.completions import evaluate
from jaxrlhf.training.sft import SFTTrainer


def brevity(completions: list[str], unit: float) -> list[float]:
    """Minus the number of words, in units of `unit` words."""
    return [-len(text.split()) / unit for text in completions]


class Case(NamedTuple):
    """A method, and the unit and the weight of `brevity`; the weight of `truth` is 1."""

    method: Literal["grpo", "gdpo"]
    unit: float
    weight: float


CASES = (
    *(Case("grpo", unit, 1) for unit in (1, 10, 100)),
    *(Case("gdpo", 1, weight) for weight in (1, 0.3, 0.1)),
    Case("gdpo", 100, 0.3),
)


def train(case: Case, seed: int, updates: int, folder: Path) -> str:
    """The run directory of a finished run."""
    sft, _, ppo = pipeline.configs(folder, seed)
    run = folder / "{}-{:g}-{:g}".format(*case)
    components = (
        config.Component(name="truth", function="jaxrlhf.demo.task:truth"),
        config.Component(
            name="brevity", function=f"{__file__}:brevity", options={"unit": case.unit}, weight=case.weight
        ),
    )
    settings = config.GRPOConfig(
        run_dir=str(run),
        seed=seed,
        model=config.ModelSource(path=sft.run_dir),
        data=ppo.data,
        reward=config.RewardSource(components=components),
        sampling=ppo.sampling,
        optim=ppo.optim,
        logging=config.Logging(quiet=True, tensorboard=False, sample_every=0, report=False),
        checkpoint=config.Checkpoint(save_every=0),
        grpo=config.GRPO(method=case.method, batch_size=128, total_episodes=128 * updates, num_generations=8),
    )
    GRPOTrainer(settings).train()
    return str(run)


def measure(model: str, seed: int, folder: Path) -> dict[str, float]:
    """Means over the sampled answers to the held-out questions."""
    ppo = pipeline.configs(folder, seed)[2]
    changes = {
        "model.path": model, "data.path": str(folder / "data" / "held_out.jsonl"), "critic.init": "policy",
        "reward": config.RewardSource(), "rollout.slots": pipeline.HELD_OUT,
    }  # fmt: skip
    result = evaluate(
        config.replace(ppo, **changes), num_prompts=pipeline.HELD_OUT, num_completions=4, function=task.truth
    )
    texts = [answer["text"] for prompt in result["prompts"] for answer in prompt["completions"]]
    return {"truth": result["statistics"]["mean"], "words": statistics.fmean(len(text.split()) for text in texts)}


def fewest_words(seed: int) -> float:
    """Mean over the held-out questions of the words of their shortest right answer."""

    def shortest(texts: tuple[str, ...]) -> int:
        return min(len(text.split()) for text in texts)

    found = []
    for row in task.make_prompts(pipeline.HELD_OUT, seed, held_out=True):
        level = task.RIGHT_LEVEL[row["category"]]
        statement = task.questions()[row["prompt"]][0].truth
        found.append(shortest(task.OPENINGS[level]) + len(statement.split()) + shortest(task.CLOSINGS[level]))
    return statistics.fmean(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("runs/demo-two-rewards"))
    options = parser.parse_args()
    for seed in options.seeds:
        folder = options.folder / str(seed)
        sft = pipeline.configs(folder, seed)[0]
        pipeline.write_data(folder, seed)
        SFTTrainer(sft).train()
        models = {("start",): sft.run_dir} | {case: train(case, seed, options.updates, folder) for case in CASES}
        for case, model in models.items():
            found = {name: round(value, 3) for name, value in measure(model, seed, folder).items()}
            print(json.dumps({"seed": seed, "case": case, **found}), flush=True)
        print(json.dumps({"seed": seed, "fewest words": round(fewest_words(seed), 3)}), flush=True)


if __name__ == "__main__":
    main()

"""Does PPO learn? Tasks with a known optimum, from a randomly initialised Llama of 4 layers, 128 wide, on a CPU.

    python scripts/toy_tasks.py emit | length | modular | addition | compare [--seeds 0 1 2 3 4] [--folder runs/toys]

toy_problems.py says what the tasks are and with which settings each runs. For `modular` and `addition` those are a
batch of 768 in mini-batches of 256, one epoch, actor 1e-4 and critic 1e-3 at constant rates, clip 0.2, value clip 0.5,
gamma = lambda = 1, no KL, 200 updates. The critic is a model of its own; advantages are whitened, rewards are not (the
defaults).
`compare` is `emit` with nothing that trl cannot do; it leaves its initial weights in FOLDER/compare-SEED/initial, where
toy_trl.py takes them up.

One line of JSON per seed: `chance` (exact, of uniformly random symbols), `untrained` (the mean reward of the first
update's batch, which the untrained model drew), `curve` (mean reward of each ten updates), `final` (its last entry),
`passed`, `seconds`. The status is 1 unless all passed: twice chance and 0.2, of `emit` and `length` 0.9.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from toy_problems import SETTINGS, TASKS, Settings, write_model

from jaxrlhf import PPOTrainer, metrics
from jaxrlhf import config as c

ROWS = 64  # of a forward pass: a matter of speed


def config(settings: Settings, run: Path, seed: int) -> c.PPOConfig:
    """The config of one run, with its model and prompts in `run`/model."""
    task = TASKS[settings.task]
    folder = write_model(run / "model", settings)
    return c.PPOConfig(
        run_dir=str(run / "run"),
        seed=seed,
        model=c.ModelSource(path=str(folder), init="random"),
        data=c.Data(path=str(folder / "prompts.jsonl")),
        critic=c.Critic(learning_rate=settings.critic_learning_rate),
        ppo=c.PPO(
            total_episodes=settings.updates * settings.batch_size,
            batch_size=settings.batch_size,
            num_ppo_epochs=settings.num_ppo_epochs,
            num_mini_batches=settings.num_mini_batches,
            micro_batch_size=ROWS,
            kl_coef=0.0,
            gamma=1.0,
            lam=1.0,
            cliprange=settings.cliprange,
            cliprange_value=settings.cliprange_value,
            vf_coef=settings.vf_coef,
        ),
        scores=c.Scores(missing_eos_penalty=task.missing_eos_penalty),
        sampling=c.Sampling(response_length=task.length, temperature=1.0),
        optim=c.Optim(
            learning_rate=settings.learning_rate,
            schedule="constant",
            eps=settings.adam_eps,
            max_grad_norm=settings.max_grad_norm,
        ),
        logging=c.Logging(quiet=True, tensorboard=False, sample_every=20),
        checkpoint=c.Checkpoint(save_every=0),
    )


def learn(name: str, settings: Settings, run: Path, seed: int) -> dict[str, Any]:
    """One run from scratch, and what the docstring of this file says of it."""
    task = TASKS[settings.task]
    started = time.monotonic()
    trainer = PPOTrainer(config(settings, run, seed), reward=task.reward, fresh=True)
    if name == "compare":
        trainer.save_pretrained(run / "initial")
    trainer.train()
    scores = [record["objective/scores"] for record in metrics.read(run / "run" / "metrics.jsonl")]
    curve = [sum(part) / len(part) for i in range(0, len(scores), 10) if (part := scores[i : i + 10])]
    return {
        "task": name,
        "seed": seed,
        "chance": task.chance(),
        "untrained": scores[0],
        "final": curve[-1],
        "passed": curve[-1] > max(settings.wanted, 2 * task.chance()),
        "seconds": time.monotonic() - started,
        "curve": [round(value, 4) for value in curve],
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=SETTINGS)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--folder", type=Path, help="where runs are kept; without it they are not")
    arguments = parser.parse_args()
    passed = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for seed in arguments.seeds:
            result = learn(arguments.name, SETTINGS[arguments.name], folder / f"{arguments.name}-{seed}", seed)
            print(json.dumps(result), flush=True)
            passed = passed and result["passed"]
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

"""Run `compare` of toy_tasks.py in trl 1.8.0, from the same initial weights, with equal hyper-parameters.

    python scripts/toy_tasks.py compare --folder runs/toys > ours.jsonl       (in jaxrlhf's environment)
    python scripts/toy_trl.py --folder runs/toys > theirs.jsonl               (in one with torch and trl==1.8.0)
    python scripts/toy_trl.py --ours ours.jsonl --theirs theirs.jsonl         (in either: mean, standard error, verdict)

trl's PPOTrainer has no reward functions, so the task's own is wrapped as a reward model that reads token ids. trl has
one optimizer for policy and value model, makes one step per epoch and does not clip gradients, so both use one learning
rate, num_mini_batches 1 and no clip.
"""

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from toy_problems import EOS, PAD, SETTINGS, SYMBOLS, TASKS, VISIBLE, Task

SETTING = SETTINGS["compare"]
CONTEXT = 1  # symbols of every prompt


def text_of(ids: list[int]) -> str:
    """Decode a response up to its first <eos>."""
    ids = ids[: ids.index(EOS)] if EOS in ids else ids
    return "".join(SYMBOLS[i] for i in ids if SYMBOLS[i] in VISIBLE)


def reward_model(task: Task) -> Any:
    """A module with the interface of trl's `get_reward`, with the response's score at every position."""
    import torch  # pyright: ignore[reportMissingImports]

    class Backbone(torch.nn.Module):
        def forward(self, input_ids: Any, **_: Any) -> Any:
            rows = input_ids.tolist()
            scores = [task.score(text_of(row[:CONTEXT]), text_of(row[CONTEXT:])) for row in rows]
            hidden = torch.tensor(scores)[:, None, None].expand(*input_ids.shape, 1)
            return type("Output", (), {"hidden_states": (hidden,)})

    class Reward(torch.nn.Module):
        base_model_prefix = "backbone"

        def __init__(self) -> None:
            super().__init__()
            self.backbone, self.score = Backbone(), torch.nn.Identity()

    return Reward()


def learn(folder: Path, seed: int) -> dict[str, Any]:
    """Train one run in trl from the initial weights that toy_tasks.py wrote."""
    import datasets
    import torch  # pyright: ignore[reportMissingImports]
    import transformers
    from trl.experimental.ppo import PPOConfig, PPOTrainer  # pyright: ignore[reportMissingImports]

    task, initial = TASKS[SETTING.task], folder / f"compare-{seed}" / "initial"
    started = time.monotonic()
    torch.set_num_threads(1)  # more threads would only wait for one another: the model is tiny
    transformers.set_seed(seed)
    policy, reference = (transformers.AutoModelForCausalLM.from_pretrained(initial) for _ in range(2))
    critic = transformers.AutoModelForSequenceClassification.from_pretrained(initial, num_labels=1)
    critic.score.weight.data.zero_()  # as in jaxrlhf's critic
    prompts = [[SYMBOLS.index(symbol) for symbol in prompt] for prompt in task.prompts]
    rows = datasets.Dataset.from_dict({"input_ids": prompts * SETTING.batch_size})  # a whole number of batches
    trainer = PPOTrainer(
        args=PPOConfig(
            output_dir=str(folder / f"compare-{seed}" / "trl"),
            seed=seed,
            per_device_train_batch_size=SETTING.batch_size // SETTING.num_mini_batches,
            gradient_accumulation_steps=SETTING.num_mini_batches,
            local_rollout_forward_batch_size=SETTING.batch_size,
            total_episodes=SETTING.updates * SETTING.batch_size,
            num_ppo_epochs=SETTING.num_ppo_epochs,
            num_mini_batches=SETTING.num_mini_batches,
            learning_rate=SETTING.learning_rate,
            lr_scheduler_type="constant",
            optim="adamw_torch",
            adam_epsilon=SETTING.adam_eps,
            weight_decay=0.0,
            kl_coef=0.0,
            gamma=1.0,
            lam=1.0,
            cliprange=SETTING.cliprange,
            cliprange_value=SETTING.cliprange_value,
            vf_coef=SETTING.vf_coef,
            whiten_rewards=False,
            temperature=1.0,
            response_length=task.length,
            stop_token="eos",
            num_sample_generations=0,
            logging_steps=1,
            bf16=False,
            gradient_checkpointing=False,
            use_cpu=True,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        processing_class=transformers.AutoTokenizer.from_pretrained(initial, padding_side="left"),
        model=policy,
        ref_model=reference,
        reward_model=reward_model(task),
        value_model=critic,
        train_dataset=rows,
        eval_dataset=rows,
    )
    assert trainer.processing_class.pad_token_id == PAD
    scores: list[float] = []
    trainer.log = lambda logs: scores.append(logs["objective/scores"])
    trainer.train()
    assert len(scores) == SETTING.updates, len(scores)
    curve = [statistics.mean(scores[i : i + 10]) for i in range(0, len(scores), 10)]
    return {
        "task": "trl",
        "seed": seed,
        "untrained": scores[0],
        "final": curve[-1],
        "seconds": time.monotonic() - started,
        "curve": [round(value, 4) for value in curve],
    }


def compare(ours: Path, theirs: Path) -> bool:
    """Print mean and standard error of both final rewards; return whether jaxrlhf's is at most one standard error of
    the difference below trl's."""
    means, errors = [], []
    for name, file in (("jaxrlhf", ours), ("trl", theirs)):
        lines = file.read_text().splitlines()
        finals = [json.loads(line)["final"] for line in lines if line.startswith("{")]  # trl prints other lines
        means.append(statistics.mean(finals))
        errors.append(statistics.stdev(finals) / len(finals) ** 0.5)
        print(f"{name}: {means[-1]:.4f} +- {errors[-1]:.4f} ({len(finals)} seeds)")
    difference, error = means[0] - means[1], (errors[0] ** 2 + errors[1] ** 2) ** 0.5
    print(f"difference: {difference:+.4f} +- {error:.4f}")
    return difference >= -error


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="folder of the runs of toy_tasks.py")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--ours", type=Path)
    parser.add_argument("--theirs", type=Path)
    arguments = parser.parse_args()
    if arguments.ours and arguments.theirs:
        return 0 if compare(arguments.ours, arguments.theirs) else 1
    if not arguments.folder:
        parser.error("give --folder, or --ours and --theirs")
    for seed in arguments.seeds:
        print(json.dumps(learn(arguments.folder, seed)), flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())

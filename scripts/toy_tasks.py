"""Train on tasks with a known optimum, from a randomly initialised Llama of 4 layers of width 128, on a CPU.

    python scripts/toy_tasks.py emit | length | modular | addition | sum | compare
                                [--method ppo | grpo | dr_grpo | ...] [--seeds 0 1 2 3 4] [--folder runs/toys]

With a method of `jaxrlhf grpo`, batch, mini-batches, learning rate and updates are those of PPO; groups of 16.

toy_problems.py defines the tasks and their settings. For `modular` and `addition` these are a batch of 768 in
mini-batches of 256, one epoch, constant learning rates of 1e-4 (policy) and 1e-3 (critic), clip 0.2, value clip 0.5,
gamma = lambda = 1, no KL, 200 updates. The critic is a separate model; advantages are whitened, rewards are not (the
defaults). `compare` is `emit` restricted to what trl can do; it writes its initial weights to
FOLDER/compare-SEED/initial, where toy_trl.py reads them.

One line of JSON per seed: `chance` (exact, of uniformly random symbols), `untrained` (the mean reward of the first
update's batch, sampled from the untrained model), `curve` (mean reward of each ten updates), `final` (its last entry),
`passed`, `seconds`. The exit status is 1 unless all passed: twice chance and 0.2; for `emit` and `length`, 0.9.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from toy_problems import SETTINGS, TASKS, Settings, write_model

from jaxrlhf import GRPOTrainer, PPOTrainer, metrics
from jaxrlhf import config as c
from jaxrlhf.config.grpo_methods import RECIPES

ROWS = 64  # per forward pass; affects only speed
GROUP = 16


def shared(settings: Settings, run: Path, seed: int) -> dict[str, Any]:
    """Config sections shared by all methods, with model and prompts in `run`/model."""
    task = TASKS[settings.task]
    folder = write_model(run / "model", settings)
    return {
        "run_dir": str(run / "run"),
        "seed": seed,
        "model": c.ModelSource(path=str(folder), init="random"),
        "data": c.Data(path=str(folder / "prompts.jsonl")),
        "scores": c.Scores(missing_eos_penalty=task.missing_eos_penalty),
        "sampling": c.Sampling(response_length=task.length, temperature=1.0),
        "optim": c.Optim(
            learning_rate=settings.learning_rate,
            schedule="constant",
            eps=settings.adam_eps,
            max_grad_norm=settings.max_grad_norm,
        ),
        "logging": c.Logging(quiet=True, tensorboard=False, sample_every=20),
        "checkpoint": c.Checkpoint(save_every=0),
    }


def ppo(settings: Settings, run: Path, seed: int) -> PPOTrainer:
    """Config of PPO on a task."""
    config = c.PPOConfig(
        **shared(settings, run, seed),
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
    )
    return PPOTrainer(config, reward=TASKS[settings.task].reward, fresh=True)


def grpo(method: Any, settings: Settings, run: Path, seed: int) -> GRPOTrainer:
    """Config of a method of `jaxrlhf grpo` on a task."""
    paired = method == "online_dpo"
    steps = RECIPES[method].loss != "reinforce" and not paired
    section = c.GRPO(
        method=method,
        total_episodes=settings.updates * settings.batch_size,
        batch_size=settings.batch_size,
        num_generations=GROUP,
        num_iterations=settings.num_ppo_epochs if steps else 1,
        num_mini_batches=settings.num_mini_batches if steps else 1,
        micro_batch_size=None if paired else ROWS,
        kl_coef=None if paired else 0.0,
    )
    config = c.GRPOConfig(**shared(settings, run, seed), grpo=section)
    return GRPOTrainer(config, reward=TASKS[settings.task].reward, fresh=True)


def learn(name: str, settings: Settings, run: Path, seed: int, method: str = "ppo") -> dict[str, Any]:
    """Train one run from random weights and return its record (see the docstring of this file)."""
    task = TASKS[settings.task]
    started = time.monotonic()
    trainer = ppo(settings, run, seed) if method == "ppo" else grpo(method, settings, run, seed)
    if name == "compare":
        trainer.save_pretrained(run / "initial")
    trainer.train()
    scores = [record["objective/scores"] for record in metrics.read_records(run / "run" / "metrics.jsonl")]
    curve = [sum(part) / len(part) for i in range(0, len(scores), 10) if (part := scores[i : i + 10])]
    return {
        "task": name,
        "method": method,
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
    parser.add_argument("--method", choices=["ppo", *RECIPES], default="ppo")
    parser.add_argument("--folder", type=Path, help="folder to keep the runs in; default: not kept")
    arguments = parser.parse_args()
    passed = True
    with tempfile.TemporaryDirectory() as temporary:
        folder = arguments.folder or Path(temporary)
        for seed in arguments.seeds:
            method = "" if arguments.method == "ppo" else f"{arguments.method}-"
            run = folder / f"{arguments.name}-{method}{seed}"
            result = learn(arguments.name, SETTINGS[arguments.name], run, seed, arguments.method)
            print(json.dumps(result), flush=True)
            passed = passed and result["passed"]
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())

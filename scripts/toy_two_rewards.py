"""Two conflicting rewards of different scales: GDPO against GRPO on their sum, from random weights, on a CPU.

    python scripts/toy_two_rewards.py [--seeds 0 1 2] [--updates 60] [--folder runs/two-rewards]

A response has 8 symbols of toy_problems.py. `sevens` is 10 times the share of them that are 7s, `changes` the share of
the 7 places between them where neighbours differ. Both have weight 1. All 7s have (10, 0), a 7 in every second place
(5, 1). One line of JSON per method and seed, with the means over the last ten updates.
"""

import argparse
import itertools
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from toy_problems import Settings, write_model

from jaxrlhf import GRPOTrainer, metrics
from jaxrlhf import config as c

LENGTH = 8


def sevens(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [10 * text.count("7") / LENGTH for text in completions]


def changes(prompts: Sequence[str], completions: Sequence[str]) -> list[float]:
    return [sum(a != b for a, b in itertools.pairwise(text)) / (LENGTH - 1) for text in completions]


def train(method: Literal["grpo", "gdpo"], seed: int, updates: int, folder: Path) -> dict[str, float]:
    """Mean of both rewards over the last ten updates of a run."""
    model = write_model(folder / "model", Settings("emit", 0.9, updates, 128, 1, 1, 1e-3, 1e-3, layers=2, width=64))
    components = tuple(c.Component(name=f.__name__, function=f"{__file__}:{f.__name__}") for f in (sevens, changes))
    config = c.GRPOConfig(
        run_dir=str(folder / "run"),
        seed=seed,
        model=c.ModelSource(path=str(model), init="random"),
        data=c.Data(path=str(model / "prompts.jsonl")),
        reward=c.RewardSource(components=components),
        sampling=c.Sampling(response_length=LENGTH),
        optim=c.Optim(learning_rate=1e-3, schedule="constant", eps=1e-5),
        logging=c.Logging(quiet=True, tensorboard=False, sample_every=0, report=False),
        checkpoint=c.Checkpoint(save_every=0),
        grpo=c.GRPO(method=method, batch_size=128, total_episodes=128 * updates, num_generations=16, kl_coef=0.0),
    )
    GRPOTrainer(config, fresh=True).train()
    last = metrics.read_records(folder / "run" / "metrics.jsonl")[-10:]
    return {name: sum(record[f"rewards/{name}/mean"] for record in last) / len(last) for name in ("sevens", "changes")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--folder", type=Path, default=Path("runs/two-rewards"))
    options = parser.parse_args()
    for seed in options.seeds:
        for method in ("grpo", "gdpo"):
            found = train(method, seed, options.updates, options.folder / f"{method}-{seed}")
            found["of both"] = found["sevens"] / 10 + found["changes"]
            rounded = {name: round(value, 3) for name, value in found.items()}
            print(json.dumps({"method": method, "seed": seed, **rounded}), flush=True)


if __name__ == "__main__":
    main()

"""Compare variants of a config, each at several learning rates, and at its best rate with further seeds.

    python scripts/sweep_rates.py METHOD CONFIG.yaml --folder FOLDER --rates 1e-4 3e-4 1e-3
        --variant full --variant "rank 8" lora.enabled=true lora.rank=8 [--seeds 0 1 2] [--section.key VALUE ...]

METHOD is a method of jaxrlhf and CONFIG.yaml a file or the name of a preset; the other options hold for all runs. A
variant has a name and the options that it changes. The first seed is run at every rate, the others at the best one.

Each run is measured by the lowest held-out loss (`eval/loss`, that of the state that is exported), or, in PPO and GRPO,
by the mean score of the last ten updates. FOLDER/results.jsonl has a line for each run; runs that it has are not
repeated. At the end a table of its variants is printed, with the number of parameters that train.
"""

import argparse
import json
import math
import time
from pathlib import Path
from typing import Any

import jax

import jaxrlhf
from jaxrlhf import metrics, runtime
from jaxrlhf.config.file import METHODS, load_config, presets

SILENT = {"quiet": "true", "tensorboard": "false", "report": "false", "sample_every": "0", "token_samples": "0"}
LAST = 10  # updates of PPO and GRPO whose mean score is the result

Row = dict[str, Any]


def train(method: str, path: Path | None, options: list[tuple[str, str]]) -> Row:
    """Train with the config in `path` and these options; return the result of the run."""
    trainer = getattr(jaxrlhf, METHODS[method].__name__.replace("Config", "Trainer"))(
        load_config(method, path, options), fresh=True
    )
    trained = sum(x.size for x in jax.tree.leaves(trainer.state.value.params))
    started = time.monotonic()
    trainer.train()
    seconds = time.monotonic() - started
    records = metrics.read_records(Path(trainer.config.run_dir) / "metrics.jsonl")
    losses = [record["eval/loss"] for record in records if "eval/loss" in record]
    scores = [record["objective/scores"] for record in records if "objective/scores" in record][-LAST:]
    result = sum(scores) / len(scores) if scores else min(losses)
    return {"result": result, "trained": trained, "seconds": round(seconds, 1)}


def best(rows: list[Row], *, higher: bool) -> Row:
    """The best of these runs; one that is not finite is worse than any other."""
    worst = -math.inf if higher else math.inf
    return (max if higher else min)(rows, key=lambda row: row["result"] if math.isfinite(row["result"]) else worst)


def table(rows: list[Row], variants: list[str], *, higher: bool) -> str:
    """A Markdown table: a line for each variant, with the result at each rate and of each seed at the best rate."""
    rates = sorted({row["rate"] for row in rows})
    lines = ["| | trained | " + " | ".join(f"{rate:g}" for rate in rates) + " | seeds, at the best rate |"]
    lines.append("|---" * (len(rates) + 3) + "|")
    for variant in variants:
        own = [row for row in rows if row["variant"] == variant]
        first = {row["rate"]: row for row in own if row["seed"] == own[0]["seed"]}
        top = best(list(first.values()), higher=higher)["rate"]
        cells = [f"{first[rate]['result']:.3f}" if rate in first else "" for rate in rates]
        seeds = ", ".join(f"{row['result']:.3f}" for row in own if row["rate"] == top)
        lines.append(f"| {variant} | {own[0]['trained']:,} | {' | '.join(cells)} | {seeds} at {top:g} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("method", choices=list(METHODS))
    parser.add_argument("config")
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--rates", type=float, nargs="+", required=True)
    parser.add_argument("--variant", nargs="+", action="append", required=True, metavar=("NAME", "KEY=VALUE"))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    given, rest = parser.parse_known_args()
    if len(rest) % 2 or not all(key.startswith("--") for key in rest[::2]):
        parser.error(f"expected options as --section.key VALUE, got {' '.join(rest)}")
    shared = [(key.removeprefix("--"), value) for key, value in zip(rest[::2], rest[1::2], strict=True)]
    runtime.configure()
    higher = given.method in ("ppo", "grpo")
    given.folder.mkdir(parents=True, exist_ok=True)
    file = given.folder / "results.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []
    path = presets().get(given.config, Path(given.config))

    def run(variant: str, changes: list[str], rate: float, seed: int) -> None:
        key = {"variant": variant, "rate": rate, "seed": seed}
        setting = " ".join([given.method, given.config, *rest, *changes])
        for row in rows:
            if key.items() <= row.items():
                if row["setting"] != setting:
                    parser.error(
                        f"{file} has runs of '{variant}' with other options ({row['setting']}); take another folder"
                    )
                return
        place = given.folder / f"{variant}-{rate:g}-{seed}".replace(" ", "-")
        options = [(f"logging.{name}", value) for name, value in SILENT.items()] + [("checkpoint.save_every", "0")]
        options += [*shared, *((name, value) for name, _, value in (change.partition("=") for change in changes))]
        options += [("optim.learning_rate", f"{rate}"), ("seed", f"{seed}"), ("run_dir", f"{place}")]
        rows.append(key | train(given.method, path, options) | {"setting": setting})
        with file.open("a") as out:
            print(json.dumps(rows[-1]), file=out)
        print(json.dumps(rows[-1]), flush=True)

    first, *others = given.seeds
    for variant, *changes in given.variant:
        for rate in given.rates:
            run(variant, changes, rate, first)
        found = [row for row in rows if row["variant"] == variant and row["seed"] == first]
        for seed in others:
            run(variant, changes, best(found, higher=higher)["rate"], seed)
    print(table(rows, [variant for variant, *_ in given.variant], higher=higher))


if __name__ == "__main__":
    main()

"""Record small runs that later versions must resume: tests/fixtures/runs/<case>-<version>.

    python scripts/record_runs.py                # all cases, with the version of this package
    python scripts/record_runs.py sft grpo-lora

A recorded run was stopped after two of its four steps (`run`); `expected.jsonl` has the metrics of the same run without
a stop. Model, data and reward function are in tests/fixtures/runs/inputs. Each release records them once, and never
again.
"""

import argparse
import json
import os
import shutil
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

os.environ |= {"JAX_PLATFORMS": "cpu", "HF_HUB_OFFLINE": "1"}

import yaml

from jaxrlhf import __version__, cli
from jaxrlhf.metrics import Logger

RUNS = Path(__file__).resolve().parents[1] / "tests" / "fixtures" / "runs"
BOTH: dict[str, Any] = {
    "run_dir": "run",
    "model": {"path": "../inputs/model"},
    "data": {"path": "../inputs/rows.jsonl"},
    "optim": {"learning_rate": 1e-2},
    "checkpoint": {"save_every": 2, "keep": 1},
    "logging": {"quiet": True, "tensorboard": False, "sample_every": 0},
}
TRAIN = {"train": {"batch_size": 8, "num_train_epochs": 4, "max_steps": 4, "eval_batch_size": 8}}
LORA = {"lora": {"enabled": True, "rank": 2, "target_modules": ["q_proj", "v_proj"]}}
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    "sft": ("sft", TRAIN),
    "sft-lora": ("sft", TRAIN | LORA),
    "sft-muon": ("sft", TRAIN | {"optim": {"name": "muon", "learning_rate": 1e-2}}),
    "distill": (
        "distill",
        TRAIN
        | {
            "model": {"path": "../inputs/model", "init": "random"},
            "teacher": {"path": "../inputs/model"},
            "distill": {"lmbda": 0.5},
            "sampling": {"response_length": 8},
        },
    ),
    "reward-frozen": ("reward", TRAIN | {"frozen_trunk": True}),
    "dpo-lora": ("dpo", TRAIN | LORA),
    "grpo-lora": (
        "grpo",
        LORA
        | {
            "reward": {"function": "../inputs/score.py:score"},
            "sampling": {"response_length": 8},
            "grpo": {"batch_size": 8, "num_generations": 2, "total_episodes": 32, "beta": 0.1},
        },
    ),
}


def record(case: str, folder: Path) -> None:
    """Make the run of a case twice beside a copy of the inputs, once with a stop after two steps."""
    method, settings = CASES[case]
    os.chdir(folder)
    Path("config.yaml").write_text(yaml.safe_dump(BOTH | settings))
    if cli.main([method, "config.yaml"]) != 0:
        raise SystemExit(f"{case}: the run failed")
    metrics = [json.loads(line) for line in Path("run", "metrics.jsonl").read_text().splitlines()]
    kept = [{key: value for key, value in each.items() if not key.startswith("perf/")} for each in metrics]
    Path("expected.jsonl").write_text("".join(json.dumps(each) + "\n" for each in kept))
    shutil.rmtree("run")
    log = Logger.log

    def stopping_log(self: Logger, step: int, record: Mapping[str, Any]) -> None:
        log(self, step, record)
        if step == 2:
            os.kill(os.getpid(), signal.SIGTERM)

    Logger.log = stopping_log
    try:
        if cli.main([method, "config.yaml"]) != 75:
            raise SystemExit(f"{case}: the run was not stopped")
    finally:
        Logger.log = log
    Path("config.yaml").unlink()
    for path in Path("run").iterdir():
        if path.name not in ("checkpoints", "config.yaml", "run.json", "metrics.jsonl", "validation.json"):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = json.loads(Path("run", "run.json").read_text()) | {"platform": "Linux"}  # nothing of the machine
    for start in run["starts"]:
        start |= {"host": "host", "process": 1, "command": ["recorded"], "directory": "recorded"}
    Path("run", "run.json").write_text(json.dumps(run, indent=1) + "\n")
    for file in Path("run").rglob("commit_success.txt"):
        file.write_text(file.read_text().replace(str(folder), "recorded"))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cases", nargs="*", metavar="CASE", help=", ".join(CASES))
    cases = parser.parse_args().cases or list(CASES)
    if unknown := set(cases) - set(CASES):
        sys.exit(f"no case {', '.join(sorted(unknown))}; there are {', '.join(CASES)}")
    for case in cases:
        target = RUNS / f"{case}-{__version__}"
        if target.exists():
            sys.exit(f"{target} is there: what an earlier version wrote is never recorded again")
        with tempfile.TemporaryDirectory() as folder:
            shutil.copytree(RUNS / "inputs", Path(folder, "inputs"))
            work = Path(folder, "work")
            work.mkdir()
            record(case, work)
            shutil.copytree(work, target)
        size = sum(file.stat().st_size for file in target.rglob("*") if file.is_file())
        print(f"{target.name}: {size / 1000:.0f} kB")


if __name__ == "__main__":
    main()

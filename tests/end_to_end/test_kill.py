"""Runs that are killed: SIGKILL in the middle, SIGTERM, and the same command again give what an unbroken run gives."""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import pytest
import yaml

STEPS = 8
DEADLINE = 300.0  # seconds until a step must have come: liveness, not speed


@pytest.fixture(scope="module")
def settings(tiny_model: pathlib.Path, tmp_path_factory: pytest.TempPathFactory) -> dict:
    folder = tmp_path_factory.mktemp("kill")
    words = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")
    rows = [{"prompt": f"say {w} ", "completion": w, "chosen": w, "rejected": "no"} for w in words]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    score = "def score(prompts, completions):\n    return [len(c) / 10 for c in completions]\n"
    (folder / "score.py").write_text(score)
    both = {
        "model": {"path": str(tiny_model), "init": "random"},
        "data": {"path": str(folder / "rows.jsonl")},
        "optim": {"learning_rate": 1e-2, "warmup_steps": 2},
        "checkpoint": {"save_every": 2},
        "logging": {"tensorboard": False, "sample_every": 3},
    }
    train = {
        "train": {"batch_size": 4, "max_steps": STEPS, "num_train_epochs": 9, "eval_every": 3, "eval_batch_size": 2}
    }
    held_out = {"data": both["data"] | {"validation_fraction": 0.25}}
    return {
        "sft": both | train | held_out | {"sampling": {"response_length": 8}},
        "ppo": both
        | {
            "reward": {"function": f"{folder / 'score.py'}:score"},
            "ppo": {"batch_size": 4, "total_episodes": 4 * STEPS, "num_mini_batches": 2, "num_ppo_epochs": 2},
            "sampling": {"response_length": 8},
        },
    }


def start(method: str, settings: dict, run: pathlib.Path) -> subprocess.Popen:
    file = run.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(settings | {"run_dir": str(run)}))
    environment = os.environ | {"XLA_FLAGS": ""}  # one device: the run must not depend on this process's settings
    command = [sys.executable, "-m", "jaxrlhf", method, str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


def steps_done(run: pathlib.Path) -> int:
    file = run / "metrics.jsonl"
    return file.read_text().count("\n") if file.exists() else 0


def wait_for_step(process: subprocess.Popen, run: pathlib.Path, step: int) -> None:
    until = time.monotonic() + DEADLINE
    while steps_done(run) < step and process.poll() is None:
        assert time.monotonic() < until, f"no step {step} in {DEADLINE} s"
        time.sleep(0.002)


def finish(process: subprocess.Popen) -> str:
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 0, output
    return output


def facts(run: pathlib.Path) -> tuple[list[dict], dict[str, bytes]]:
    lines = (run / "metrics.jsonl").read_text().splitlines()
    records = [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]
    files = {"samples": run / "samples.jsonl", "weights": run / "export" / "model.safetensors"}
    return records, {name: file.read_bytes() for name, file in files.items() if file.exists()}


@pytest.mark.slow
@pytest.mark.parametrize("method", ["sft", "ppo"])  # one of each kind of loop
def test_killed_runs_end_as_if_nothing_had_happened(method, settings, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    finish(start(method, settings[method], whole))
    moments = random.Random(method)
    for step in (3, 6):
        process = start(method, settings[method], broken)
        wait_for_step(process, broken, step)
        time.sleep(moments.uniform(0, 0.05))
        process.send_signal(signal.SIGKILL)
        process.communicate()
        assert process.returncode == -signal.SIGKILL, "the run ended before it could be killed"
    output = finish(start(method, settings[method], broken))
    assert "resuming at step" in output
    records, files = facts(broken)
    assert [record["step"] for record in records] == list(range(1, STEPS + 1))
    assert (records, files) == facts(whole)


@pytest.mark.slow
def test_sigterm_saves_and_says_how_to_go_on(settings, tmp_path):
    process = start("ppo", settings["ppo"], tmp_path / "run")
    wait_for_step(process, tmp_path / "run", 1)
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=DEADLINE)
    assert process.returncode == 75 and "run the same command again to resume" in output, output
    finish(start("ppo", settings["ppo"], tmp_path / "run"))
    assert steps_done(tmp_path / "run") == STEPS

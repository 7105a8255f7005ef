"""scripts/bench.py runs, prints what it promises and refuses what makes no sense. Nothing here asserts a speed."""

import json
import os
import subprocess
import sys
from pathlib import Path

import jax
import pytest
from bench_process import Job, characters
from bench_shapes import add_percentages

BENCH = Path(__file__).resolve().parents[1] / "scripts" / "bench.py"
RECORD = {
    "case",
    "shape",
    "dtype",
    "batch",
    "prompt",
    "response",
    "device",
    "rounds",
    "machine",
    "contestants",
    "ratio",
}
CONTESTANT = {
    "seconds",
    "tokens_per_second",
    "waiting_percent",
    "peak_bytes",
    "knobs",
    "versions",
    "dtype",
    "environment",
}
PHASES = {
    "sft": {"update"},
    "dpo": {"reference", "update"},
    "ppo": {"rollout", "scoring", "update"},
    "grpo": {"rollout", "scoring", "update"},
}


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, BENCH, *arguments],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"XLA_FLAGS": ""},
    )


def record(*arguments: str) -> dict:
    done = bench(*arguments)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert set(found) >= RECORD | {"limits"}
    assert set(found["limits"]) == {"float32", "bfloat16", "read"}
    for contestant in found["contestants"].values():
        assert set(contestant) >= CONTESTANT
        seconds = contestant["seconds"]
        assert 0 <= seconds["min"] <= seconds["median"] <= seconds["max"]
        assert 0 <= contestant["waiting_percent"] <= 100
        assert contestant["peak_bytes"] > 0
        assert contestant["versions"]["jax"]
    return found


def test_limits():
    found = record("limits", "--shape", "T", "--rounds", "1")
    rates = found["contestants"]["ours"]["rates"]
    assert all(rate > 0 for rate in rates.values())
    assert found["limits"]["read"] == pytest.approx(rates["read"], abs=0.1)


def test_generate(tmp_path):
    file = tmp_path / "results.jsonl"
    size = ("--batch", "2", "--prompt", "16", "--response", "8", "--rounds", "2")
    found = record("generate", "--shape", "T", *size, "--output", str(file))
    ours = found["contestants"]["ours"]
    assert set(ours["phases"]) == {"inference_copy", "prefill"}
    assert ours["tokens_per_second"] > 0
    assert ours["floor_percent"] > 0
    assert json.loads(file.read_text()) == found


@pytest.mark.slow
@pytest.mark.bench
@pytest.mark.parametrize(
    ("case", "contestants"),
    [
        ("engine", ["ours", "ours-static"]),
        ("prefix", ["ours", "ours-rows"]),
        ("logprobs", ["ours"]),
        ("sft", ["ours"]),
        ("reward", ["ours"]),
        ("dpo", ["ours"]),
        ("ppo", ["ours"]),
        ("grpo", ["ours"]),
        ("startup", ["cold", "cached"]),
        ("memory", ["ours"]),
        ("plan", ["ours", "planned"]),
    ],
)
def test_other_cases(case, contestants):
    size = ("--batch", "4", "--prompt", "16", "--response", "8", "--slots", "2", "--samples", "2", "--rounds", "1")
    found = record(case, "--shape", "T", *size)
    assert list(found["contestants"]) == contestants
    if case in PHASES:
        assert set(found["contestants"]["ours"]["phases"]) == PHASES[case]
    if case == "memory":
        sizes = found["contestants"]["ours"]["gigabytes"]
        whole, short, away = (sizes[name] for name in ("baseline", "optim.state_dtype bfloat16", "optim.offload"))
        assert short["optimizer state"] == pytest.approx(whole["optimizer state"] / 2, rel=0.3)
        assert away == whole, "a CPU has no other memory to put the moments in"
    if case == "plan":
        assert set(found["contestants"]["planned"]["phases"]) >= {"rollout", "annotation", "update", "process", "peak"}


def test_the_floor_of_dpo_has_the_forward_pass_of_the_reference():
    """A forward pass of the reference beside one forward and two backward of the policy: 4 parts to 3."""
    summary: dict = {"seconds": {"median": 4.0}, "phases": {"reference": 1.0, "update": 3.0}}
    values = {"shape": "T", "dtype": "float32", "batch": 8, "prompt": 16, "response": 8}
    job = Job(**dict.fromkeys(Job.__dataclass_fields__) | values | {"case": "dpo"})
    add_percentages(summary, job, {"float32": 0.01, "bfloat16": 0.01, "read": 1.0})
    assert summary["floor_percent"] == pytest.approx(summary["update_percent"], abs=0.11)
    assert summary["floor_percent"] > 10


def test_the_reward_of_grpo_differs_between_completions():
    assert characters(prompts=["w3", "w3"], completions=["w4 w5", "w4 w567"], mode="train") == [5.0, 7.0]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["fly"], "invalid choice: 'fly'"),
        (["generate", "--rounds", "0"], "--rounds is 0; it must be at least 1"),
        (["generate", "--response", "4000"], "4064 tokens; the context of shape S is 2048"),
        (["ppo", "--micro-batch", "3"], "--micro-batch 3 does not divide --batch 16"),
        (["grpo", "--samples", "3"], "--samples 3 does not divide --batch 16, which counts responses"),
        (["ppo", "--dtype", "int8"], "--dtype int8 is for generate, engine, prefix"),
        (["ppo", "--peer", "hf"], "--peer hf has no ppo; it has limits, generate"),
        (["sft", "--peer", "trl"], "--peer trl has no sft; it has dpo, ppo, grpo"),
        (["grpo", "--peer", "tunix", "--lora-rank", "4"], "--peer tunix has no --lora-rank"),
        (["generate", "--strong"], "give --peer hf or --peer trl"),
        (["generate", "--peer", "hf", "--peer-python", "/nowhere/python"], "there is no file /nowhere/python"),
    ],
)
def test_bad_arguments_are_refused(arguments, message):
    done = bench(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_a_contestant_that_dies_is_named_with_its_last_words():
    """conftest's XLA flags reach the contestants; a flag that XLA does not know ends the first of them."""
    done = subprocess.run(
        [sys.executable, BENCH, "limits", "--shape", "T"],
        capture_output=True,
        text=True,
        timeout=300,
        env=os.environ | {"XLA_FLAGS": "--xla_no_such_flag=1"},
    )
    assert done.returncode == 1
    assert "bench: ours ended with status" in done.stderr
    assert "xla_no_such_flag" in done.stderr


def test_a_device_that_is_not_here_is_named_and_nothing_is_measured():
    if jax.default_backend() == "gpu":
        pytest.skip("a GPU is here")
    done = bench("generate", "--shape", "T", "--device", "gpu")
    assert done.returncode == 1 and not done.stdout
    assert "jax finds no device for --device gpu" in done.stderr and "nothing was measured" in done.stderr
    assert "Traceback" not in done.stderr

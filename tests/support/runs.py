"""What tests of runs look at: the record of one, and whether two arrived at the same arrays."""

import importlib
import json
import pathlib
from typing import Any

import jax
import numpy as np


def length_reward(prompts, completions, **columns):
    return [0.1 * len(text) for text in completions]


def supervised_step(trainer: Any, step: int) -> dict[str, Any]:
    """One optimizer step of an SFT, reward or DPO trainer, as its loop makes it; its metrics."""
    update = importlib.import_module(type(trainer).__module__).update
    batch = trainer.batch(step)
    trainer.state.value, metrics = update(trainer.state.value, trainer.frozen, batch, trainer.key, spec=trainer.spec)
    return metrics


def records(run: str | pathlib.Path) -> list[dict[str, Any]]:
    """metrics.jsonl without timings, which alone may differ between equal runs."""
    lines = pathlib.Path(run, "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if not k.startswith("perf/")} for line in lines]


def facts(run: pathlib.Path) -> tuple[Any, ...]:
    """What has to be the same in equal runs: records without timings, samples, exported weights or adapters."""
    weights = {file.name: file.read_bytes() for file in (run / "export").glob("*.safetensors")}
    assert weights, f"no weights in {run}/export"
    return records(run), (run / "samples.jsonl").read_bytes(), weights


def equal(a: Any, b: Any) -> None:
    """Assert that two trees hold the same arrays, bit for bit."""
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(a), jax.device_get(b))

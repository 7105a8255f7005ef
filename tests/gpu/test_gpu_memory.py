"""A run whose card is full ends with exit code 8, and goes on from its last checkpoint when there is room."""

import json
import os

import jax
import jax.numpy as jnp
import pytest
import yaml
from support.runs import records

from jaxrlhf import sharding
from jaxrlhf.checkpoint import Checkpoints
from jaxrlhf.cli import main
from jaxrlhf.training.session import Session

pytestmark = pytest.mark.gpu
REHEARSAL = "JAXRLHF_GPU_REHEARSAL"


def filled():
    """Arrays that leave no free memory on the card. On a CPU, to rehearse, raise the error that would follow."""
    if sharding.platform() != "gpu":
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: a rehearsal")
    held, size = [], 2**36
    while size >= 2**8:
        try:
            held.append(jax.block_until_ready(jnp.zeros(size, jnp.uint8)))
        except jax.errors.JaxRuntimeError as error:
            assert "RESOURCE_EXHAUSTED" in str(error)
            size //= 2
    return held


def test_memory_of_the_card_that_runs_out_in_the_middle_of_a_run(tiny_model, tmp_path, monkeypatch, capfd):
    if sharding.platform() != "gpu" and REHEARSAL not in os.environ:
        pytest.skip("no GPU (or not asked for: pytest -m gpu)")
    (tmp_path / "rows.jsonl").write_text(
        "".join(json.dumps({"prompt": f"say {word} ", "completion": word}) + "\n" for word in ("red", "green", "blue"))
    )
    settings = {
        "model": {"path": str(tiny_model), "init": "random", "compute_dtype": "float32"},
        "data": {"path": str(tmp_path / "rows.jsonl")},
        "train": {"batch_size": 2, "max_steps": 4, "num_train_epochs": 9},
        "checkpoint": {"save_every": 1, "keep": 1},
        "logging": {"tensorboard": False, "sample_every": 0},
    }
    (tmp_path / "sft.yaml").write_text(yaml.safe_dump(settings))

    def run(name):
        return main(["sft", str(tmp_path / "sft.yaml"), "--run_dir", str(tmp_path / name)])

    assert run("whole") == 0
    held, save_if_due = [], Session.save_if_due

    def fill(session, step, evaluation):
        save_if_due(session, step, evaluation)
        if step == 2:
            session._checkpoints.wait()
            held.extend(filled())

    with monkeypatch.context() as patch:
        patch.setattr(Session, "save_if_due", fill)
        assert run("full") == 8
    said = capfd.readouterr().err
    assert "out of memory: " in said and "micro_batch_size" in said and "Traceback" not in said
    held.clear()
    kept = Checkpoints(tmp_path / "full" / "checkpoints", 1, True)
    assert kept.steps == [2] and "as they were written" in kept.verify(2)
    assert run("full") == 0
    for here, there in zip(records(tmp_path / "full"), records(tmp_path / "whole"), strict=True):
        assert here == pytest.approx(there, rel=1e-4, abs=1e-6)

"""Damage to a checkpoint of each kind that disks and people do: the state of its step or of the one before is restored,
bit for bit, and never another."""

import random
import shutil

import jax
import jax.numpy as jnp
import optax
import pytest
import torture

from jaxrlhf.checkpoint import Checkpoints
from jaxrlhf.checkpoint.digest import digests, leaves_by_name
from jaxrlhf.types import TrainState

TRIALS = 300


def state_of(seed):
    params = {"w": jax.random.normal(jax.random.key(seed), (16, 8)), "b": jnp.full((8,), seed, jnp.bfloat16)}
    return TrainState(jnp.int32(seed), {"policy": params}, {"policy": optax.adam(1e-3).init(params)}, jnp.float32(0.1))


@pytest.mark.filterwarnings("ignore:coroutine")  # of Orbax, where a file cannot be read
def test_damaged_checkpoints(tmp_path, caplog):
    whole, chance, outcomes = tmp_path / "whole", random.Random(0), []
    saved = Checkpoints(whole, keep=2, synchronous=True)
    for step in (5, 10):
        saved.save(step, state_of(step), {"position": 8 * step})
    known = {step: digests(leaves_by_name(state_of(step))) for step in (5, 10)}
    files = sorted(path.relative_to(whole) for path in (whole / "10").rglob("*") if path.is_file())
    for trial in range(TRIALS):
        folder = tmp_path / "damaged"
        shutil.copytree(whole, folder)
        kind = torture.damage(folder / files[trial % len(files)], chance)
        step, state, extra = Checkpoints(folder, keep=2, synchronous=True).restore(state_of(0))
        assert extra == {"position": 8 * step} and digests(leaves_by_name(state)) == known[step], kind
        outcomes.append(step)
        shutil.rmtree(folder)
    assert min(outcomes.count(5), outcomes.count(10)) > TRIALS / 10

"""Accumulated gradients and the guarded optimizer step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.config import Optim
from jaxrlhf.training import step
from jaxrlhf.training.optim import make_optimizer, schedule
from jaxrlhf.types import TrainState

ROWS, WIDTH = 12, 5


@pytest.fixture
def problem(key):
    x_key, y_key, mask_key, w_key = jax.random.split(key, 4)
    batch = {
        "x": jax.random.normal(x_key, (ROWS, WIDTH)),
        "y": jax.random.normal(y_key, (ROWS,)),
        "mask": jax.random.bernoulli(mask_key, 0.6, (ROWS,)),
    }
    return {"w": jax.random.normal(w_key, (WIDTH,))}, batch


def squares(params, rows, count):
    error = jnp.where(rows["mask"], rows["x"] @ params["w"] - rows["y"], 0.0)
    value = jnp.sum(jnp.square(error)) / count
    return value, {"mse": value, "worst_max": jnp.max(jnp.abs(error))}


@pytest.mark.parametrize("parts", [1, 2, 3, 12])
def test_micro_batches_add_up_to_the_batch(problem, parts):
    params, batch = problem
    count = jnp.sum(batch["mask"])
    x, y = np.asarray(batch["x"])[batch["mask"]], np.asarray(batch["y"])[batch["mask"]]
    error = x @ np.asarray(params["w"]) - y
    grads, metrics = step.gradients(lambda p, rows: squares(p, rows, count), params, batch, parts)
    np.testing.assert_allclose(grads["w"], 2 * x.T @ error / len(y), rtol=1e-5)
    np.testing.assert_allclose(metrics["mse"], np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["worst_max"], np.abs(error).max(), rtol=1e-6)


def test_split_and_join_are_inverse():
    tree = {"a": jnp.arange(24).reshape(12, 2), "b": jnp.arange(12)}
    assert jax.tree.all(jax.tree.map(jnp.array_equal, step.from_micro_batches(step.to_micro_batches(tree, 4)), tree))


def state_of(params, optimizer):
    return TrainState(jnp.int32(0), {"policy": params}, {"policy": optimizer.chain.init(params)}, jnp.float32(0))


@pytest.mark.parametrize("poison", [jnp.nan, jnp.inf])
@pytest.mark.parametrize("where", ["loss", "gradient"])
@pytest.mark.parametrize("storage", ["float32", "bfloat16"])
def test_a_non_finite_step_changes_nothing_bit_for_bit(poison, where, storage):
    optimizer = make_optimizer(Optim(learning_rate=0.1, state_dtype=storage), 0.1, 10)
    state = state_of({"w": jnp.array([1.0, -2.0])}, optimizer)
    good = {"policy": {"w": jnp.array([0.3, 0.4])}}
    state, _ = step.apply(state, good, jnp.float32(1), (("policy", optimizer),))
    bad = good if where == "loss" else {"policy": {"w": jnp.array([0.3, poison])}}
    loss = jnp.float32(poison if where == "loss" else 1)
    after, metrics = step.apply(state, bad, loss, (("policy", optimizer),))
    assert metrics["skipped_updates"] == 1
    for new, old in zip(jax.tree.leaves(after), jax.tree.leaves(state), strict=True):
        np.testing.assert_array_equal(new, old)


def test_the_gradient_clip_is_applied_and_reported_and_adam_is_that_of_the_paper():
    config = Optim(learning_rate=0.1, schedule="constant", max_grad_norm=1.0, eps=1e-5)
    optimizer = make_optimizer(config, 0.1, 10)
    state = state_of({"w": jnp.array([1.0, 1.0])}, optimizer)
    raw = np.array([3.0, 4.0])
    state, metrics = step.apply(
        state, {"policy": {"w": jnp.asarray(raw, jnp.float32)}}, jnp.float32(0), (("policy", optimizer),)
    )
    assert metrics["policy/grad_norm"] == pytest.approx(5) and metrics["policy/grad_norm_clipped"] == pytest.approx(1)
    g = raw / 5
    m, v = 0.1 * g / (1 - 0.9), 0.001 * g**2 / (1 - 0.999)  # Adam's first step, bias-corrected
    np.testing.assert_allclose(state.params["policy"]["w"], 1 - 0.1 * m / (np.sqrt(v) + 1e-5), rtol=1e-5)


def test_adam_is_optax_adam_step_for_step():
    """And a step that was skipped leaves no trace in moments, count or schedule."""
    config = Optim(learning_rate=0.1, schedule="cosine", warmup_steps=2, weight_decay=0.1, max_grad_norm=1e9)
    optimizer = make_optimizer(config, 0.1, 10)
    rate = schedule(config, 0.1, 10)
    theirs = optax.adamw(rate, config.beta1, config.beta2, config.eps, weight_decay=0.1)
    state = state_of({"kernel": jax.random.normal(jax.random.key(0), (5, 3))}, optimizer)
    params = state.params["policy"]
    moments = theirs.init(params)
    for i in range(8):
        grads = {"kernel": jax.random.normal(jax.random.key(i + 1), (5, 3)) * 10.0 ** (i - 4)}
        updates, moments = theirs.update(grads, moments, params)
        params = optax.apply_updates(params, updates)
        state, _ = step.apply(state, {"policy": grads}, jnp.float32(0), (("policy", optimizer),))
        state, _ = step.apply(state, {"policy": grads}, jnp.float32(jnp.nan), (("policy", optimizer),))
        np.testing.assert_allclose(state.params["policy"]["kernel"], params["kernel"], rtol=1e-5, atol=1e-7)


def test_decay_leaves_norms_and_biases_alone():
    optimizer = make_optimizer(Optim(learning_rate=0.1, weight_decay=0.5, schedule="constant"), 0.1, 10)
    params = {"up": {"kernel": jnp.ones(2), "bias": jnp.ones(2)}, "norm": {"scale": jnp.ones(2)}}
    zero = jax.tree.map(jnp.zeros_like, params)
    after, _ = step.apply(state_of(params, optimizer), {"policy": zero}, jnp.float32(0), (("policy", optimizer),))
    after = after.params["policy"]
    np.testing.assert_allclose(after["up"]["kernel"], 0.95)
    np.testing.assert_array_equal(after["up"]["bias"], 1)
    np.testing.assert_array_equal(after["norm"]["scale"], 1)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("constant", [0.25, 0.5, 0.75, 1, 1, 1, 1]),
        ("linear", [0.25, 0.5, 0.75, 1, 0.775, 0.55, 0.325]),
        ("cosine", [0.25, 0.5, 0.75, 1, 0.1 + 0.9 * (1 + 2**-0.5) / 2, 0.55, 0.1 + 0.9 * (1 - 2**-0.5) / 2]),
    ],
)
def test_schedule_warms_up_and_ends_where_it_should(kind, expected):
    rate = schedule(Optim(schedule=kind, warmup_steps=3, final_lr_fraction=0.1), 1.0, 7)
    np.testing.assert_allclose([rate(i) for i in range(7)], expected, rtol=1e-5)
    assert rate(7) == pytest.approx(1 if kind == "constant" else 0.1)

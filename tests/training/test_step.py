"""Accumulated gradients and the guarded optimizer step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jaxrlhf.config import Mesh, Optim
from jaxrlhf.sharding import make_mesh
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


@pytest.mark.parametrize("parts", [1, 3])
def test_gradients_in_turn_are_those_of_the_sum(problem, parts):
    params, batch = problem
    count = jnp.sum(batch["mask"])

    def loss(role, factor):
        def of_role(roles, rows):
            assert roles.keys() == {role}
            value, metrics = squares(roles[role], rows, count)
            return factor * value, {f"{role}/{key}": x for key, x in metrics.items()}

        return of_role, {}

    roles = {"policy": params, "critic": {"w": 3 * params["w"]}, "other": {"w": 5 * params["w"]}}
    factors = {"policy": 1.0, "critic": 0.5, "other": 2.0}
    losses = {role: loss(role, factor) for role, factor in factors.items()}
    grads, metrics = jax.jit(lambda *args: step.gradients_in_turn(losses, *args, parts, make_mesh(Mesh())))(
        roles, batch
    )
    total = 0
    for role, factor in factors.items():
        x, y = np.asarray(batch["x"])[batch["mask"]], np.asarray(batch["y"])[batch["mask"]]
        error = x @ np.asarray(roles[role]["w"]) - y
        total += factor * np.mean(error**2)
        np.testing.assert_allclose(grads[role]["w"], factor * 2 * x.T @ error / len(y), rtol=1e-5)
        np.testing.assert_allclose(metrics[f"{role}/mse"], np.mean(error**2), rtol=1e-5)
    np.testing.assert_allclose(metrics["loss"], total, rtol=1e-5)


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


def test_muon_is_that_of_optax_for_every_matrix_of_the_layers_and_adamw_for_the_rest():
    """Steps that were skipped leave no trace; stacked matrices are orthogonalised one by one."""
    config = Optim(name="muon", learning_rate=0.1, schedule="constant", weight_decay=0.1, max_grad_norm=1e9, eps=1e-6)
    optimizer = make_optimizer(config, 0.1, 10)
    key = jax.random.key(0)
    layers = {"attention": {"q": {"kernel": (2, 6, 4), "bias": (2, 4)}}, "experts": {"up": {"kernel": (2, 3, 4, 5)}}}
    shapes = {"layers": layers, "embed": {"embedding": (7, 6)}, "norm": {"scale": (6,)}}
    params = jax.tree.map(lambda shape: jax.random.normal(key, shape), shapes, is_leaf=lambda x: isinstance(x, tuple))
    alone = {f"{name}/{i}": matrix for name, stack in (
        ("q", params["layers"]["attention"]["q"]["kernel"]),
        ("up", params["layers"]["experts"]["up"]["kernel"].reshape(6, 4, 5)),
    ) for i, matrix in enumerate(stack)}  # fmt: skip
    rest = {"embed": params["embed"]["embedding"]}
    muon = optax.contrib.muon(0.1, weight_decay=0.1, consistent_rms=0.2)
    adamw = optax.adamw(0.1, eps=1e-6, weight_decay=0.1)
    states = muon.init(alone), adamw.init(rest)
    state = state_of(params, optimizer)
    for i in range(4):
        grads = jax.tree.map(lambda x: jax.random.normal(jax.random.fold_in(key, i + 1), x.shape) * 10.0**i, params)  # noqa: B023
        q, up = grads["layers"]["attention"]["q"]["kernel"], grads["layers"]["experts"]["up"]["kernel"]
        of_alone = {f"q/{j}": q[j] for j in range(2)} | {f"up/{j}": x for j, x in enumerate(up.reshape(6, 4, 5))}
        updates, first = muon.update(of_alone, states[0], alone)
        alone = optax.apply_updates(alone, updates)
        updates, second = adamw.update({"embed": grads["embed"]["embedding"]}, states[1], rest)
        rest, states = optax.apply_updates(rest, updates), (first, second)
        state, _ = step.apply(state, {"policy": grads}, jnp.float32(0), (("policy", optimizer),))
        before = state
        state, _ = step.apply(state, {"policy": grads}, jnp.float32(jnp.nan), (("policy", optimizer),))
        assert jax.tree.all(jax.tree.map(jnp.array_equal, state, before))
    after = state.params["policy"]
    for name, matrix in alone.items():
        kind, number = name.split("/")
        stack = (
            after["layers"]["attention"]["q"]["kernel"] if kind == "q" else after["layers"]["experts"]["up"]["kernel"]
        )
        found = stack.reshape(-1, *matrix.shape)[int(number)]
        np.testing.assert_allclose(found, matrix, rtol=2e-4, atol=2e-5)
    np.testing.assert_allclose(after["embed"]["embedding"], rest["embed"], rtol=1e-4, atol=1e-5)
    moments = sum(x.size for x in jax.tree.leaves(state.opt_state) if x.ndim)
    matrices, others = 2 * 6 * 4 + 2 * 3 * 4 * 5, 2 * 4 + 7 * 6 + 6
    assert moments == matrices + 2 * others


def test_muon_updates_have_the_size_of_adamw():
    """A root mean square of 0.2 for every shape (https://arxiv.org/abs/2502.16982), whatever that of the gradient."""
    for shape in ((1, 64, 16), (1, 16, 64), (1, 32, 32)):
        for size in (1e-4, 1.0, 1e3):
            optimizer = make_optimizer(Optim(name="muon", max_grad_norm=1e9, schedule="constant"), 1.0, 10)
            params = {"layers": {"up": {"kernel": jnp.zeros(shape)}}}
            grads = jax.tree.map(lambda x: size * jax.random.normal(jax.random.key(1), x.shape), params)  # noqa: B023
            state, _ = step.apply(
                state_of(params, optimizer), {"policy": grads}, jnp.float32(0), (("policy", optimizer),)
            )
            kernel = state.params["policy"]["layers"]["up"]["kernel"]
            assert 0.13 < jnp.sqrt(jnp.mean(jnp.square(kernel))) < 0.24

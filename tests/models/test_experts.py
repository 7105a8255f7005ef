"""Mixtures of experts against a loop over tokens and experts, alone and on a mesh."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import config, lora, models, sharding
from jaxrlhf.models import experts
from jaxrlhf.rollout.inference_copy import inference_copy

B, T = 8, 9


@pytest.fixture(scope="module")
def model(make):
    return make(
        family="qwen3_moe", num_experts=6, experts_per_token=3, normalise_expert_shares=True, mlp_size=8, hidden_size=16
    )


@pytest.fixture(scope="module")
def weights(model):
    generator = np.random.default_rng(0)
    shapes = jax.eval_shape(experts.Experts(model).init, jax.random.key(0), jnp.zeros((1, 1, 16)))["params"]
    return jax.tree.map(lambda x: generator.normal(0, 0.4, x.shape).astype(np.float32), shapes)


@pytest.fixture(scope="module")
def x():
    return np.random.default_rng(1).normal(size=(B, T, 16)).astype(np.float32)


def by_hand(weights, x, k, normalise):
    """In float64, token by token."""
    kernels = {name: tree["kernel"].astype(np.float64) for name, tree in weights.items()}
    y = np.zeros(x.shape)
    for at in np.ndindex(x.shape[:2]):
        token = x[at].astype(np.float64)
        scores = np.exp(token @ kernels["router"])
        scores /= scores.sum()
        chosen = np.argsort(-scores)[:k]
        for expert in chosen:
            gate, up = token @ kernels["gate"][expert], token @ kernels["up"][expert]
            out = (gate / (1 + np.exp(-gate)) * up) @ kernels["down"][expert]
            y[at] += scores[expert] / (scores[chosen].sum() if normalise else 1) * out
    return y


def run(model, weights, x):
    return experts.Experts(model).apply({"params": jax.tree.map(jnp.asarray, weights)}, jnp.asarray(x))


@pytest.mark.parametrize(("k", "normalise"), [(1, False), (3, True), (6, False)])
def test_a_token_gets_the_sum_of_its_experts(model, weights, x, k, normalise):
    model = dataclasses.replace(model, experts_per_token=k, normalise_expert_shares=normalise)
    np.testing.assert_allclose(run(model, weights, x), by_hand(weights, x, k, normalise), atol=1e-5, rtol=1e-5)


def test_nothing_is_dropped_if_all_tokens_want_the_same_experts(model, weights, x):
    router = weights["router"]["kernel"].copy()
    router[:, 4] = 10 * np.abs(router[:, 4])
    one_sided = {**weights, "router": {"kernel": router}}
    positive = np.abs(x)
    np.testing.assert_allclose(
        run(model, one_sided, positive), by_hand(one_sided, positive, 3, True), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize(
    ("tokens", "k", "count"), [(1, 8, 128), (1, 2, 4), (3, 2, 4), (8, 3, 5), (33, 2, 7), (700, 1, 2)]
)
def test_blocks_hold_every_choice_and_few_tokens_few_blocks(tokens, k, count):
    block, blocks = experts.block_shape(tokens, k, count)
    assert blocks * block >= tokens * k and blocks <= min(tokens * k, tokens * k // block + count)
    generator = np.random.default_rng(0)
    for share in (1.0, 0.3, 0.0):  # from even to one-sided
        order = generator.random((tokens, count)) * share + np.arange(count)
        chosen = np.argsort(order, axis=1)[:, :k]
        assert sum(-(-n // block) for n in np.bincount(chosen.reshape(-1))) <= blocks


def test_a_token_does_not_depend_on_the_others(model, weights, x):
    together = run(model, weights, x)
    alone = run(model, weights, x[2:3, 5:6])
    np.testing.assert_allclose(alone[0, 0], together[2, 5], atol=1e-5)
    others = np.where(np.arange(T)[:, None] == 5, x, 100.0)
    np.testing.assert_allclose(run(model, weights, others)[2, 5], together[2, 5], atol=1e-5)


def dense(model, weights, x):
    """All experts for all tokens, times a share that is 0 for most."""
    probabilities = jax.nn.softmax(jnp.einsum("btd,de->bte", x, weights["router"]["kernel"]))
    least = jnp.sort(probabilities)[..., -model.experts_per_token][..., None]
    shares = jnp.where(probabilities >= least, probabilities, 0)
    shares = shares / shares.sum(-1, keepdims=True)
    gate, up = (jnp.einsum("btd,edf->btef", x, weights[name]["kernel"]) for name in ("gate", "up"))
    return jnp.einsum("btef,efd,bte->btd", jax.nn.silu(gate) * up, weights["down"]["kernel"], shares)


def gradients(function, model, weights, x):
    return jax.jit(jax.grad(lambda w, x: jnp.sum(jnp.sin(function(model, w, x))), (0, 1)))(weights, x)


def test_gradients_are_those_of_all_experts_for_all_tokens(model, weights, x):
    ours, expected = (gradients(function, model, weights, x) for function in (run, dense))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), ours, expected)


def test_gradient_of_a_stored_expert_keeps_its_precision(model, weights, x):
    """In bfloat16 products, the gradient of a float32 weight is a float32 sum, as that of any kernel."""
    half = dataclasses.replace(model, dtype="bfloat16")
    grads, _ = gradients(run, half, weights, x)
    kernel = grads["down"]["kernel"]
    assert kernel.dtype == jnp.float32
    assert not np.array_equal(kernel, kernel.astype(jnp.bfloat16).astype(np.float32))


@pytest.mark.parametrize("shape", [config.Mesh(data=2, fsdp=2, tensor=2), config.Mesh(data=1, fsdp=8)])
def test_a_mesh_changes_nothing(model, weights, x, shape):
    mesh = sharding.make_mesh(shape)
    on_mesh = dataclasses.replace(model, mesh=mesh)
    stacked = {"layers": {"experts": jax.tree.map(lambda w: w[None], weights)}}
    places = sharding.shardings(stacked, mesh)["layers"]["experts"]
    split = places["gate"]["kernel"].spec
    assert "fsdp" in split and ("tensor" in split or shape.tensor == 1)
    placed = jax.tree.map(lambda w, place: jax.device_put(w[None], place)[0], weights, places)
    rows = jax.device_put(x, jax.sharding.NamedSharding(mesh, sharding.ROWS))
    found = jax.jit(partial(run, on_mesh))(placed, rows)
    np.testing.assert_allclose(found, run(model, weights, x), atol=1e-5, rtol=1e-5)
    ours, expected = gradients(run, on_mesh, placed, rows), gradients(run, model, weights, x)
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), ours, expected)


def test_the_router_is_seen_by_tokens_and_not_by_padding(model, weights, x):
    real = np.arange(T) < np.arange(B)[:, None] + 2
    _, sown = experts.Experts(model).apply(
        {"params": jax.tree.map(jnp.asarray, weights)}, jnp.asarray(x), mutable=["intermediates"]
    )
    found = experts.router_sums(*sown["intermediates"]["routing"][0], jnp.asarray(real))
    logits = x[real].astype(np.float64) @ weights["router"]["kernel"].astype(np.float64)
    scores = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    np.testing.assert_array_equal(found[0], np.bincount(np.argsort(-scores, axis=1)[:, :3].reshape(-1), minlength=6))
    np.testing.assert_allclose(found[1], scores.sum(0), rtol=1e-5)


@pytest.mark.parametrize("bits", ["int8", "nf4"])
@pytest.mark.parametrize("shape", [None, config.Mesh(data=2, fsdp=2, tensor=2)])
def test_packed_experts_are_those_that_they_unpack_to(model, weights, x, bits, shape):
    base = {"layers": {"experts": jax.tree.map(lambda w: jnp.asarray(w)[None], weights)}}
    packed = lora.pack(base, bits, double=bits == "nf4")
    assert "codes" in packed["layers"]["experts"]["down"] and "kernel" in packed["layers"]["experts"]["router"]
    whole, packed = (jax.tree.map(lambda w: w[0], tree["layers"]["experts"]) for tree in (lora.unpack(packed), packed))
    placed = model if shape is None else dataclasses.replace(model, mesh=sharding.make_mesh(shape))

    def of_input(model, weights):
        return jax.jit(jax.value_and_grad(lambda x: jnp.sum(jnp.sin(run(model, weights, x)))))(x)

    expected, ours = of_input(model, whole), of_input(placed, packed)
    np.testing.assert_allclose(ours[0], expected[0], rtol=1e-4)
    np.testing.assert_allclose(ours[1], expected[1], atol=1e-4, rtol=1e-4)


def test_decoding_with_a_cache_equals_forward_in_every_copy(model, big_weights, padded):
    params = big_weights(model)
    params["layers"]["experts"] = jax.tree.map(lambda w: w / 2, params["layers"]["experts"])
    tokens, mask = padded([np.arange(1, 7), np.arange(3, 6)], "left", 7)
    whole = jax.jit(models.forward, static_argnums=1)(params, model, tokens, mask)
    for dtype, tolerance in (("float32", 1e-4), ("int8", 0.2)):
        inference, copy = inference_copy(model, params, dtype)
        cache = models.empty_cache(inference, 2, 7)
        positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
        step = jax.jit(models.forward_cached, static_argnums=1)
        first, cache = step(copy, inference, tokens[:, :6], mask[:, :6], positions[:, :6], cache, 0)
        last, _ = step(copy, inference, tokens[:, 6:], mask[:, 6:], positions[:, 6:], cache, 6)
        found = np.concatenate([first, last], axis=1)
        real = np.asarray(mask)
        assert np.abs(found - whole)[real].mean() < tolerance


RANK, ADAPTERS = 3, models.Adapters(3, 6.0)  # a scale of 2


@pytest.fixture(scope="module")
def adapters(weights):
    def normal(*shape):
        return generator.normal(0, 0.2, shape).astype(np.float32)

    generator = np.random.default_rng(2)
    shapes = {name: weights[name]["kernel"].shape for name in ("gate", "up", "down")}
    return {name: {"a": normal(e, i, RANK), "b": normal(e, RANK, o)} for name, (e, i, o) in shapes.items()}


def with_adapters(model, weights, adapters, x):
    return experts.Experts(dataclasses.replace(model, adapters=ADAPTERS)).apply(
        {"params": jax.tree.map(jnp.asarray, weights), "lora": adapters}, jnp.asarray(x)
    )


def summed(weights, adapters):
    """W + 2 A B of every expert that has adapters."""
    deltas = {name: 2 * adapter["a"] @ adapter["b"] for name, adapter in adapters.items()}
    return {name: {"kernel": tree["kernel"] + deltas.get(name, 0)} for name, tree in weights.items()}


def test_a_token_gets_the_adapters_of_its_experts(model, weights, adapters, x):
    exact = jax.tree.map(lambda w: w.astype(np.float64), (weights, adapters))
    for chosen in (("gate", "up", "down"), ("down",)):
        some = {name: adapters[name] for name in chosen}
        expected = by_hand(summed(exact[0], {name: exact[1][name] for name in chosen}), x, 3, True)
        np.testing.assert_allclose(with_adapters(model, weights, some, x), expected, atol=1e-5, rtol=1e-5)


def of_adapters(function, weights, adapters, x):
    """Gradients of a sum of `function(weights, adapters, x)` for all three."""
    return jax.jit(jax.grad(lambda *given: jnp.sum(jnp.sin(function(*given))), (0, 1, 2)))(weights, adapters, x)


def test_gradients_of_adapters_are_those_of_all_experts_for_all_tokens(model, weights, adapters, x):
    of_base, *ours = of_adapters(partial(with_adapters, model), weights, adapters, x)
    with jax.enable_x64(True):
        exact = jax.tree.map(lambda w: w.astype(np.float64), (weights, adapters, x))
        whole, *expected = of_adapters(lambda w, a, x: dense(model, summed(w, a), x), *exact)
    assert expected[1].dtype == np.float64
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-4, rtol=1e-4), ours, expected)
    np.testing.assert_allclose(of_base["router"]["kernel"], whole["router"]["kernel"], atol=1e-4, rtol=1e-4)
    assert all(not np.any(of_base[name]["kernel"]) for name in adapters), "the experts themselves are frozen"


@pytest.mark.parametrize("bits", [None, "nf4"])
def test_a_mesh_changes_nothing_for_adapters(model, weights, adapters, x, bits):
    mesh = sharding.make_mesh(config.Mesh(data=2, fsdp=2, tensor=2))
    base = jax.tree.map(lambda w: jnp.asarray(w)[None], weights)
    if bits:
        base = lora.pack({"layers": {"experts": base}}, bits, double=True)["layers"]["experts"]
    stacked = {"layers": {"experts": base}, "lora": {"layers": {"experts": jax.tree.map(lambda w: w[None], adapters)}}}
    places = sharding.shardings(stacked, mesh)
    split = places["lora"]["layers"]["experts"]
    assert {"fsdp", "tensor"} <= set(split["gate"]["b"].spec) & set(split["down"]["a"].spec)
    placed = jax.tree.map(lambda w, place: jax.device_put(w, place)[0], stacked, places)
    rows = jax.device_put(x, jax.sharding.NamedSharding(mesh, sharding.ROWS))
    results = []
    for on, tree, tokens in ((None, jax.tree.map(lambda w: w[0], stacked), x), (mesh, placed, rows)):
        function = partial(with_adapters, dataclasses.replace(model, mesh=on), tree["layers"]["experts"])
        loss = jax.jit(jax.value_and_grad(lambda a, x, run=function: jnp.sum(jnp.sin(run(a, x))), (0, 1)))
        results.append(loss(tree["lora"]["layers"]["experts"], tokens))
    jax.tree.map(partial(np.testing.assert_allclose, atol=2e-4, rtol=2e-4), *results)


def test_the_copy_that_samples_has_the_adapters_of_the_experts(model, big_weights, padded):
    """Merged, and decoded token by token, where a few rows take few blocks."""
    adapted = dataclasses.replace(model, adapters=ADAPTERS)
    params = big_weights(adapted)
    params["layers"]["experts"] = jax.tree.map(lambda w: w / 2, params["layers"]["experts"])
    modules = [("attention", "q"), ("experts", "gate"), ("experts", "up"), ("experts", "down")]
    added = lora.init(adapted, params, modules, jax.random.key(1), magnitudes=False)
    generator = np.random.default_rng(3)
    added = jax.tree.map(lambda x: x + generator.normal(0, 0.2, x.shape).astype(np.float32), added)
    tokens, mask = padded([np.arange(1, 7), np.arange(3, 6)], "left", 7)
    forward = jax.jit(models.forward, static_argnums=1)
    whole = forward({**params, **added}, adapted, tokens, mask)
    assert np.abs(forward(params, model, tokens, mask) - whole)[np.asarray(mask)].max() > 1e-2
    inference, copy = inference_copy(adapted, {**params, **added}, "float32")
    cache = models.empty_cache(inference, 2, 7)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    step = jax.jit(models.forward_cached, static_argnums=1)
    first, cache = step(copy, inference, tokens[:, :6], mask[:, :6], positions[:, :6], cache, 0)
    last, _ = step(copy, inference, tokens[:, 6:], mask[:, 6:], positions[:, 6:], cache, 6)
    found, real = np.concatenate([first, last], axis=1), np.asarray(mask)
    np.testing.assert_allclose(found[real], np.asarray(whole)[real], atol=1e-4, rtol=1e-4)

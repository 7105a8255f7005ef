import dataclasses
from functools import partial

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import models, sharding
from jaxrlhf.config import Mesh
from jaxrlhf.models import Rope

quick = partial(jax.jit, compiler_options={"xla_backend_optimization_level": 0})  # halves the time of compilation
forward = quick(models.forward, static_argnums=1)
forward_cached = quick(models.forward_cached, static_argnums=1)
init = quick(models.init, static_argnums=(0, 2))


def mixed(make, **changes):
    """One sliding layer among full ones."""
    return make(sliding_window=3, sliding_layers=(False, True), **changes)


def absolute(make, **changes):
    """GPT-2's kind: learned positions, LayerNorm, biases, no gate."""
    parts = {"norm": "layernorm", "activation": "gelu_tanh", "gated_mlp": False, "rope": None, "qk_norm": False}
    biases = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
    return make(family="gpt2", num_kv_heads=4, head_dim=4, **parts, **biases, **changes)


def ropes(make, **changes):
    """What Gemma, OLMo, SmolLM3 and Granite have: two rotations and a layer without, norms on both sides, caps."""
    scales = {"embedding_multiplier": 2.0, "residual_multiplier": 0.7, "logits_divisor": 1.5}
    caps = {"attention_softcap": 5.0, "logits_softcap": 20.0}
    norms = {"norm": "rmsnorm_1p", "norm_placement": "both", "qk_norm_over": "all_heads"}
    layers = {"sliding_layers": (True, False, False), "rope_layers": (True, True, False), "num_layers": 3}
    return make(sliding_window=3, sliding_rope=Rope(theta=5.0), **layers, **norms, **caps, **scales, **changes)


def recurrent(make, **changes):
    """A delta net before each gated attention, as in Qwen 3.5."""
    net = models.DeltaNet(layers=(True, False) * 2, key_heads=2, value_heads=4, key_size=6, value_size=5, conv_width=3)
    return make(num_layers=4, delta=net, attention_gate=True, **changes)


@pytest.fixture(params=[mixed, absolute, ropes, recurrent])
def model(request, make):
    return request.param(make)


def dots(function, *arguments):
    """Operand dtypes and result dtype of every matrix product of the traced function, inner programs included."""
    found = []

    def walk(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "dot_general":
                found.append(tuple(str(v.aval.dtype) for v in (*equation.invars, *equation.outvars)))
            for value in equation.params.values():
                for inner in value if isinstance(value, tuple | list) else (value,):
                    if hasattr(inner, "eqns"):
                        walk(inner)
                    elif hasattr(getattr(inner, "jaxpr", None), "eqns"):
                        walk(inner.jaxpr)

    walk(jax.make_jaxpr(function)(*arguments).jaxpr)
    return found


def loss_of(model, tokens, mask):
    def loss(params):
        return jnp.square(models.lm_logits(params, model, models.forward(params, model, tokens, mask))).mean()

    return loss


def test_parameters_are_as_documented(make, key):
    model = make(tie_embeddings=False, qkv_bias=True)
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(partial(models.init, model), key))
    assert shapes == {
        "embed": {"embedding": (32, 16)},
        "layers": {
            "attention_norm": {"scale": (2, 16)},
            "attention": {
                "q": {"kernel": (2, 16, 24), "bias": (2, 24)},
                "k": {"kernel": (2, 16, 12), "bias": (2, 12)},
                "v": {"kernel": (2, 16, 12), "bias": (2, 12)},
                "o": {"kernel": (2, 24, 16)},
                "q_norm": {"scale": (2, 6)},
                "k_norm": {"scale": (2, 6)},
            },
            "mlp_norm": {"scale": (2, 16)},
            "mlp": {"gate": {"kernel": (2, 16, 20)}, "up": {"kernel": (2, 16, 20)}, "down": {"kernel": (2, 20, 16)}},
        },
        "norm": {"scale": (16,)},
        "lm_head": {"kernel": (16, 32)},
    }
    gpt2 = jax.eval_shape(partial(models.init, absolute(make), dtype="bfloat16"), key)
    assert gpt2["positions"]["embedding"].shape == (64, 16)
    assert set(gpt2["layers"]["mlp"]) == {"up", "down"} and gpt2["norm"]["bias"].shape == (16,)
    assert {leaf.dtype for leaf in jax.tree.leaves(gpt2)} == {jnp.dtype("bfloat16")}


def test_fresh_kernels_differ_and_have_the_stated_scale(make, key):
    params = init(make(hidden_size=64, mlp_size=64), key, "float32")
    up = params["layers"]["mlp"]["up"]["kernel"]
    assert not jnp.array_equal(up[0], up[1])
    for kernel in (up, params["layers"]["mlp"]["down"]["kernel"], params["embed"]["embedding"]):
        assert jnp.std(kernel) == pytest.approx(0.02, rel=0.1)
    assert jnp.all(params["layers"]["mlp_norm"]["scale"] == 1)


def test_no_gradient_from_the_future_or_from_beyond_the_window(make, big_weights):
    # every token occurs once, so the gradient by embedding row is the gradient by position
    tokens, mask = jnp.arange(8, dtype=jnp.int32)[None], jnp.ones((1, 8), bool)
    at = 5

    def seen(model):
        params = big_weights(model)

        def state(table):
            hidden = models.forward({**params, "embed": {"embedding": table}}, model, tokens, mask)
            return jnp.sum(jnp.sin(hidden[0, at]))  # not constant under the norm

        return (jnp.abs(quick(jax.grad(state))(params["embed"]["embedding"])).max(1)[:8] > 0).tolist()

    assert seen(make()) == [i <= at for i in range(8)]
    sliding = make(num_layers=1, sliding_window=3, sliding_layers=(True,))
    assert seen(sliding) == [at - 3 < i <= at for i in range(8)]


def test_padding_changes_nothing(model, big_weights, padded):
    generator = np.random.default_rng(0)
    rows = [generator.integers(0, 32, length).astype(np.int32) for length in (9, 5, 2)]
    params, found = big_weights(model), []
    for side in ("right", "left"):
        for filler in (0, 31):
            tokens, mask = padded(rows, side, 12)
            found.append(forward(params, model, jnp.where(mask, tokens, filler), mask)[mask])
    alone = [forward(params, model, jnp.asarray(row)[None], jnp.ones((1, len(row)), bool))[0] for row in rows]
    for hidden in found:
        np.testing.assert_allclose(hidden, jnp.concatenate(alone), atol=2e-5)


def test_a_row_without_real_tokens_stays_finite(model, big_weights):
    tokens = jnp.zeros((2, 4), jnp.int32)
    mask = jnp.array([[True] * 4, [False] * 4])
    value, gradient = quick(jax.value_and_grad(loss_of(model, tokens, mask)))(big_weights(model))
    assert jnp.isfinite(value)
    chex.assert_tree_all_finite(gradient)


def test_decoding_with_a_cache_equals_forward(model, big_weights, padded):
    generator = np.random.default_rng(1)
    params = big_weights(model)
    tokens, mask = padded([generator.integers(0, 32, length).astype(np.int32) for length in (10, 7)], "left", 11)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)
    cache = models.empty_cache(model, 2, 16)
    # what lies in slots that nobody wrote must not matter
    cache = dataclasses.replace(cache, k=tuple(k + 1e3 for k in cache.k), v=tuple(v + 1e3 for v in cache.v))
    unstacked, found = models.unstack(params, model), []
    pieces = (0, 4), (4, 8), (8, 9), (9, 10), (10, 11)
    for start, stop in pieces:
        at = slice(start, stop)
        inputs = tokens[:, at], mask[:, at], positions[:, at]
        hidden, cache = forward_cached(unstacked, model, *inputs, cache, start)
        found.append(hidden)
    whole = forward(params, model, tokens, mask)
    np.testing.assert_allclose(jnp.concatenate(found, axis=1)[mask], whole[mask], atol=2e-5)
    if model.delta is not None:  # the real tokens of a piece come first
        mask = jnp.concatenate([jnp.sort(mask[:, slice(*piece)], descending=True) for piece in pieces], axis=1)
    assert jnp.array_equal(cache.valid[:, :11], mask) and not cache.valid[:, 11:].any()


def test_decoding_is_traced_once(make, big_weights):
    model = dataclasses.replace(mixed(make), dtype="bfloat16")
    step = jax.jit(chex.assert_max_traces(models.forward_cached, n=1), static_argnums=1)
    unstacked, cache = models.unstack(big_weights(model), model), models.empty_cache(model, 1, 6)
    for slot in range(6):
        one = jnp.full((1, 1), slot, jnp.int32)
        _, cache = step(unstacked, model, one, jnp.ones((1, 1), bool), one, cache, slot)
    assert cache.k[0].dtype == jnp.bfloat16


def test_packed_sequences_do_not_see_each_other(model, big_weights):
    generator = np.random.default_rng(2)
    params, tokens = big_weights(model), jnp.asarray(generator.integers(0, 32, (1, 9)), jnp.int32)
    lengths = (4, 5)
    segments = jnp.repeat(jnp.arange(2), jnp.array(lengths))[None]
    positions = jnp.concatenate([jnp.arange(n, dtype=jnp.int32) for n in lengths])[None]
    packed = forward(params, model, tokens, jnp.ones((1, 9), bool), positions, segments)
    apart = [forward(params, model, part, jnp.ones_like(part, bool)) for part in (tokens[:, :4], tokens[:, 4:])]
    np.testing.assert_allclose(packed, jnp.concatenate(apart, axis=1), atol=2e-5)


def test_gradients_on_a_mesh_are_those_of_one_device(make, big_weights):
    """Norms over all heads of q and k too, which `tensor` splits."""
    model, mesh = ropes(make), sharding.make_mesh(Mesh(data=2, fsdp=2, tensor=2))
    params = jax.tree.map(lambda leaf: 0.5 * leaf, big_weights(model))
    tokens, mask = jnp.arange(24, dtype=jnp.int32).reshape(4, 6), jnp.ones((4, 6), bool)
    expected = quick(jax.grad(loss_of(model, tokens, mask)))(params)
    on_mesh = dataclasses.replace(model, mesh=mesh)
    tokens, mask = sharding.put_rows((tokens, mask), mesh)
    sharded = jax.device_put(params, sharding.shardings(params, mesh))
    found = quick(jax.grad(loss_of(on_mesh, tokens, mask)))(sharded)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5 * np.abs(b).max()), found, expected)


def test_rematerialisation_changes_memory_and_nothing_else(make, big_weights):
    tokens, mask = jnp.arange(12, dtype=jnp.int32).reshape(2, 6), jnp.ones((2, 6), bool)
    results, products = {}, {}
    for remat in ("none", "dots", "full"):
        model = mixed(make, remat=remat)
        params, function = big_weights(model), jax.value_and_grad(loss_of(model, tokens, mask))
        results[remat], products[remat] = quick(function)(params), len(dots(function, params))
    # a layer has seven products with weights and two of attention; each has two more in the gradient
    assert products["none"] == 9 * 3 + 3
    assert products["dots"] == products["none"] + 2  # those of attention again
    assert products["full"] == products["none"] + 8  # all again but the last, whose result no gradient needs
    for remat in ("dots", "full"):
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5, rtol=1e-4), *map(results.get, (remat, "none"))
        )


def test_the_program_does_not_grow_with_depth(make):
    def size(layers):
        model = make(num_layers=layers)
        params = jax.eval_shape(lambda key: models.init(model, key), jax.random.key(0))
        tokens, mask = jnp.zeros((1, 4), jnp.int32), jnp.ones((1, 4), bool)
        return len(dots(jax.grad(loss_of(model, tokens, mask)), params))

    assert size(2) == size(5)


def test_bfloat16_is_close_and_runs_through_every_product(model, big_weights):
    rough = dataclasses.replace(model, dtype="bfloat16")
    params = jax.tree.map(lambda leaf: 0.5 * leaf, big_weights(model))
    tokens, mask = jnp.arange(12, dtype=jnp.int32).reshape(2, 6), jnp.ones((2, 6), bool)
    exact = quick(jax.grad(loss_of(model, tokens, mask)))(params)
    close = quick(jax.grad(loss_of(rough, tokens, mask)))(params)
    for a, b in zip(jax.tree.leaves(exact), jax.tree.leaves(close), strict=True):
        assert b.dtype == jnp.float32
        assert jnp.linalg.norm(a - b) <= 0.05 * jnp.linalg.norm(a) + 1e-4
    kinds = {("bfloat16", "bfloat16", "float32")} | ({("float32",) * 3} if model.delta else set())  # those of states
    assert set(dots(jax.grad(loss_of(rough, tokens, mask)), params)) == kinds
    assert jax.eval_shape(lambda p: models.forward(p, rough, tokens, mask), params).dtype == jnp.float32


@pytest.mark.parametrize(("kind", "changes"), [(ropes, {}), (recurrent, {"norm": "rmsnorm_1p"})])
def test_gradients_of_parameters_stored_in_bfloat16_are_rounded_once(make, big_weights, kind, changes):
    """Those of norms of 1 + scale, of decay rates and of convolutions too: all are computed with in float32."""
    model = kind(make, dtype="bfloat16", tie_embeddings=False, **changes)
    stored = jax.tree.map(lambda leaf: (0.5 * leaf).astype("bfloat16"), big_weights(model))
    exact = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), stored)
    tokens, mask = jnp.arange(24, dtype=jnp.int32).reshape(2, 12), jnp.ones((2, 12), bool)
    run = quick(jax.value_and_grad(loss_of(model, tokens, mask)))
    (value, found), (expected_value, expected) = run(stored), run(exact)
    assert float(value) == pytest.approx(float(expected_value), rel=1e-6)
    for ours, theirs in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert ours.dtype == jnp.bfloat16
        rounding = 2**-8 * np.abs(theirs) + 1e-4 * np.abs(theirs).max()
        assert np.all(np.abs(ours.astype(jnp.float32) - theirs) <= rounding)


def test_grouped_heads_are_repeated_heads(make, big_weights):
    grouped, full = make(), make(num_kv_heads=4)
    params = big_weights(grouped)

    def repeated(kernel):
        layers, width, _ = kernel.shape
        return jnp.repeat(kernel.reshape(layers, width, 2, 6), 2, axis=2).reshape(layers, width, 24)

    attention = params["layers"]["attention"]
    wide = attention | {name: {"kernel": repeated(attention[name]["kernel"])} for name in "kv"}
    tokens, mask = jnp.arange(6, dtype=jnp.int32)[None], jnp.ones((1, 6), bool)
    expected = forward(params, grouped, tokens, mask)
    found = forward({**params, "layers": {**params["layers"], "attention": wide}}, full, tokens, mask)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_the_multiplier_of_the_embedding_is_rounded_like_the_embedding(make, big_weights):
    model = make(embedding_multiplier=1152**0.5, dtype="bfloat16")
    params, tokens = big_weights(model), jnp.arange(6)[None]
    found = models.transformer._embed(params, model, tokens, tokens)
    table = np.asarray(params["embed"]["embedding"].astype(jnp.bfloat16).astype(jnp.float32))
    np.testing.assert_array_equal(found[0], 34 * table[:6])  # 33.94 in float32


def test_a_window_as_long_as_the_sequence_is_no_window(make, big_weights):
    tokens, mask = jnp.arange(6, dtype=jnp.int32)[None], jnp.ones((1, 6), bool)
    plain = make()
    wide = make(sliding_window=6, sliding_layers=(True, True))
    params = big_weights(plain)
    np.testing.assert_array_equal(forward(params, wide, tokens, mask), forward(params, plain, tokens, mask))


@pytest.mark.parametrize(
    "changes",
    [
        {"num_kv_heads": 3},
        {"sliding_layers": (False,)},
        {"rope_layers": (True,)},
        {"head_dim": 5, "rope": Rope(theta=10.0)},
    ],
)
def test_inconsistent_configs_are_refused(make, changes):
    with pytest.raises(ValueError, match=next(iter(changes))):
        make(**changes)

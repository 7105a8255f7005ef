import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import Rope, for_length, layers
from jaxrlhf.models.product import product
from jaxrlhf.models.rope import rope_frequencies, rotate, rotate_queries, rotation


def normal(*shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize(
    ("subscripts", "a", "b"), [("bti,io->bto", (2, 3, 4), (4, 5)), ("btkgh,bskh->bkgts", (2, 3, 2, 2, 4), (2, 5, 2, 4))]
)
def test_gradient_of_a_product(subscripts, a, b):
    a, b = normal(*a), normal(*b, seed=1)
    ours = jax.grad(lambda a, b: jnp.sin(product(subscripts, a, b, "float32")).sum(), (0, 1))(a, b)
    plain = jax.grad(lambda a, b: jnp.sin(jnp.einsum(subscripts, a, b)).sum(), (0, 1))(a, b)
    for found, expected in zip(ours, plain, strict=True):
        np.testing.assert_allclose(found, expected, atol=1e-5)


def test_gradient_of_a_stored_weight_keeps_its_precision():
    x, w = normal(2, 3, 4), normal(4, 5, seed=1)
    ours = jax.grad(lambda w: product("bti,io->bto", x, w, "bfloat16").sum())
    assert ours(w).dtype == jnp.float32 and ours(w.astype("bfloat16")).dtype == jnp.bfloat16
    # float32 sums of bfloat16 numbers: not themselves rounded to bfloat16
    expected = x.astype("bfloat16").astype(jnp.float32).sum((0, 1))
    np.testing.assert_allclose(ours(w)[:, 0], expected, rtol=1e-6)


def test_rotation_keeps_lengths_and_sees_distances_only(make):
    model = make(head_dim=6)
    q, k = normal(1, 1, 1, 6), normal(1, 1, 1, 6, seed=1)

    def product(at_q, at_k):
        turned = [rotate(x, rotation(model, jnp.full((1, 1), p))) for x, p in ((q, at_q), (k, at_k))]
        np.testing.assert_allclose(jnp.linalg.norm(turned[0]), jnp.linalg.norm(q), rtol=1e-5)
        return float(jnp.sum(turned[0] * turned[1]))

    assert product(9, 4) == pytest.approx(product(25, 20), abs=1e-4)
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-2)
    assert product(7, 7) == pytest.approx(float(jnp.sum(q * k)), abs=1e-4)


def test_frequencies_by_the_formula():
    plain, scale = rope_frequencies(Rope(theta=1e4), 8)
    np.testing.assert_allclose(plain, [1e4 ** (-2 * i / 8) for i in range(4)], rtol=1e-6)
    assert scale == 1
    linear, _ = rope_frequencies(Rope(theta=1e4, kind="linear", factor=4.0), 8)
    np.testing.assert_allclose(linear, plain / 4, rtol=1e-6)


def test_llama3_stretches_long_waves_only():
    rope = Rope(theta=5e5, kind="llama3", factor=8.0, original_max_positions=8192, high_freq_factor=4.0)
    stretched, _ = rope_frequencies(rope, 128)
    plain, _ = rope_frequencies(Rope(theta=5e5), 128)
    lengths = 2 * math.pi / plain
    np.testing.assert_allclose(stretched[lengths < 8192 / 4], plain[lengths < 8192 / 4], rtol=1e-6)
    np.testing.assert_allclose(stretched[lengths > 8192], plain[lengths > 8192] / 8, rtol=1e-6)
    between = (lengths > 8192 / 4) & (lengths < 8192)
    assert between.sum() >= 3 and np.all(np.diff((plain / stretched)[between]) > 0)


def test_yarn_turns_fast_planes_as_before_and_slow_ones_less():
    rope = Rope(theta=1e4, kind="yarn", factor=4.0, original_max_positions=2048)
    stretched, scale = rope_frequencies(rope, 128)
    plain, _ = rope_frequencies(Rope(theta=1e4), 128)
    turns = 2048 * plain / (2 * math.pi)
    np.testing.assert_allclose(stretched[turns > 40], plain[turns > 40], rtol=1e-6)
    np.testing.assert_allclose(stretched[turns < 0.8], plain[turns < 0.8] / 4, rtol=1e-6)
    assert scale == pytest.approx(0.1 * math.log(4) + 1)


def test_longrope_divides_every_frequency_by_a_factor_of_its_own():
    lists = {"short_factor": (1.0, 1.5, 2.0, 2.5), "long_factor": (2.0, 3.0, 4.0, 5.0)}
    rope = Rope(theta=1e4, kind="longrope", factor=32.0, original_max_positions=4096, **lists)
    plain = 1e4 ** (-np.arange(4) / 4)
    for length, factors in ((None, "short_factor"), (4096, "short_factor"), (4097, "long_factor")):
        found, scale = rope_frequencies(dataclasses.replace(rope, length=length), 8)
        np.testing.assert_allclose(found, plain / lists[factors], rtol=1e-6)
        assert scale == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))  # 1.19, as for Phi-3 of 128k


def test_dynamic_scaling_raises_theta_with_the_length():
    rope = Rope(theta=1e4, kind="dynamic", factor=4.0, original_max_positions=64)
    for length, theta in ((None, 1e4), (30, 1e4), (64, 1e4), (100, 1e4 * (4 * 100 / 64 - 3) ** (8 / 6))):
        found, scale = rope_frequencies(dataclasses.replace(rope, length=length), 8)
        np.testing.assert_allclose(found, theta ** (-np.arange(4) / 4), rtol=1e-6)
        assert scale == 1


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_each_row_turns_for_its_own_length_unless_one_is_fixed(make, kind):
    lists = {"short_factor": (1.0, 1.5, 2.0), "long_factor": (2.0, 3.0, 4.0)} if kind == "longrope" else {}
    rope = Rope(theta=100.0, kind=kind, factor=4.0, original_max_positions=16, **lists)
    model = make(head_dim=6, rope=rope)
    positions = jnp.stack([jnp.minimum(jnp.arange(40), longest) for longest in (39, 15, 20)])
    together = rotation(model, positions)
    for row, length in enumerate((40, 16, 21)):
        alone = rotation(for_length(model, length), positions[row : row + 1])
        np.testing.assert_allclose(together.cos[row], alone.cos[0], atol=1e-5)
        np.testing.assert_allclose(together.sin[row], alone.sin[0], atol=1e-5)
    fixed = rotation(for_length(model, 40), positions)
    np.testing.assert_array_equal(fixed.cos[1, :16], fixed.cos[0, :16])
    assert np.abs(fixed.cos[1] - together.cos[1]).max() > 0.1


def test_partial_rotation_leaves_the_other_components(make):
    model = make(head_dim=8, rope=Rope(theta=100.0, partial_rotary_factor=0.5))
    x, positions = normal(1, 3, 2, 8), jnp.array([[0, 5, 9]])
    found = rotate(x, rotation(model, positions))
    np.testing.assert_array_equal(found[..., 4:], x[..., 4:])
    whole = make(head_dim=4, rope=Rope(theta=100.0))
    np.testing.assert_array_equal(found[..., :4], rotate(x[..., :4], rotation(whole, positions)))


def test_queries_grow_with_the_position(make):
    model = make(head_dim=6, rope=Rope(theta=100.0, original_max_positions=4, query_scale_beta=0.5))
    plain = make(head_dim=6, rope=Rope(theta=100.0))
    x, positions = normal(1, 4, 2, 6), jnp.array([[0, 3, 4, 11]])
    growth = np.array([1, 1, 1 + 0.5 * math.log(2), 1 + 0.5 * math.log(3)])[None, :, None, None]
    found, turned = rotation(model, positions), rotate(x, rotation(plain, positions))
    np.testing.assert_allclose(rotate_queries(x, found), growth * turned, rtol=1e-5)
    np.testing.assert_array_equal(rotate(x, found), turned)


@pytest.mark.parametrize(
    ("name", "formula"),
    [
        ("quick_gelu", lambda x: x / (1 + np.exp(-1.702 * x))),
        ("relu2", lambda x: np.where(x > 0, x * x, 0)),
        ("tanh", np.tanh),
        ("gelu", lambda x: x * np.array([0.5 * (1 + math.erf(v / math.sqrt(2))) for v in x])),
        ("gelu_tanh", lambda x: 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))),
    ],
)
def test_activations_by_the_formula(name, formula):
    x = np.linspace(-4, 4, 33)
    np.testing.assert_allclose(layers.ACTIVATIONS[name](jnp.asarray(x, jnp.float32)), formula(x), atol=1e-6)


@pytest.mark.parametrize("kind", ["rmsnorm", "rmsnorm_1p", "layernorm"])
def test_norms_by_the_formula(kind):
    x, scale, bias = normal(2, 3, 8) * 5 + 2, normal(8, seed=1), normal(8, seed=2)
    params = {"scale": scale} | ({"bias": bias} if kind == "layernorm" else {})
    norm = layers.Norm(kind, 1e-2)
    found = norm.apply({"params": params}, x)
    stored = {name: array.astype(jnp.bfloat16) for name, array in params.items()}  # computed with in float32
    exact = {name: array.astype(jnp.float32) for name, array in stored.items()}
    np.testing.assert_array_equal(norm.apply({"params": stored}, x), norm.apply({"params": exact}, x))
    x, scale, bias = (np.asarray(array) for array in (x, scale, bias))
    if kind == "layernorm":
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2) * scale + bias
    else:
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * (1 + scale if kind == "rmsnorm_1p" else scale)
    np.testing.assert_allclose(found, expected, atol=1e-5)

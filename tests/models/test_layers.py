import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.models import Rope, layers
from jaxrlhf.models.product import product
from jaxrlhf.models.rope import rope_frequencies, rotate, rotation


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


@pytest.mark.parametrize("kind", ["rmsnorm", "layernorm"])
def test_norms_by_the_formula(kind):
    x, scale, bias = normal(2, 3, 8) * 5 + 2, normal(8, seed=1), normal(8, seed=2)
    params = {"scale": scale} | ({"bias": bias} if kind == "layernorm" else {})
    found = layers.Norm(kind, 1e-2).apply({"params": params}, x)
    x, scale, bias = (np.asarray(array) for array in (x, scale, bias))
    if kind == "layernorm":
        expected = (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + 1e-2) * scale + bias
    else:
        expected = x / np.sqrt((x**2).mean(-1, keepdims=True) + 1e-2) * scale
    np.testing.assert_allclose(found, expected, atol=1e-5)

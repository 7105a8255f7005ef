"""Kernels in few bits: the levels are the paper's, what is lost is bounded, and the product is that of what is left."""

import re
import statistics

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import config, sharding
from jaxrlhf.models import packed as m

KINDS = [("int8", False), ("nf4", False), ("nf4", True)]


@pytest.fixture
def kernel(key):
    return 0.02 * jax.random.normal(key, (3, 128, 96))


def test_the_levels_are_those_that_the_paper_derives():
    """Dettmers et al. 2023, eq. 4 and the code it cites: quantiles of N(0, 1) from 1 - (1/32 + 1/30) / 2, eight on one
    side and seven on the other, over the largest, and 0."""
    end = 1 - (1 / 32 + 1 / 30) / 2
    quantile = statistics.NormalDist().inv_cdf
    right = [quantile(p) for p in np.linspace(end, 0.5, 9)[:-1]]
    left = [-quantile(p) for p in np.linspace(end, 0.5, 8)[:-1]]
    levels = np.sort([*right, 0.0, *left]) / max(right)
    np.testing.assert_allclose(m.LEVELS, levels, atol=1e-6)


@pytest.mark.parametrize(("bits", "double"), KINDS)
def test_the_quantisation_error_is_bounded(kernel, bits, double):
    packed = m.pack(kernel, bits, double)
    error = np.abs(np.asarray(m.unpack(packed) - kernel))
    largest = np.abs(np.asarray(kernel))
    if bits == "int8":
        assert np.all(error <= largest.max(axis=1, keepdims=True) / 254 * 1.001)
    else:  # half of the widest gap between levels, of the largest of the block; the scale itself off by a 127th or so
        bound = 0.5 * np.diff(m.LEVELS).max() * largest.reshape(3, 2, 64, 96).max(axis=2, keepdims=True)
        assert np.all(error.reshape(3, 2, 64, 96) <= bound * (1.2 if double else 1.001))
    wanted = {"int8": 8 + 32 / 128, "nf4": 4 + 32 / 64}[bits] if not double else 4 + 8 / 64 + 32 / 96 / 64 + 0.01
    stored = sum(8 * x.size * x.dtype.itemsize for x in jax.tree.leaves(packed))
    assert stored / kernel.size <= wanted + 0.01, "bits for each weight"


def test_weights_on_a_level_come_back_exactly():
    values = np.concatenate([m.LEVELS * 0.5] * 4)  # a block of 64
    kernel = jnp.asarray(np.stack([np.random.default_rng(i).permutation(values) for i in range(8)], axis=1))
    np.testing.assert_allclose(m.unpack(m.pack(kernel, "nf4", False)), kernel, rtol=1e-6)


@pytest.mark.parametrize(("bits", "double"), KINDS)
@pytest.mark.parametrize("tile", [m.TILE, 128 * 8])
def test_the_product_and_its_gradient_are_those_of_the_unpacked_kernel(kernel, key, bits, double, tile, monkeypatch):
    monkeypatch.setattr(m, "TILE", tile)
    packed = m.pack(kernel[0], bits, double)
    x = jax.random.normal(key, (2, 5, 128))

    def ours(x):
        return m.packed_product(x, packed, "float32")

    def plain(x):
        return jnp.einsum("bti,io->bto", x, m.unpack(packed), precision="highest")

    assert m._tiles(packed, m.SHARES) == (1 if tile == m.TILE and tile > 10**5 else 12)
    np.testing.assert_allclose(ours(x), plain(x), rtol=1e-5, atol=1e-6)
    weight = jax.random.normal(jax.random.fold_in(key, 1), (2, 5, 96))
    grads = [jax.grad(lambda x, f=f: jnp.sum(f(x) * weight))(x) for f in (ours, plain)]
    np.testing.assert_allclose(*grads, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("bits", "double", "shares"), [(*kind, m.SHARES) for kind in KINDS] + [("nf4", True, 1)])
def test_every_device_multiplies_its_own_share_of_every_tile(kernel, key, bits, double, shares, monkeypatch):
    monkeypatch.setattr(m, "TILE", 128 * 8)
    monkeypatch.setattr(m, "SHARES", shares)  # fewer than the devices of `tensor`
    mesh = sharding.make_mesh(config.Mesh(fsdp=2, tensor=4))
    x, packed = jax.random.normal(key, (2, 5, 128)), m.pack(kernel, bits, double)
    placed = jax.device_put({"mlp": {"up": packed}}, sharding.shardings({"mlp": {"up": packed}}, mesh))["mlp"]["up"]
    rows, outputs = packed["codes"].shape[1:]
    assert placed["codes"].addressable_shards[0].data.shape == (3, rows // 2, outputs // 4)

    @jax.jit
    def step(x, packed):
        return jax.value_and_grad(lambda x: jnp.sum(jnp.sin(m.packed_product(x, packed, "float32", mesh))))(x)

    first = [jax.tree.map(lambda part: part[1], tree) for tree in (packed, placed)]
    whole, cut = step(x, first[0]), step(sharding.put_whole(x, mesh), first[1])
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), whole, cut)
    program = step.lower(sharding.put_whole(x, mesh), first[1]).compile().as_text()
    assert "all-reduce" in program and not re.search(r"[su]8\[[\d,]+\]\S* all-gather", program), "codes stay"


def test_no_whole_kernel_is_ever_unpacked(key):
    """64 MB in float32 as 8 MB of codes: the program's own memory stays at a few tiles."""
    packed = jax.eval_shape(lambda: m.pack(jnp.zeros((4096, 4096)), "nf4", False))
    x = jax.ShapeDtypeStruct((1, 8, 4096), jnp.float32)
    step = jax.jit(jax.grad(lambda x, packed: jnp.sum(m.packed_product(x, packed, "float32"))))
    memory = step.lower(x, packed).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 40e6, memory.temp_size_in_bytes

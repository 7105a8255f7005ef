"""The gated delta rule against a recurrence in float64."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny

from jaxrlhf import models, sharding
from jaxrlhf.config import Mesh
from jaxrlhf.models import delta

B, T, N, K, V, C, WIDTH = 2, 150, 2, 5, 3, 4, 3
SEGMENTS = np.stack([np.repeat(np.arange(5), [10, 54, 1, 60, 25]), np.repeat(np.arange(3), [64, 64, 22])])


def drawn():
    """q, k, v, log a, b and a first state, in float64."""
    rng = np.random.default_rng(0)
    q, k = (x / np.linalg.norm(x, axis=-1, keepdims=True) for x in rng.normal(size=(2, B, T, N, K)))
    log_a, b = -rng.exponential(0.1, size=(B, T, N)), rng.uniform(size=(B, T, N))
    return (q, k, rng.normal(size=(B, T, N, V)), log_a, b), rng.normal(size=(B, N, K, V))


def recurrence(inputs, state, starts):
    """Token by token; `starts` [B, T] are tokens before which the state is 0."""
    outputs = []
    for t in range(inputs[0].shape[1]):
        q, k, v, log_a, b = (x[:, t] for x in inputs)
        state = np.where(starts[:, t, None, None, None], 0, state) * np.exp(log_a)[..., None, None]
        u = b[..., None] * (v - np.einsum("bnkv,bnk->bnv", state, k))
        state = state + np.einsum("bnk,bnv->bnkv", k, u)
        outputs.append(np.einsum("bnkv,bnk->bnv", state, q))
    return np.stack(outputs, axis=1), state


def single(*arrays):
    return (jnp.asarray(x, jnp.float32) for x in arrays)


@pytest.mark.parametrize("length", [T, 128, 20])
def test_chunks_are_the_recurrence(length):
    inputs, state = drawn()
    inputs = [x[:, :length] for x in inputs]
    expected, last = recurrence(inputs, state, np.zeros((B, length), bool))
    y, found = jax.jit(delta.chunked)(delta.Inputs(*single(*inputs)), None, *single(state))
    np.testing.assert_allclose(y, expected, atol=3e-6)
    np.testing.assert_allclose(found, last, atol=3e-6)


def test_segments_start_from_nothing():
    inputs, _ = drawn()
    starts = np.diff(SEGMENTS, axis=1, prepend=-1) != 0
    expected, last = recurrence(inputs, np.zeros((B, N, K, V)), starts)
    y, found = jax.jit(delta.chunked)(delta.Inputs(*single(*inputs)), jnp.asarray(SEGMENTS), jnp.zeros((B, N, K, V)))
    np.testing.assert_allclose(y, expected, atol=3e-6)
    np.testing.assert_allclose(found, last, atol=3e-6)


def test_a_step_is_one_of_the_recurrence():
    inputs, state = drawn()
    inputs = [x[:, :1] for x in inputs]
    expected, last = recurrence(inputs, state, np.zeros((B, 1), bool))
    y, found = delta.step(delta.Inputs(*single(*inputs)), *single(state))
    np.testing.assert_allclose(y, expected, atol=1e-6)
    np.testing.assert_allclose(found, last, atol=1e-6)


def test_strong_decay_and_equal_keys_give_finite_results():
    inputs, state = drawn()
    q, k, v, log_a, b = single(*inputs)
    hard = delta.Inputs(q, jnp.broadcast_to(k[:, :1], k.shape), v, 300 * log_a, jnp.ones_like(b))

    def total(inputs):
        y, last = delta.chunked(inputs, jnp.asarray(SEGMENTS), *single(state))
        return jnp.sum(y) + jnp.sum(last)

    value, gradient = jax.jit(jax.value_and_grad(total))(hard)
    assert jnp.isfinite(value) and all(jnp.isfinite(x).all() for x in gradient)


@pytest.mark.parametrize("packed", [False, True])
def test_the_convolution_reads_real_tokens_of_its_segment(packed):
    rng = np.random.default_rng(1)
    x, taps, before = (rng.normal(size=shape) for shape in ((B, T, C), (C, 1, WIDTH), (B, WIDTH - 1, C)))
    real = np.arange(T) < np.array([[T], [7]])
    before = 0 * before if packed else before
    segments = SEGMENTS if packed else np.zeros((B, T), int)
    y, after = delta.convolve(
        *single(x, taps), delta.Tokens(jnp.asarray(real), jnp.asarray(segments) if packed else None), *single(before)
    )
    for row in range(B):
        count = int(real[row].sum())
        whole = np.concatenate([before[row], x[row, :count]])
        belongs = np.concatenate([np.full(WIDTH - 1, segments[row, 0]), segments[row, :count]])
        for t in range(count):
            at = slice(t, t + WIDTH)
            seen = np.where((belongs[at] == segments[row, t])[:, None], whole[at], 0)
            np.testing.assert_allclose(y[row, t], (seen * taps[:, 0].T).sum(0), atol=1e-6)
        np.testing.assert_allclose(after[row], whole[count:], atol=1e-6)


def test_real_tokens_come_first_and_go_back():
    mask = np.array([[0, 1, 0, 1, 1], [1, 1, 0, 0, 0], [0, 0, 0, 0, 0]], bool)
    order, back = delta.aligned(jnp.asarray(mask))
    assert order[0].tolist() == [1, 3, 4, 0, 2]
    np.testing.assert_array_equal(jnp.take_along_axis(order, back, axis=1), np.arange(5)[None].repeat(3, 0))


def test_a_mesh_changes_no_gradient():
    net = models.DeltaNet(layers=(True, False), key_heads=2, value_heads=4, key_size=6, value_size=4, conv_width=4)
    model = tiny(delta=net, attention_gate=True, norm="rmsnorm_1p", norm_eps=1e-2)
    params = models.init(model, jax.random.key(0))
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, 29)
    mask = jnp.arange(9) >= jnp.array([0, 3, 5, 8])[:, None]

    @partial(jax.jit, static_argnums=1)
    def gradient(params, model):
        def loss(params):
            logits = models.lm_logits(params, model, models.forward(params, model, tokens, mask))
            return jnp.where(mask, jnp.square(logits).sum(-1), 0).sum()

        return jax.grad(loss)(params)

    mesh = sharding.make_mesh(Mesh(fsdp=2, tensor=2))
    placed = sharding.place(jax.device_get(params), sharding.shardings(params, mesh))
    assert not placed["layers"]["delta"]["qkv"]["kernel"].sharding.is_fully_replicated
    expected, found = gradient(params, model), gradient(placed, dataclasses.replace(model, mesh=mesh))
    largest = max(float(jnp.abs(x).max()) for x in jax.tree.leaves(expected))
    jax.tree.map(partial(np.testing.assert_allclose, atol=1e-5 * largest, rtol=1e-4), found, expected)

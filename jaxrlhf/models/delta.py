"""The gated delta rule (https://arxiv.org/abs/2412.06464): attention with a state of fixed size in place of a cache.

A head has a state S [key, value], in which every token decays what is there and corrects what its key reads:

    S_t = a_t S_(t-1) + k_t u_t',   u_t = b_t (v_t - a_t S_(t-1)' k_t),   y_t = S_t' q_t

with a_t in (0, 1) and b_t in (0, 1). Everything here is float32. Rows are right-padded (`aligned`), so that a token's
predecessors are in the columns before it; at padding, a = 1 and b = 0 leave the state as it is.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

CHUNK = 64
"""Tokens that are computed as matrix products; between chunks the state is carried."""
DeltaState = tuple[Float[Array, "B W C"], Float[Array, "B N K V"]]
"""Cache of one layer for a row: the last inputs of the convolution, and the recurrent state of every head."""


class Tokens(NamedTuple):
    """The real tokens of right-padded rows, and of packed rows the segment of each token."""

    real: Bool[Array, "B T"]
    segments: Int[Array, "B T"] | None


class Inputs(NamedTuple):
    """Queries and keys of unit length, values, log a and b of every token and head."""

    q: Float[Array, "B T N K"]
    k: Float[Array, "B T N K"]
    v: Float[Array, "B T N V"]
    log_a: Float[Array, "B T N"]
    b: Float[Array, "B T N"]


def aligned(mask: Bool[Array, "B T"]) -> tuple[Int[Array, "B T"], Int[Array, "B T"]]:
    """(columns of the real tokens in order, then those of the padding; the inverse permutation)."""
    order = jnp.argsort(~mask, axis=1, stable=True)
    return order, jnp.argsort(order, axis=1)


def unit(x: Float[Array, "*lead K"]) -> Float[Array, "*lead K"]:
    """x / |x|, with 1e-6 added to the square of the norm."""
    return x * jax.lax.rsqrt(jnp.sum(x * x, axis=-1, keepdims=True) + 1e-6)


def convolve(
    x: Float[Array, "B T C"], taps: Float[Array, "C 1 W1"], tokens: Tokens, before: Float[Array, "B W C"]
) -> tuple[Float[Array, "B T C"], Float[Array, "B W C"]]:
    """Causal convolution of every channel with its taps, the last of which is that of the token itself.

    `before` are the inputs of the W tokens before the first. Returns also those before the next token. The first tokens
    of a segment have zeros before them.
    """
    length, width = x.shape[1], taps.shape[-1] - 1
    inputs = jnp.concatenate([before, jnp.where(tokens.real[..., None], x, 0)], axis=1)
    y = x * taps[:, 0, width]
    for tap in range(width):
        earlier = inputs[:, tap : tap + length]
        if tokens.segments is not None:
            shift = width - tap
            padded = jnp.pad(tokens.segments, ((0, 0), (shift, 0)), constant_values=-1)[:, :length]
            earlier = jnp.where((padded == tokens.segments)[..., None], earlier, 0)
        y = y + earlier * taps[:, 0, tap]
    count = jnp.sum(tokens.real, axis=1)[:, None] + jnp.arange(width)
    return y, jnp.take_along_axis(inputs, count[..., None], axis=1)


def step(inputs: Inputs, state: Float[Array, "B N K V"]) -> tuple[Float[Array, "B 1 N V"], Float[Array, "B N K V"]]:
    """The rule for one token."""
    q, k, v, log_a, b = (x[:, 0] for x in inputs)
    state = state * jnp.exp(log_a)[..., None, None]
    u = b[..., None] * (v - jnp.sum(state * k[..., None], axis=-2))
    state = state + k[..., None] * u[..., None, :]
    return jnp.sum(state * q[..., None], axis=-2)[:, None], state


def chunked(
    inputs: Inputs, segments: Int[Array, "B T"] | None, state: Float[Array, "B N K V"]
) -> tuple[Float[Array, "B T N V"], Float[Array, "B N K V"]]:
    """The rule for whole sequences (https://arxiv.org/abs/2406.06484, section 3): outputs, and the state at the end.

    With G_i the sum of log a up to token i of a chunk, and A_ij = b_i exp(G_i - G_j) k_i'k_j for j < i, the corrections
    of the chunk are (1 + A) U = b V - (b exp(G) K) S. A segment starts from a state of 0.
    """
    length, size = inputs.q.shape[1], min(CHUNK, inputs.q.shape[1])
    count = -(-length // size)

    def split(x: Array) -> Array:
        """[count, B, N, size, ...], the last chunk padded with zeros."""
        x = jnp.pad(x, [(0, 0), (0, count * size - length), *[(0, 0)] * (x.ndim - 2)])
        x = x.reshape(x.shape[0], count, size, *x.shape[2:])
        return jnp.moveaxis(jnp.moveaxis(x, 1, 0), 3, 2)

    q, k, v, log_a, b = map(split, inputs)
    until = jnp.cumsum(log_a, axis=-1)
    lower = jnp.tril(jnp.ones((size, size), bool))
    carried, kept = jnp.exp(until), jnp.exp(until[..., -1:] - until)
    whole = jnp.exp(until[..., -1])
    if segments is not None:
        padded = jnp.pad(segments, ((0, 0), (0, count * size - length)), mode="edge")
        segment = jnp.moveaxis(padded.reshape(-1, count, size), 1, 0)[:, :, None]  # [count, B, 1, size]
        lower = lower & (segment[..., :, None] == segment[..., None, :])
        last = segment[..., -1:]
        before = jnp.concatenate([segment[:1, ..., :1], last[:-1]])
        carried = jnp.where(segment == before, carried, 0)
        kept = jnp.where(segment == last, kept, 0)
        whole = jnp.where((last == before)[..., 0], whole, 0)
    decay = jnp.where(lower, jnp.exp(jnp.where(lower, until[..., :, None] - until[..., None, :], 0)), 0)
    system = b[..., None] * decay * _product("...ik,...jk->...ij", k, k)  # its diagonal is not read
    sides = jnp.concatenate([b[..., None] * v, (b * carried)[..., None] * k], axis=-1)
    solved = jax.lax.linalg.triangular_solve(system, sides, left_side=True, lower=True, unit_diagonal=True)
    u_values, u_keys = solved[..., : v.shape[-1]], solved[..., v.shape[-1] :]
    within = decay * _product("...ik,...jk->...ij", q, k)

    def chunk(state: Array, parts: tuple[Array, ...]) -> tuple[Array, Array]:
        u_values, u_keys, q, k, within, whole = parts
        u = u_values - _product("...ik,...kv->...iv", u_keys, state)
        y = _product("...ik,...kv->...iv", q, state) + _product("...ij,...jv->...iv", within, u)
        return state * whole[..., None, None] + _product("...ik,...iv->...kv", k, u), y

    parts = u_values, u_keys, q * carried[..., None], k * kept[..., None], within, whole
    state, y = jax.lax.scan(chunk, state, parts)
    y = jnp.moveaxis(y, (0, 3), (1, 2))  # [count, B, N, size, V] -> [B, count, size, N, V]
    return y.reshape(y.shape[0], count * size, *y.shape[3:])[:, :length], state


def _product(subscripts: str, x: Array, y: Array) -> Array:
    """Einsum in float32, which GPUs and TPUs would otherwise round."""
    return jnp.einsum(subscripts, x, y, precision="highest")

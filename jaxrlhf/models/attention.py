"""Attention over keys that a mask allows: ours, and cuDNN's kernel for whole sequences on NVIDIA cards."""

import functools
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxrlhf.models.product import product

MASKED = -1e30  # finite, so that a row with nothing to attend to stays finite; float32 and bfloat16 hold it
LARGEST_HEAD = 128  # that cuDNN's kernels take on every card that has them
AGREEMENT = 0.03  # of the largest number: a few roundings to bfloat16's 8 bits


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    dtype: DTypeLike,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention: query heads n*G .. n*G + G - 1 share key head n. `q` is already scaled."""
    batch, length, heads, head_dim = q.shape
    # Products keep the order of their operands' axes, the gradients' too: XLA's bfloat16 code for CPUs knows no other.
    grouped = q.reshape(batch, length, k.shape[1], -1, head_dim).transpose(0, 2, 3, 1, 4)
    logits = product("bkgth,bksh->bkgts", grouped, k, dtype)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, MASKED), axis=-1)
    y = product("bkgts,bksh->bkgth", weights, v, dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def fits_cudnn(q: Float[Array, "B T N H"]) -> bool:
    """Whether cuDNN has kernels, forward and backward, for attention of these shapes under a mask."""
    return q.shape[1] % 2 == 0 and q.shape[3] % 8 == 0 and q.shape[3] <= LARGEST_HEAD


def cudnn_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    dtype: DTypeLike,
    kernel: Literal["cudnn", "xla"] = "cudnn",
) -> Float[Array, "B T N H"]:
    """`attend` in one kernel that never writes the [T, S] weights down; `kernel` is for tests without a card."""
    q, k, v = q.astype(dtype), k.swapaxes(1, 2).astype(dtype), v.swapaxes(1, 2).astype(dtype)
    y = jax.nn.dot_product_attention(q, k, v, mask=mask[:, None], scale=1.0, implementation=kernel)
    return y.astype(jnp.float32)


@functools.cache
def cudnn_trouble(num_heads: int, num_kv_heads: int, head_dim: int) -> str:
    """Why cuDNN's attention is not to be used here: an error, or a result other than `attend`'s; "" if all is well.

    Runs both on one small case with padding, gradients too.
    """
    key, length = jax.random.key(0), 16
    sizes = [(2, length, num_heads, head_dim), *[(2, num_kv_heads, length, head_dim)] * 2]
    q, k, v = (jax.random.normal(jax.random.fold_in(key, i), size) for i, size in enumerate(sizes))
    mask = jnp.tril(jnp.ones((length, length), bool))[None] & (jnp.arange(length) >= jnp.array([[0], [5]]))[:, None]
    if not fits_cudnn(q):
        return f"it has no kernel for heads of {head_dim}; they are multiples of 8 and at most {LARGEST_HEAD}"

    def results(function):
        def total(q, k, v):
            y = jnp.where(mask.any(-1)[:, :, None, None], function(q * head_dim**-0.5, k, v, mask, "bfloat16"), 0)
            return jnp.sum(jnp.sin(y)), y

        (_, y), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return [np.asarray(x) for x in (y, *grads)]

    try:
        for found, wanted in zip(results(cudnn_attend), results(attend), strict=True):
            off = float(np.max(np.abs(found - wanted)) / np.max(np.abs(wanted)))
            if not off <= AGREEMENT:
                return f"its result is off by {off:.1%} of the largest number"
    except Exception as error:  # whatever a driver, a library or a compiler may raise
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""

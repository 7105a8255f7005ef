"""Masked attention: a plain implementation, and cuDNN's fused kernel for whole sequences on NVIDIA GPUs."""

import functools
import math
from functools import partial
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import DTypeLike
from jaxtyping import Array, Bool, Float

from jaxrlhf.models.product import product

MASKED = -1e30  # finite, so that a row without any key stays finite; representable in bfloat16
MAX_HEAD_DIM = 128  # of cuDNN's kernels, on every GPU that has them
TOLERANCE = 0.03  # relative to the largest absolute value: a few bfloat16 roundings


def attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"] | Float[Array, "B K H S"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    dtype: DTypeLike,
    softcap: float | None = None,
    columns_last: bool = False,
) -> Float[Array, "B T N H"]:
    """Grouped-query attention: query heads n*G .. n*G + G - 1 share key head n. `q` is already scaled.
    With `columns_last` k is [B, K, H, S].

    With a `softcap` c the logits x become c tanh(x / c) (https://arxiv.org/abs/2408.00118, section 2).
    """
    batch, length, heads, head_dim = q.shape
    # Axes keep their order in all products and their gradients: XLA's bfloat16 code for CPUs requires it.
    grouped = q.reshape(batch, length, k.shape[1], -1, head_dim).transpose(0, 2, 3, 1, 4)
    keys = "bkhs" if columns_last else "bksh"
    logits = softcapped(product(f"bkgth,{keys}->bkgts", grouped, k, dtype), softcap)
    weights = jax.nn.softmax(jnp.where(mask[:, None, None], logits, MASKED), axis=-1)
    y = product("bkgts,bksh->bkgth", weights, v, dtype)
    return y.transpose(0, 3, 1, 2, 4).reshape(batch, length, heads, head_dim)


def softcapped(x: Float[Array, "..."], cap: float | None) -> Float[Array, "..."]:
    """cap tanh(x / cap); `x` itself if `cap` is None."""
    return x if cap is None else cap * jnp.tanh(x / cap)


def fits_cudnn(q: Float[Array, "B T N H"]) -> bool:
    """True if cuDNN has forward and backward kernels for masked attention of these shapes."""
    return q.shape[1] % 2 == 0 and q.shape[3] % 8 == 0 and q.shape[3] <= MAX_HEAD_DIM


def cudnn_attend(
    q: Float[Array, "B T N H"],
    k: Float[Array, "B K S H"],
    v: Float[Array, "B K S H"],
    mask: Bool[Array, "B T S"],
    dtype: DTypeLike,
    kernel: Literal["cudnn", "xla"] = "cudnn",
    mesh: jax.sharding.Mesh | None = None,
) -> Float[Array, "B T N H"]:
    """`attend` as one fused kernel, which does not store the [T, S] weights; `kernel` is for tests without a GPU.

    On a `mesh` rows are split over all axes but `tensor`, and heads over `tensor` if it divides both numbers of heads:
    the kernel wants one sharding for q, k and v, and jax does not bring them to it.
    """
    q, k, v = q.astype(dtype), k.swapaxes(1, 2).astype(dtype), v.swapaxes(1, 2).astype(dtype)
    mask = mask[:, None]
    if mesh is None:
        place = whole = lambda x: x
    else:
        row_axes = tuple(axis for axis in mesh.axis_names if axis != "tensor")
        rows = row_axes if len(q) % math.prod(mesh.shape[axis] for axis in row_axes) == 0 else None
        heads = "tensor" if q.shape[2] % mesh.shape["tensor"] == k.shape[2] % mesh.shape["tensor"] == 0 else None
        place, whole = (partial(_constrained, mesh, spec) for spec in (P(rows, None, heads), P(rows)))
    q, k, v, mask = place(q), place(k), place(v), whole(mask)
    y = place(jax.nn.dot_product_attention(q, k, v, mask=mask, scale=1.0, implementation=kernel))
    return y.astype(jnp.float32)


def _constrained(mesh: jax.sharding.Mesh, spec: P, x: Array) -> Array:
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, spec))


@functools.cache
def cudnn_trouble(num_heads: int, num_kv_heads: int, head_dim: int, trial: bool = True) -> str:
    """Reason not to use cuDNN's attention here: its error, or how far its results are from `attend`'s; "" if none.

    Compares the outputs and gradients of both on a small case with padding; without a `trial` only the shapes are
    checked.
    """
    key, length = jax.random.key(0), 16
    sizes = [(2, length, num_heads, head_dim), *[(2, num_kv_heads, length, head_dim)] * 2]
    q, k, v = (jax.random.normal(jax.random.fold_in(key, i), size) for i, size in enumerate(sizes))
    mask = jnp.tril(jnp.ones((length, length), bool))[None] & (jnp.arange(length) >= jnp.array([[0], [5]]))[:, None]
    if not fits_cudnn(q):
        return f"it has no kernel for a head_dim of {head_dim}; it must be a multiple of 8 and at most {MAX_HEAD_DIM}"
    if not trial:
        return ""

    def results(function):
        def total(q, k, v):
            y = jnp.where(mask.any(-1)[:, :, None, None], function(q * head_dim**-0.5, k, v, mask, "bfloat16"), 0)
            return jnp.sum(jnp.sin(y)), y

        (_, y), grads = jax.value_and_grad(total, (0, 1, 2), has_aux=True)(q, k, v)
        return [np.asarray(x) for x in (y, *grads)]

    try:
        for actual, expected in zip(results(cudnn_attend), results(attend), strict=True):
            deviation = float(np.max(np.abs(actual - expected)) / np.max(np.abs(expected)))
            if not deviation <= TOLERANCE:
                return f"its result is off by {deviation:.1%} of the largest value"
    except Exception as error:  # of any type: raised by the driver, cuDNN or the compiler
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""

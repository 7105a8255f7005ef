"""Matrix products: in mixed precision, for the forward and the backward pass, and in int8."""

from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float, Int8, Shaped


def product(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Einsum of two operands in `dtype`, accumulated and returned in float32. `subscripts` as for `jnp.einsum`.

    `a` is float32 (an activation), `b` a weight or an activation; every letter of one operand must occur in the other
    or in the result. The gradients are such products too. By default JAX would multiply a float32 cotangent by a
    bfloat16 operand, which is slow on CPUs and accelerators.
    """
    return cast(Array, _product(subscripts, a, b, dtype))


def _contract(subscripts: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    # by default GPUs and TPUs round float32 operands to 10 or 7 bits
    precision = "highest" if jnp.dtype(dtype) == jnp.float32 else None
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


_product = jax.custom_vjp(_contract, nondiff_argnums=(0, 3))


def _product_forward(subscripts, a, b, dtype):
    # b is saved as given: a weight is in memory anyway, so only the activation costs memory
    a = a.astype(dtype)
    return _contract(subscripts, a, b, dtype), (a, b)


def _product_backward(subscripts, dtype, residuals, cotangent):
    a, b = residuals
    operands, result = subscripts.split("->")
    left, right = operands.split(",")
    grad_a = _contract(f"{result},{right}->{left}", cotangent, b, dtype)
    grad_b = _contract(f"{result},{left}->{right}", cotangent, a, dtype)
    return grad_a, grad_b.astype(b.dtype)


_product.defvjp(_product_forward, _product_backward)


FEW = 64
"""Rows up to which `left_product` has the weight on the left. With more, as in prefill, it is as fast on the right, and
the result needs no turning."""


def left_product(x: Float[Array, "*lead I"], kernel: Float[Array, "O I"], dtype: DTypeLike) -> Float[Array, "*lead O"]:
    """x W, for a `kernel` that has W's columns as rows, with the weight as the left operand if x has few rows. For
    inference."""
    rows = x.reshape(-1, x.shape[-1])
    if len(rows) > FEW:
        y = _contract("ri,oi->ro", rows, kernel, dtype)
    else:  # without the barrier XLA would swap the operands
        y = jax.lax.optimization_barrier(_contract("oi,ri->or", kernel, rows, dtype)).T
    return y.reshape(*x.shape[:-1], len(kernel))


def along_last(vector: Float[Array, " D"], like: Shaped[Array, "*lead D"]) -> Float[Array, "*ones D"]:
    """Add leading axes of size 1 to a vector, to broadcast along the last axis of `like`."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def int8_product(
    x: Float[Array, "*lead I"], kernel: Int8[Array, "O I"], scale: Float[Array, " O"]
) -> Float[Array, "*lead O"]:
    """x W in int8: `kernel` has W's columns as rows, with a scale each; each x is quantised by its absolute maximum.

    Both operands are int8, because converting the weights at every use would cost more than it saves. Not
    differentiable.
    """
    step = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / 127
    rounded = jnp.round(x / step).astype(jnp.int8)
    y = jax.lax.dot_general(rounded, kernel, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return y.astype(jnp.float32) * step * along_last(scale, y)

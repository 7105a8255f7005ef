"""The one matrix product: operands in the compute dtype, sums in float32, and a gradient of the same kind."""

from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


def product(subscripts: str, a: Float[Array, "..."], b: Float[Array, "..."], dtype: DTypeLike) -> Float[Array, "..."]:
    """Contraction of two operands in `dtype`, accumulated and returned in float32; `subscripts` as for `jnp.einsum`.

    `a` is float32 (an activation), `b` a weight or an activation; every letter of one operand must occur in the other
    or in the result. The gradient is a product of the same kind: left alone, JAX would multiply a float32 cotangent
    by a bfloat16 operand, which has no fast kernel on CPUs and runs the slow path on accelerators.
    """
    return cast(Array, _product(subscripts, a, b, dtype))


def _contract(subscripts: str, a: Array, b: Array, dtype: DTypeLike) -> Array:
    # GPUs and TPUs would otherwise round float32 operands to 10 or 7 bits; who asks for float32 means it
    precision = "highest" if jnp.dtype(dtype) == jnp.float32 else None
    a, b = a.astype(dtype), b.astype(dtype)
    return jnp.einsum(subscripts, a, b, precision=precision, preferred_element_type=jnp.float32)


_product = jax.custom_vjp(_contract, nondiff_argnums=(0, 3))


def _product_forward(subscripts, a, b, dtype):
    # b is kept as it came: a weight is alive anyway, so only the activation costs memory
    a = a.astype(dtype)
    return _contract(subscripts, a, b, dtype), (a, b)


def _product_backward(subscripts, dtype, kept, cotangent):
    a, b = kept
    operands, result = subscripts.split("->")
    left, right = operands.split(",")
    grad_a = _contract(f"{result},{right}->{left}", cotangent, b, dtype)
    grad_b = _contract(f"{result},{left}->{right}", cotangent, a, dtype)
    return grad_a, grad_b.astype(b.dtype)


_product.defvjp(_product_forward, _product_backward)

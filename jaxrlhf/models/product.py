"""Mixed-precision matrix product, for the forward and the backward pass."""

from typing import cast

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array, Float


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

"""Sums and what is made of them, under a mask.

Masks choose the inputs (0 * nan is nan), so what they hide never reaches a sum or a gradient.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scalar = Float[Array, ""] | Int[Array, ""] | float | int
"""What changes during a run may be traced: counts, coefficients, clip ranges."""


def keep(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` where the mask is true, an exact 0 (and no gradient) elsewhere, whatever `x` holds there."""
    return jnp.where(mask, x, 0.0)


def total(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Sum of `x` over the mask."""
    return jnp.sum(keep(x, mask))


def last(mask: Bool[Array, "B R"]) -> Bool[Array, "B R"]:
    """True at the last true column of each row and nowhere else; a row without one stays false."""
    columns = jnp.arange(mask.shape[1])
    return mask & (columns == jnp.max(jnp.where(mask, columns, -1), axis=1, keepdims=True))


def quantiles(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], which: tuple[float, ...]) -> Float[Array, " _"]:
    """Quantiles of `x` over the mask, one for each share in `which`; 0 where nothing is in the mask."""
    found = jnp.nanquantile(jnp.where(mask, x, jnp.nan), jnp.array(which))
    return jnp.where(jnp.any(mask), found, 0.0)


def correlation(x: Float[Array, " B"], y: Float[Array, " B"]) -> Float[Array, ""]:
    """Pearson's, over the rows; 0 where one of the two does not vary."""
    x, y = x - jnp.mean(x), y - jnp.mean(y)
    spread = jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))
    return jnp.where(spread > 0, jnp.sum(x * y) / jnp.where(spread > 0, spread, 1.0), 0.0)

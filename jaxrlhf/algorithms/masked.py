"""Masked sums and statistics.

The mask selects the inputs of a sum (`jnp.where`), not its terms: 0 * nan is nan, so a product with the mask would let
what is masked reach the sum and the gradient.
"""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

Scalar = Float[Array, ""] | Int[Array, ""] | float | int
"""A number that may change during a run and so may be traced: a count, a coefficient, a clip range."""

Metrics = dict[str, Float[Array, ""]]


def keep(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, "*shape"]:
    """`x` where the mask is true; elsewhere exactly 0, without a gradient, even if `x` is not finite there."""
    chex.assert_equal_shape([x, mask])
    return jnp.where(mask, x, 0.0)


def total(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Sum of `x` over the mask."""
    return jnp.sum(keep(x, mask))


def mean(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"]) -> Float[Array, ""]:
    """Mean of `x` over the mask; 0 if it is empty."""
    return total(x, mask) / jnp.maximum(jnp.sum(mask), 1)


def power_of_two(x: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """A power of two near |x|. Division by it is exact: sums of the squares of the quotients do not overflow, and
    otherwise give the same bits."""
    chex.assert_type(x, float)
    return jnp.ldexp(1.0, jnp.clip(jnp.frexp(x)[1] - 1, -60, 126))


def deviation(centred: Float[Array, "*shape"], mask: Bool[Array, "*shape"], n: Scalar) -> Float[Array, ""]:
    """sqrt(sum of squares over the mask / n), also for numbers whose squares overflow."""
    centred = keep(centred, mask)
    unit = power_of_two(jnp.max(jnp.abs(centred), initial=0.0))
    return unit * jnp.sqrt(jnp.sum(jnp.square(centred / unit)) / jnp.maximum(n, 1))


def rows(mask: Bool[Array, "B R"]) -> Bool[Array, " B"]:
    """True for rows with a real token. Every response has one, except those that are left out of an update."""
    chex.assert_rank(mask, 2)
    return jnp.any(mask, axis=1)


def last(mask: Bool[Array, "B R"]) -> Bool[Array, "B R"]:
    """True only at the last true column of each row; all false for a row without one."""
    chex.assert_rank(mask, 2)
    columns = jnp.arange(mask.shape[1])
    return mask & (columns == jnp.max(jnp.where(mask, columns, -1), axis=1, keepdims=True))


def quantiles(
    x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], probabilities: tuple[Scalar, ...]
) -> Float[Array, " _"]:
    """Quantiles of `x` over the mask, one for each of `probabilities`; 0 if the mask is empty."""
    chex.assert_equal_shape([x, mask])
    values = jnp.nanquantile(jnp.where(mask, x, jnp.nan), jnp.array(probabilities))
    return jnp.where(jnp.any(mask), values, 0.0)


def correlation(x: Float[Array, " B"], y: Float[Array, " B"], mask: Bool[Array, " B"]) -> Float[Array, ""]:
    """Pearson correlation over the mask; 0 if `x` or `y` is constant there."""
    chex.assert_equal_shape([x, y, mask])
    x, y = keep(x - mean(x, mask), mask), keep(y - mean(y, mask), mask)
    x, y = (z / power_of_two(jnp.max(jnp.abs(z), initial=0.0)) for z in (x, y))
    spread = jnp.sqrt(jnp.sum(x * x) * jnp.sum(y * y))
    return jnp.where(spread > 0, jnp.sum(x * y) / jnp.where(spread > 0, spread, 1.0), 0.0)

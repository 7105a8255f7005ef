"""Adaptive entropy bonus."""

from typing import NamedTuple

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrlhf.algorithms.masked import Scalar


class EntropyControl(NamedTuple):
    """Coefficient of the entropy bonus under adaptive control (https://arxiv.org/abs/2505.22312, "Adaptive Entropy
    Control").

    `coef` is the controlled coefficient and `applied` that of the next update: `coef` if the entropy was at or below
    the target, else 0.
    """

    coef: Float[Array, ""]
    applied: Float[Array, ""]

    def after(
        self, entropy: Float[Array, ""], target: Scalar, delta: Scalar, low: Scalar, high: Scalar
    ) -> "EntropyControl":
        """The control after an update whose policy had this mean entropy per token, in nats.

        `coef` rises by `delta` (to at most `high`) if the entropy is at or below the target, else it falls by `delta`
        (to at least `low`). Unchanged if the entropy is not finite.
        """
        chex.assert_rank([entropy, *self], 0)
        below = entropy <= target
        coef = jnp.where(below, jnp.minimum(self.coef + delta, high), jnp.maximum(self.coef - delta, low))
        known = jnp.isfinite(entropy)
        applied = jnp.where(below, coef, 0.0)
        return EntropyControl(jnp.where(known, coef, self.coef), jnp.where(known, applied, self.applied))

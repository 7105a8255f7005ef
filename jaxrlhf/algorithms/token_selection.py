"""Tokens of a rollout that a policy loss treats differently, selected by entropy or covariance over the whole rollout.

Call these on the whole rollout, not on a micro-batch or one device's shard: a part has other quantiles and means.
"""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Scalar


def high_entropy(entropy: Float[Array, "B R"], mask: Bool[Array, "B R"], share: Scalar) -> Bool[Array, "B R"]:
    """The `share` of tokens with the highest entropy (https://arxiv.org/abs/2506.01939).

    As in TRL, tokens at or above the (1 - share) quantile, which is interpolated linearly: of equal entropies there
    may be more.
    """
    (threshold,) = masked.quantiles(entropy, mask, (1 - share,))
    return mask & (entropy >= threshold)


def covariances(
    logprobs: Float[Array, "B R"], advantages: Float[Array, "B R"], mask: Bool[Array, "B R"]
) -> Float[Array, "B R"]:
    """(log pi - mean log pi) (A - mean A) of each token, means over all tokens (https://arxiv.org/abs/2505.22617).

    Its mean is the covariance that the entropy falls with. 0 outside the mask.
    """
    return masked.keep((logprobs - masked.mean(logprobs, mask)) * (advantages - masked.mean(advantages, mask)), mask)


def clip_cov(
    covariance: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    noise: Float[Array, "B R"],
    ratio: Scalar,
    low: Scalar,
    high: Scalar,
) -> Bool[Array, "B R"]:
    """Clip-Cov: a random `ratio` of all tokens, out of those with a covariance between `low` and `high`.

    These tokens get no gradient (https://arxiv.org/abs/2505.22617). Of the candidates, those with the least `noise`
    (independent uniform numbers) are selected; fewer if there are not as many.
    """
    chex.assert_equal_shape([covariance, mask, noise])
    candidates = mask & (covariance > low) & (covariance < high)
    return candidates & (_rank(jnp.where(candidates, noise, jnp.inf)) < _number(mask, ratio))


def kl_cov(covariance: Float[Array, "B R"], mask: Bool[Array, "B R"], ratio: Scalar) -> Bool[Array, "B R"]:
    """KL-Cov: the `ratio` of all tokens with the highest covariance (https://arxiv.org/abs/2505.22617).

    These tokens get a KL penalty (`grpo.kl_cov_loss`).
    """
    chex.assert_equal_shape([covariance, mask])
    return mask & (_rank(jnp.where(mask, -covariance, jnp.inf)) < _number(mask, ratio))


def _number(mask: Bool[Array, "B R"], ratio: Scalar) -> Int[Array, ""]:
    """As in the authors' code, at least one token."""
    return jnp.maximum(jnp.floor(ratio * jnp.sum(mask)).astype(jnp.int32), 1)


def _rank(x: Float[Array, "B R"]) -> Int[Array, "B R"]:
    """Place of each element in ascending order, from 0."""
    return jnp.argsort(jnp.argsort(x, axis=None)).reshape(x.shape)

"""Reward-model losses: pairs, pairs with ties, rankings, and labels or scores of single responses.

`mask` marks the entries that are real, and `count` is their number in the whole optimizer batch. Finite scores give a
finite loss and gradient.
"""

import chex
import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Metrics, Scalar


def smoothed(margin: Float[Array, "*shape"], label_smoothing: Scalar) -> Float[Array, "*shape"]:
    """-(1 - e) log s(margin) - e log s(-margin), e the label smoothing."""
    chex.assert_type(margin, float)
    return -(1 - label_smoothing) * jax.nn.log_sigmoid(margin) - label_smoothing * jax.nn.log_sigmoid(-margin)


def pairwise_loss(
    chosen: Float[Array, "*shape"],
    rejected: Float[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    count: Scalar,
    label_smoothing: Scalar,
    margins: Float[Array, "*shape"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Bradley-Terry: -1/count sum log sigmoid(chosen - rejected - margin) (https://arxiv.org/abs/2203.02155, eq. 1).

    `margins` are how much better the chosen response is (https://arxiv.org/abs/2307.09288, eq. 2; None: 0). With label
    smoothing e, the swapped pair has weight e and the pair itself 1 - e. A tie counts as a wrong prediction, so a
    constant model has accuracy 0.
    """
    margin = masked.keep(chosen - rejected, mask)
    beyond = margin if margins is None else margin - masked.keep(margins, mask)
    loss = masked.total(smoothed(beyond, label_smoothing), mask) / count
    return loss, {
        "loss": loss,
        "accuracy": jnp.sum(margin > 0) / count,
        "margin": jnp.sum(margin) / count,
        "mean_reward": 0.5 * masked.total(chosen + rejected, mask) / count,
    }


def centring_term(
    chosen: Float[Array, "*shape"], rejected: Float[Array, "*shape"], mask: Bool[Array, "*shape"], count: Scalar
) -> Float[Array, ""]:
    """Penalty that centres scores at 0: 1/count sum (chosen + rejected)^2 (https://arxiv.org/abs/2312.09244).

    To be multiplied by a coefficient and added to the loss. Pairs alone leave the level of the scores undetermined.
    """
    return jnp.sum(jnp.square(masked.keep(chosen + rejected, mask))) / count


def ties_loss(
    chosen: Float[Array, "*shape"],
    rejected: Float[Array, "*shape"],
    tied: Bool[Array, "*shape"],
    mask: Bool[Array, "*shape"],
    count: Scalar,
    nu: Scalar,
) -> tuple[Float[Array, ""], Metrics]:
    """Rao-Kupper: Bradley-Terry with ties, -1/count sum log p (https://arxiv.org/abs/2409.17431).

        p(chosen better) = sigmoid(d - nu),    p(tie) = (exp(2 nu) - 1) sigmoid(d - nu) sigmoid(-d - nu)

    d = chosen - rejected; the order of a tied pair does not matter. `nu`, half the width of the band of ties, must be
    above 0 if there are ties: at 0 their probability is 0 and the loss infinite. Accuracy and margin are sums over the
    pairs without a tie, divided by the number of all pairs; `ties` is the share of tied pairs.
    """
    margin = masked.keep(chosen - rejected, mask)
    tied = tied & mask
    band = 2 * nu + jnp.log(-jnp.expm1(-2 * nu))  # log(exp(2 nu) - 1), without overflow of exp(2 nu)
    tie = jax.nn.log_sigmoid(-margin - nu) + band
    log_p = jax.nn.log_sigmoid(margin - nu) + masked.keep(tie, tied)
    loss = -masked.total(log_p, mask) / count
    return loss, {
        "loss": loss,
        "accuracy": jnp.sum((margin > 0) & ~tied) / count,
        "ties": jnp.sum(tied) / count,
        "margin": jnp.sum(masked.keep(margin, ~tied)) / count,
        "mean_reward": 0.5 * masked.total(chosen + rejected, mask) / count,
    }


def ranking_loss(
    scores: Float[Array, "B K"], mask: Bool[Array, "B K"], count: Scalar
) -> tuple[Float[Array, ""], Metrics]:
    """Plackett-Luce: -1/count sum_k log softmax(scores[k:])[k], best response first.

    From https://arxiv.org/abs/2305.18290, appendix A.3. `mask` marks the responses of a ranking; `count` is the number
    of rankings with two or more of them (shorter ones have no loss). With two responses this is `pairwise_loss`.
    Accuracy is the share of a ranking's pairs that are in order.
    """
    columns = jnp.arange(scores.shape[1])
    later = columns[None, :] > columns[:, None]
    kept = masked.keep(scores, mask)
    pairs = mask[:, :, None] & mask[:, None, :] & later
    # Each response itself is always included: an empty sum has no finite logarithm.
    candidates = pairs | jnp.eye(scores.shape[1], dtype=bool)
    totals = jax.nn.logsumexp(jnp.broadcast_to(kept[:, None, :], pairs.shape), axis=-1, where=candidates)
    loss = masked.total(totals - kept, mask) / count
    differences = masked.keep(kept[:, :, None] - kept[:, None, :], pairs)
    num_pairs = jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 1)
    lengths = jnp.sum(mask, axis=1)
    means = jnp.sum(kept, axis=1) / jnp.maximum(lengths, 1)
    return loss, {
        "loss": loss,
        "accuracy": jnp.sum(jnp.sum(differences > 0, axis=(1, 2)) / num_pairs) / count,
        "margin": jnp.sum(jnp.sum(differences, axis=(1, 2)) / num_pairs) / count,
        "mean_reward": masked.total(means, lengths > 1) / count,
    }


def classification_loss(
    scores: Float[Array, "*shape"], good: Bool[Array, "*shape"], mask: Bool[Array, "*shape"], count: Scalar
) -> tuple[Float[Array, ""], Metrics]:
    """Binary cross-entropy with p(good) = sigmoid(score) (https://arxiv.org/abs/2110.14168).

    The score is the difference of the logits of good and bad.
    """
    kept = masked.keep(scores, mask)
    losses = optax.sigmoid_binary_cross_entropy(kept, good.astype(kept.dtype))
    loss = masked.total(losses, mask) / count
    return loss, {
        "loss": loss,
        "accuracy": jnp.sum(mask & (jnp.where(good, kept, -kept) > 0)) / count,
        "mean_reward": jnp.sum(kept) / count,
    }


def regression_loss(
    scores: Float[Array, "*shape"], targets: Float[Array, "*shape"], mask: Bool[Array, "*shape"], count: Scalar
) -> tuple[Float[Array, ""], Metrics]:
    """Mean squared error: 1/count sum (score - target)^2 (https://arxiv.org/abs/2311.09528)."""
    kept = masked.keep(scores, mask)
    error = kept - masked.keep(targets, mask)
    loss = jnp.sum(jnp.square(error)) / count
    return loss, {
        "loss": loss,
        "absolute_error": jnp.sum(jnp.abs(error)) / count,
        "mean_reward": jnp.sum(kept) / count,
    }

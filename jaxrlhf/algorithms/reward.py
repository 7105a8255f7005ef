"""Reward models from preferences: pairs, pairs with ties, rankings; and from labels or scores of single responses.

In all of them `mask` says which entries are real, and `count` is their number in the whole optimizer batch. Finite
scores give a finite loss and gradient.
"""

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Scalar

Metrics = dict[str, Float[Array, ""]]


def smoothed(margin: Float[Array, "*shape"], label_smoothing: Scalar) -> Float[Array, "*shape"]:
    """-(1 - e) log s(margin) - e log s(-margin), e the label smoothing."""
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

    `margins` say by how much a response is better (https://arxiv.org/abs/2307.09288, eq. 2); none: 0. With label
    smoothing e, each pair counts 1 - e as it stands and e the other way round. A tie is not accurate: a model that
    answers a constant has accuracy 0.
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
    """1/count sum (chosen + rejected)^2, to be multiplied and added (https://arxiv.org/abs/2312.09244).

    Pairs say nothing about the level of the scores: this puts it at 0.
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
    """Bradley-Terry with ties, by Rao and Kupper (https://arxiv.org/abs/2409.17431): -1/count sum log p.

        p(chosen better) = sigmoid(d - nu),    p(tie) = (exp(2 nu) - 1) sigmoid(d - nu) sigmoid(-d - nu)

    d = chosen - rejected; which is which does not matter in a tie. `nu`, the half-width of the band of ties, must be
    above 0 where there are ties: at 0 they have probability 0 and an infinite loss. Accuracy and margin are sums over
    the pairs without a tie, divided by the number of all pairs; `ties` is the share of the others.
    """
    margin = masked.keep(chosen - rejected, mask)
    tied = tied & mask
    band = 2 * nu + jnp.log(-jnp.expm1(-2 * nu))  # log(exp(2 nu) - 1), where exp(2 nu) would overflow too
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

    From https://arxiv.org/abs/2305.18290, appendix A.3. `mask` is True for the responses of a ranking, `count` the
    number of rankings with two or more of them: the others say nothing. Of two responses this is `pairwise_loss`.
    Accuracy is the share of a ranking's pairs in their order.
    """
    columns = jnp.arange(scores.shape[1])
    later = columns[None, :] > columns[:, None]
    kept = masked.keep(scores, mask)
    pairs = mask[:, :, None] & mask[:, None, :] & later
    # The diagonal is always in: a sum over nothing has no finite logarithm.
    among = pairs | jnp.eye(scores.shape[1], dtype=bool)
    totals = jax.nn.logsumexp(jnp.broadcast_to(kept[:, None, :], pairs.shape), axis=-1, where=among)
    loss = masked.total(totals - kept, mask) / count
    differences = masked.keep(kept[:, :, None] - kept[:, None, :], pairs)
    number = jnp.maximum(jnp.sum(pairs, axis=(1, 2)), 1)
    real = jnp.sum(mask, axis=1)
    means = jnp.sum(kept, axis=1) / jnp.maximum(real, 1)
    return loss, {
        "loss": loss,
        "accuracy": jnp.sum(jnp.sum(differences > 0, axis=(1, 2)) / number) / count,
        "margin": jnp.sum(jnp.sum(differences, axis=(1, 2)) / number) / count,
        "mean_reward": masked.total(means, real > 1) / count,
    }


def classification_loss(
    scores: Float[Array, "*shape"], good: Bool[Array, "*shape"], mask: Bool[Array, "*shape"], count: Scalar
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy of two labels, p(good) = sigmoid(score) (https://arxiv.org/abs/2110.14168).

    A score is the difference of the logits of good and bad.
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

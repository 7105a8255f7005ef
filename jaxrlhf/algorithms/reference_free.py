"""Preference losses on the average log-prob per token, without a reference: SimPO and ORPO.

Arguments of both: `chosen` and `rejected` are log-probs summed over the tokens of a response, `mask` marks the rows
that are pairs, and `count` is the number of pairs of the whole optimizer batch. The average of an empty response is 0.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.dpo import pair_metrics
from jaxrlhf.algorithms.masked import Metrics, Scalar
from jaxrlhf.algorithms.reward import smoothed


def simpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    chosen_tokens: Int[Array, " B"],
    rejected_tokens: Int[Array, " B"],
    mask: Bool[Array, " B"],
    count: Scalar,
    beta: Scalar,
    gamma: Scalar,
    label_smoothing: Scalar,
) -> tuple[Float[Array, ""], Metrics]:
    """SimPO: -1 / count  sum log sigmoid(beta (c - r) - gamma) (https://arxiv.org/abs/2405.14734, eq. 6).

    c and r are the average log-probs of the chosen and the rejected response. `gamma` is TRL's `simpo_gamma`. Rewards
    are beta c and beta r.
    """
    averages = _averages(chosen, chosen_tokens, mask), _averages(rejected, rejected_tokens, mask)
    margin = beta * (averages[0] - averages[1]) - gamma
    loss = masked.total(smoothed(margin, label_smoothing), mask) / count
    rewards = beta * averages[0], beta * averages[1]
    return loss, {"loss": loss} | pair_metrics(rewards, (chosen, rejected), mask, count)


def orpo_loss(
    chosen: Float[Array, " B"],
    rejected: Float[Array, " B"],
    chosen_tokens: Int[Array, " B"],
    rejected_tokens: Int[Array, " B"],
    mask: Bool[Array, " B"],
    count: Scalar,
    beta: Scalar,
) -> tuple[Float[Array, ""], Metrics]:
    """ORPO's odds-ratio term: -beta / count  sum log sigmoid(log odds(p_c) - log odds(p_r)).

    Source: https://arxiv.org/abs/2403.07691, eq. 7, whose lambda is `beta`; the other term of its loss (eq. 6) is
    `dpo.sft_term`. odds(p) = p / (1 - p), log p the average log-prob. The odds of a response with probability 1 (or
    without tokens) are infinite: log p is limited to -1e-6, without a gradient above. Rewards are beta log p.
    """
    averages = _averages(chosen, chosen_tokens, mask), _averages(rejected, rejected_tokens, mask)
    log_odds = _log_odds(averages[0]) - _log_odds(averages[1])
    log_sigmoid = jax.nn.log_sigmoid(log_odds)
    loss = -beta * masked.total(log_sigmoid, mask) / count
    rewards = beta * averages[0], beta * averages[1]
    return loss, {
        "loss": loss,
        "log_odds_ratio": masked.total(log_sigmoid, mask) / count,
        "log_odds_chosen": masked.total(log_odds, mask) / count,
    } | pair_metrics(rewards, (chosen, rejected), mask, count)


def _averages(logprobs: Float[Array, " B"], tokens: Int[Array, " B"], mask: Bool[Array, " B"]) -> Float[Array, " B"]:
    return masked.keep(logprobs, mask) / jnp.maximum(jnp.where(mask, tokens, 0), 1)


def _log_odds(logprobs: Float[Array, " B"]) -> Float[Array, " B"]:
    certain = logprobs > -1e-6
    logprobs = jnp.where(certain, -1e-6, logprobs)
    return logprobs - jax.nn.log1mexp(-logprobs)

"""Preference losses on the average log-prob of a response's tokens, which need no reference: SimPO and ORPO."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.dpo import pair_metrics
from jaxrlhf.algorithms.masked import Scalar
from jaxrlhf.algorithms.reward import Metrics, smoothed


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
    """-1 / count  sum log sigmoid(beta (c - r) - gamma) (https://arxiv.org/abs/2405.14734, eq. 6).

    c and r are log-probs per token of the chosen and the rejected response; an empty response has 0. `chosen` and
    `rejected` are sums over tokens, `mask` says which rows are pairs, and `count` is the number of pairs of the whole
    optimizer batch. TRL's `simpo_gamma` is this gamma, too. Rewards are beta c and beta r.
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
    """-beta / count  sum log sigmoid(log odds(p_c) - log odds(p_r)) (https://arxiv.org/abs/2403.07691, eq. 7).

    odds(p) = p / (1 - p), log p being the log-prob per token; beta is the paper's lambda. The rest of its loss (eq. 6)
    is `dpo.sft_term`. Arguments as for `simpo_loss`. A response whose tokens are certain, or that is empty, has
    infinite odds: here log p ends at -1e-6, above which there is no gradient. Rewards are beta log p.
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

"""Proximal policy optimisation (https://arxiv.org/abs/1707.06347) on token-level rewards.

The recipe and its implementation details follow https://arxiv.org/abs/1909.08593 and "The N implementation details of
RLHF with PPO" (Huang et al., 2023).
"""

from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.kl import k1, k3
from jaxrlhf.algorithms.masked import Metrics, Scalar


def token_rewards(
    scores: Float[Array, " B"],
    old_logprobs: Float[Array, "B R"],
    ref_logprobs: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    kl_coef: Scalar,
    token_scores: Float[Array, "B R"] | None = None,
) -> Float[Array, "B R"]:
    """r_t = -kl_coef (log pi_old - log ref)_t + [t is the last real token] score (https://arxiv.org/abs/1909.08593, 2).

    `token_scores` (of a process reward) are added to their own tokens. 0 outside the mask; the score of a row without
    real tokens is dropped. `kl_coef` is 0 if the KL is in the loss (`kl.kl_loss`).
    """
    chex.assert_shape(scores, mask.shape[:1])
    penalty = kl_coef * k1(masked.keep(old_logprobs, mask), masked.keep(ref_logprobs, mask))
    rewards = jnp.where(masked.last(mask), scores[:, None], 0.0) - penalty
    return rewards if token_scores is None else rewards + masked.keep(token_scores, mask)


class Clip(NamedTuple):
    """Limits on the ratio rho = pi / pi_old. `dual` is the dual clip of https://arxiv.org/abs/1912.09729, eq. 5."""

    low: Scalar  # rho is clipped at 1 - low
    high: Scalar  # rho is clipped at 1 + high
    dual: Scalar | None  # rho is clipped here if the advantage is negative; above 1
    log_ratio: Scalar  # |log rho| is clipped here, for numerical safety


def policy_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    count: Scalar,
    clip: Clip,
    weights: Float[Array, "B R"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """Clipped surrogate loss (https://arxiv.org/abs/1707.06347, eq. 7, negated).

        loss = 1 / count  sum_t w_t max(-A_t rho_t, -A_t clip(rho_t, 1 - low, 1 + high)),   rho = pi / pi_old

    With a dual clip, min(that, -A_t dual) where A_t < 0. `weights` correct for a sampler that is not pi_old (None: 1).
    `count` is the number of real tokens of the whole optimizer batch. Metrics add up over micro-batches like the loss;
    pass their sum to `finalize_metrics`.
    """
    log_ratio = masked.keep(logprobs, mask) - masked.keep(old_logprobs, mask)
    advantages = masked.keep(advantages, mask)
    upper, lower = 1 + clip.high, 1 - clip.low
    above = (advantages > 0) & (log_ratio > jnp.log(upper))
    below = (advantages < 0) & (log_ratio < jnp.log(lower))
    far = (advantages < 0) & (log_ratio > jnp.log(jnp.inf if clip.dual is None else clip.dual))
    clipped = above | below
    # exp() gets 0 for a clipped token: its gradient is 0 and must stay 0 where the ratio overflows (0 * inf is nan).
    limited = jnp.clip(jnp.where(clipped | far, 0.0, log_ratio), -clip.log_ratio, clip.log_ratio)
    bound = jnp.where(above, upper, jnp.where(below, lower, 1.0 if clip.dual is None else clip.dual))
    surrogate = advantages * jnp.where(clipped | far, bound, jnp.exp(limited))
    loss = -jnp.sum(surrogate if weights is None else surrogate * masked.keep(weights, mask)) / count
    metrics = ratio_metrics(log_ratio, mask, count, clip) | {
        "loss/policy_avg": loss,
        "policy/clipfrac_avg": jnp.sum(clipped) / count,
        "policy/clipfrac_high_avg": jnp.sum(above) / count,
        "policy/clipfrac_low_avg": jnp.sum(below) / count,
    }
    return loss, metrics | ({"policy/dual_clipfrac_avg": jnp.sum(far) / count} if clip.dual is not None else {})


def ratio_metrics(log_ratio: Float[Array, "B R"], mask: Bool[Array, "B R"], count: Scalar, clip: Clip) -> Metrics:
    """Distance of pi from pi_old, without a gradient. `log_ratio` is 0 outside the mask."""
    log_ratio = jax.lax.stop_gradient(jnp.clip(log_ratio, -clip.log_ratio, clip.log_ratio))
    return {
        "policy/approxkl_avg": 0.5 * jnp.sum(jnp.square(log_ratio)) / count,
        "policy/kl_avg": masked.total(jnp.expm1(log_ratio) - log_ratio, mask) / count,
        "val/ratio": masked.total(jnp.exp(log_ratio), mask) / count,
        "val/ratio_spread": jnp.sum(jnp.square(jnp.expm1(log_ratio))) / count,
    }


def value_loss(
    values: Float[Array, "B R"],
    old_values: Float[Array, "B R"],
    returns: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    count: Scalar,
    cliprange_value: Scalar | None,
) -> tuple[Float[Array, ""], Metrics]:
    """Squared error of the values, clipped around the old values (as in OpenAI baselines' ppo2).

        loss = 1 / (2 count)  sum_t max((V_t - R_t)^2, (clip(V_t, V_old_t - c, V_old_t + c) - R_t)^2)

    Without a clip range, only the first of the two.
    """
    values, old_values, returns = (masked.keep(x, mask) for x in (values, old_values, returns))
    if cliprange_value is None:
        loss = 0.5 * jnp.sum(jnp.square(values - returns)) / count
        return loss, {"loss/value_avg": loss, "val/clipfrac_avg": jnp.zeros_like(loss)}
    clipped = old_values + jnp.clip(values - old_values, -cliprange_value, cliprange_value)
    error, clipped_error = jnp.square(values - returns), jnp.square(clipped - returns)
    loss = 0.5 * jnp.sum(jnp.maximum(error, clipped_error)) / count
    return loss, {"loss/value_avg": loss, "val/clipfrac_avg": jnp.sum(clipped_error > error) / count}


def finalize_metrics(metrics: Metrics) -> Metrics:
    """Replace val/ratio_spread by val/ratio_var in the sum of the micro-batches' metrics.

    E[(rho - 1)^2] adds up over micro-batches, and Var[rho] = E[(rho - 1)^2] - (E[rho] - 1)^2 does not suffer from the
    cancellation of E[rho^2] - E[rho]^2.
    """
    chex.assert_rank(list(metrics.values()), 0)
    metrics = dict(metrics)
    variance = metrics.pop("val/ratio_spread") - jnp.square(metrics["val/ratio"] - 1)
    return metrics | {"val/ratio_var": jnp.maximum(variance, 0.0)}


def rollout_metrics(
    scores: Float[Array, " B"],
    old_logprobs: Float[Array, "B R"],
    ref_logprobs: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    finished: Bool[Array, " B"],
    kl_coef: Scalar,
    kl_in: Literal["reward", "loss"],
) -> Metrics:
    """`response_metrics`, and the KL to the reference in nats per response (mean of the sum over real tokens).

    rlhf_reward is the objective score - kl_coef KL, wherever the KL enters; non_score_reward is the part of the rewards
    that is KL penalty: 0 if the KL is in the loss.
    """
    kept, rows = (masked.keep(old_logprobs, mask), masked.keep(ref_logprobs, mask)), masked.rows(mask)
    kl = masked.mean(jnp.sum(k1(*kept), axis=1), rows)
    return response_metrics(scores, mask, finished) | {
        "objective/kl": kl,
        "objective/kl_k3": masked.mean(jnp.sum(k3(*kept), axis=1), rows),
        "objective/non_score_reward": -kl_coef * kl if kl_in == "reward" else jnp.zeros_like(kl),
        "objective/rlhf_reward": masked.mean(scores, rows) - kl_coef * kl,
    }


def response_metrics(scores: Float[Array, " B"], mask: Bool[Array, "B R"], finished: Bool[Array, " B"]) -> Metrics:
    """Statistics of the scores and lengths of the responses. Rows without real tokens do not count."""
    chex.assert_rank(mask, 2)
    chex.assert_shape([scores, finished], mask.shape[:1])
    lengths, rows = jnp.sum(mask, axis=1).astype(jnp.float32), masked.rows(mask)
    mean, ended = masked.mean(scores, rows), masked.keep(finished.astype(jnp.float32), rows)
    return {
        "objective/scores": mean,
        "objective/scores_std": masked.deviation(scores - mean, rows, jnp.sum(rows)),
        "objective/score_length_correlation": masked.correlation(scores, lengths, rows),
        "tokens/mean_length": masked.mean(lengths, rows),
        "tokens/min_length": jnp.min(lengths, initial=mask.shape[1], where=rows),
        "tokens/max_length": jnp.max(lengths),
        "tokens/finished": masked.mean(ended, rows),
        "val/num_eos_tokens": jnp.sum(ended),
    }

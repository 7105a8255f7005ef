"""Rewards, advantages and returns of a PPO update, from the predictions of policy and critic."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.advantages import gae, length_adaptive_lambda, reward_to_go, whiten
from jaxrlhf.algorithms.groups import rloo
from jaxrlhf.algorithms.ppo import rollout_metrics, token_rewards
from jaxrlhf.config import PPO
from jaxrlhf.training.on_policy.update import sampler_gap, sampler_weights
from jaxrlhf.training.step import Metrics
from jaxrlhf.types import Experience, Rollout

FILLED = ("old_logprobs", "values", "rewards", "advantages", "returns", "bootstrap", "weights")
"""Fields of an experience that `fill_experience` computes."""
QUANTILES = (0.01, 0.5, 0.99)  # of the ratio pi_old / pi_sampler


class Predictions(NamedTuple):
    """Outputs of policy and critic for a rollout; 0 outside the response mask."""

    logprobs: Array  # f32 [B, R]
    entropy: Array  # f32 [B, R]
    values: Array  # f32 [B, R]   before each response token
    last_values: Array  # f32 [B]   after the last token


def blank_experience(rollout: Rollout, scores: Array, ref_logprobs: Array, **known: Any) -> Experience:
    """An experience in which all that `fill_experience` computes is 0."""
    blank = jnp.zeros_like(ref_logprobs)
    return Experience(
        rollout=rollout,
        scores=scores,
        old_logprobs=blank,
        ref_logprobs=ref_logprobs,
        values=blank,
        rewards=blank,
        advantages=blank,
        returns=blank,
        bootstrap=jnp.zeros_like(scores),
        **known,
    )


def fill_experience(
    experience: Experience, predictions: Predictions, kl_coef: Array, ppo: PPO
) -> tuple[Experience, Metrics]:
    """Rewards, advantages and returns of a whole batch, and its metrics. No gradient flows through."""
    logprobs, entropy, values, last_values = jax.lax.stop_gradient(predictions)
    rollout, scores, ref_logprobs = experience.rollout, experience.scores, experience.ref_logprobs
    mask, finished = rollout.response_mask, rollout.finished
    count = jnp.maximum(jnp.sum(mask), 1)

    def mean(x: Array) -> Array:
        return masked.total(x, mask) / count

    def variance(x: Array) -> Array:
        return mean(jnp.square(x - mean(x)))

    kl_in_reward = kl_coef if ppo.kl_in == "reward" else 0.0
    paid = scores
    if ppo.baseline == "leave_one_out":
        # a response without a score is in no group; a score without others to compare says nothing
        paid = rloo(scores, jnp.where(masked.rows(mask), rollout.index, -1 - jnp.arange(len(scores))))
    rewards = token_rewards(paid, logprobs, ref_logprobs, mask, kl_in_reward, experience.token_scores)
    if ppo.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    bootstrap = jnp.where(finished, 0.0, last_values) if ppo.bootstrap_truncated else jnp.zeros_like(last_values)
    lam = ppo.lam if ppo.lam_alpha is None else length_adaptive_lambda(mask, ppo.lam_alpha)
    advantages, returns = gae(rewards, values, mask, bootstrap, ppo.gamma, lam)
    if ppo.value_target == "reward_to_go":
        returns = reward_to_go(rewards, mask, bootstrap, ppo.gamma)
    weights, sampler_metrics = _sampler_correction(rollout, logprobs, ppo)
    filled = dataclasses.replace(
        experience,
        old_logprobs=logprobs,
        values=values,
        rewards=rewards,
        advantages=whiten(advantages, mask, shift_mean=True) if ppo.whiten_advantages else advantages,
        returns=returns,
        bootstrap=bootstrap,
        token_scores=None,  # part of the rewards now
        weights=weights,
    )
    if experience.token_scores is not None:
        scores = scores + jnp.sum(masked.keep(experience.token_scores, mask), axis=1)
    metrics = rollout_metrics(scores, logprobs, ref_logprobs, mask, finished, kl_coef, ppo.kl_in)
    return filled, metrics | sampler_metrics | {
        "objective/entropy": masked.mean(jnp.sum(entropy, axis=1), masked.rows(mask)),
        "objective/entropy_per_token": mean(entropy),
        "objective/kl_coef": kl_coef,
        "objective/kl_per_token": mean(logprobs - ref_logprobs),
        "val/advantage_mean": mean(advantages),
        "val/value_mean": mean(values),
        "val/explained_variance": jnp.where(
            variance(returns) > 1e-8, 1 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8), 0.0
        ),
    }


def _sampler_correction(rollout: Rollout, logprobs: Array, ppo: PPO) -> tuple[Array | None, Metrics]:
    """Token weights in the policy loss, f32 [B, R] (None: all 1), and the distance of the sampler from pi_old."""
    mask, gap = rollout.response_mask, sampler_gap(rollout, logprobs)
    low, median, high = masked.quantiles(jnp.exp(gap), mask, QUANTILES)
    metrics = {
        "val/sampler_logprob_gap": jnp.sum(jnp.abs(gap)) / jnp.maximum(jnp.sum(mask), 1),
        "val/sampler_logprob_gap_max": jnp.max(jnp.abs(gap)),
        "val/sampler_ratio_q01": low,
        "val/sampler_ratio_q50": median,
        "val/sampler_ratio_q99": high,
    }
    if ppo.sampler_correction == "none":
        return None, metrics
    weights, cut = sampler_weights(gap, mask, ppo)
    return weights, metrics | {"val/sampler_corrected": jnp.sum(cut) / jnp.maximum(jnp.sum(mask), 1)}

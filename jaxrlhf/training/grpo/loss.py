"""The losses of group-relative methods, chosen by `grpo.recipe` from `algorithms/`."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.algorithms import dpo, masked, token_selection
from jaxrlhf.algorithms.grpo import cispo_loss, gmpo_loss, gspo_loss, kl_cov_loss, reinforce_loss, sapo_loss
from jaxrlhf.algorithms.kl import kl_loss
from jaxrlhf.algorithms.ppo import Clip, policy_loss
from jaxrlhf.config import GRPO
from jaxrlhf.config.base import constant
from jaxrlhf.training.step import Metrics
from jaxrlhf.types import GroupExperience


class Selected(NamedTuple):
    """Tokens that the policy loss treats differently, bool [B, R] each; None: no such selection."""

    trained: Array | None = None  # tokens in the policy loss
    penalised: Array | None = None  # tokens with the penalty of kl_cov


def select(experience: GroupExperience, key: Array, grpo: GRPO) -> Selected:
    """Select tokens of a whole rollout by the entropy and the log-probs of pi_old."""
    if not grpo.selects_tokens:
        return Selected()
    mask, old, trained, penalised = experience.rollout.response_mask, experience.old_logprobs, None, None
    assert old is not None
    if not constant(grpo.top_entropy_quantile, 1):
        assert experience.entropy is not None
        trained = token_selection.high_entropy(experience.entropy, mask, grpo.top_entropy_quantile)
    covariance = token_selection.covariances(old, experience.advantages, mask)
    if grpo.recipe.loss == "kl_cov":
        penalised = token_selection.kl_cov(covariance, mask, grpo.cov_ratio)
    if grpo.recipe.loss == "clip_cov":
        # transposed, so that columns of padding do not change the numbers of others
        noise = jax.random.uniform(key, mask.shape[::-1]).T
        left_out = token_selection.clip_cov(
            covariance, mask, noise, grpo.cov_ratio, grpo.clip_cov_low, grpo.clip_cov_high
        )
        trained = mask & ~left_out if trained is None else trained & ~left_out
    return Selected(trained, penalised)


def surrogate(
    logprobs: Array,
    old_logprobs: Array,
    part: GroupExperience,
    count: Array,
    weights: Array,
    kl_coef: Array,
    selected: Selected,
    grpo: GRPO,
) -> tuple[Array, Metrics]:
    """The policy loss on `selected` tokens, plus the KL if it is in the loss and estimated from the sampled tokens,
    with the same token weights. All arrays are [B, R]."""
    mask, recipe = part.rollout.response_mask, grpo.recipe
    clip = Clip(*grpo.clip, dual=None, log_ratio=grpo.log_ratio_clamp)
    policy_weights = weights if selected.trained is None else masked.keep(weights, selected.trained)
    ratio = logprobs, old_logprobs, part.advantages, mask, count, clip, policy_weights
    match recipe.loss:
        case "clip" | "clip_cov":
            loss, metrics = policy_loss(*ratio)
        case "gspo":
            loss, metrics = gspo_loss(*ratio)
        case "gmpo":
            loss, metrics = gmpo_loss(*ratio)
        case "cispo":
            loss, metrics = cispo_loss(*ratio)
        case "sapo":
            loss, metrics = sapo_loss(*ratio, (grpo.sapo_temperature_pos, grpo.sapo_temperature_neg))
        case "kl_cov":
            assert selected.penalised is not None
            loss, metrics = kl_cov_loss(*ratio, selected.penalised, grpo.kl_cov_coef)
        case "reinforce":
            loss, metrics = reinforce_loss(logprobs, part.advantages, mask, count, policy_weights)
        case "dpo":
            raise AssertionError("pairs use `preference`")
    if grpo.has_reference and recipe.kl_in == "loss" and not grpo.has_exact_kl:
        assert part.ref_logprobs is not None and grpo.kl_estimator not in ("k1", "exact")
        estimator = grpo.kl_estimator or "k3"
        kl, kl_metrics = kl_loss(logprobs, old_logprobs, part.ref_logprobs, mask, count, estimator, weights)
        loss, metrics = loss + kl_coef * kl, metrics | kl_metrics
    return loss, metrics


def preference(logprobs: Array, part: GroupExperience, count: Array, grpo: GRPO) -> tuple[Array, Metrics]:
    """DPO loss on `count` pairs; `logprobs` f32 [2n, R] alternate chosen and rejected. Ties are left out."""
    mask = part.rollout.response_mask
    assert part.ref_logprobs is not None
    sums, reference = (jnp.sum(x.reshape(mask.shape), axis=2) for x in (logprobs, part.ref_logprobs))
    both = dpo.Logprobs(*sums.T, *reference.T, *jnp.sum(mask, axis=2).T)
    coefs = dpo.Coefs(beta=grpo.beta, label_smoothing=0.0, discopop_tau=1.0)
    reverse_kl = dpo.Divergence("reverse_kl", 0.0)
    valid = part.advantages[:, 0] > 0
    loss, metrics = dpo.preference_loss(both, valid, count, dpo.LOSSES[grpo.dpo_loss], reverse_kl, coefs)
    return loss, {
        "loss/policy_avg": metrics.pop("loss"),
        **{key: value for key, value in metrics.items() if key.startswith("rewards/")},
    }

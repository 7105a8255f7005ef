"""The losses of group-relative methods, chosen by `grpo.recipe` from `algorithms/`."""

import jax.numpy as jnp
from jax import Array

from jaxrlhf.algorithms import dpo
from jaxrlhf.algorithms.grpo import cispo_loss, gspo_loss, reinforce_loss
from jaxrlhf.algorithms.kl import kl_loss
from jaxrlhf.algorithms.ppo import Clip, policy_loss
from jaxrlhf.config import GRPO
from jaxrlhf.training.step import Metrics
from jaxrlhf.types import GroupExperience


def surrogate(
    logprobs: Array,
    old_logprobs: Array,
    part: GroupExperience,
    count: Array,
    weights: Array,
    kl_coef: Array,
    grpo: GRPO,
) -> tuple[Array, Metrics]:
    """The policy loss, plus the KL if it is in the loss, with the same token weights. All arrays are [B, R]."""
    mask, recipe = part.rollout.response_mask, grpo.recipe
    clip = Clip(*grpo.clip, dual=None, log_ratio=grpo.log_ratio_clamp)
    ratio = logprobs, old_logprobs, part.advantages, mask, count, clip, weights
    match recipe.loss:
        case "clip":
            loss, metrics = policy_loss(*ratio)
        case "gspo":
            loss, metrics = gspo_loss(*ratio)
        case "cispo":
            loss, metrics = cispo_loss(*ratio)
        case "reinforce":
            loss, metrics = reinforce_loss(logprobs, part.advantages, mask, count, weights)
        case "dpo":
            raise AssertionError("pairs use `preference`")
    if grpo.has_reference and recipe.kl_in == "loss":
        assert part.ref_logprobs is not None and grpo.kl_estimator != "k1"
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

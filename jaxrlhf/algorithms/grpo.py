"""Policy losses for the advantages of groups.py. GRPO and its variants use PPO's clipped surrogate:

GRPO      ppo.policy_loss, token_weights "sequence"     https://arxiv.org/abs/2402.03300, eq. 3
Dr. GRPO  ppo.policy_loss, token_weights "constant"     https://arxiv.org/abs/2503.20783
DAPO      ppo.policy_loss, token_weights "token",       https://arxiv.org/abs/2503.14476, eq. 8
          clip.high > clip.low, `scores.overlong_penalty`
GSPO      gspo_loss, token_weights "sequence"           https://arxiv.org/abs/2507.18071, eq. 5 and 13
LUSPO     gspo_loss, token_weights "constant" with      https://arxiv.org/abs/2602.05261
          longest = 1: GSPO's loss times the length
GMPO      gmpo_loss, token_weights "sequence"           https://arxiv.org/abs/2507.20673
CISPO     cispo_loss, token_weights "token"             https://arxiv.org/abs/2506.13585, eq. 4
SAPO      sapo_loss, token_weights "sequence"           https://arxiv.org/abs/2511.20347
KL-Cov    kl_cov_loss, token_weights "token"            https://arxiv.org/abs/2505.22617
Clip-Cov  ppo.policy_loss, token_weights "token", 0 for the tokens of token_selection.clip_cov
RLOO      reinforce_loss, token_weights "constant" with longest = 1 (a sum over each response)
GPG       reinforce_loss, token_weights "token"
"""

from typing import Literal

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Metrics, Scalar
from jaxrlhf.algorithms.ppo import Clip, policy_loss, ratio_metrics


def token_weights(
    mask: Bool[Array, "B R"],
    count: Scalar,
    sequences: Scalar,
    normalise: Literal["sequence", "constant", "token"],
    longest: int,
) -> Float[Array, "B R"]:
    """Weights w of tokens in a loss divided by `count`, so that sum_t w_t l_t / count is

        sequence    the mean over sequences of the mean over their tokens
        constant    the sum over tokens / (sequences longest), `longest` being the response limit
        token       the mean over tokens

    `count` and `sequences` are numbers of the whole optimizer batch, so micro-batches add up. Metrics other than the
    loss stay means over tokens. Multiply by the weights that correct for the sampler. 0 outside the mask.
    """
    chex.assert_rank(mask, 2)
    if normalise == "token":
        return mask.astype(jnp.float32)
    lengths = jnp.sum(mask, axis=1, keepdims=True) if normalise == "sequence" else longest
    return masked.keep(jnp.broadcast_to(count / (sequences * lengths), mask.shape), mask)


def gspo_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    count: Scalar,
    clip: Clip,
    weights: Float[Array, "B R"],
) -> tuple[Float[Array, ""], Metrics]:
    """GSPO: the clipped surrogate on sequence ratios, as a loss of tokens (https://arxiv.org/abs/2507.18071, eq. 13).

        s_t = sg(s) pi_t / sg(pi_t),   s = exp(mean_t log(pi_t / pi_old_t))

    sg stops the gradient, so s_t = s in value. With "sequence" weights, and one advantage (and one sampler weight) for
    all tokens of a response, loss and gradient are those of eq. 5. Clip fractions count the tokens of clipped
    sequences; the other metrics are computed from token ratios.
    """
    log_ratio = masked.keep(logprobs, mask) - masked.keep(old_logprobs, mask)
    mean = jnp.sum(log_ratio, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    # Passed as a log-ratio, not added to old_logprobs: the rounding would matter for clip ranges of 3e-4.
    of_sequence = jax.lax.stop_gradient(mean) + (log_ratio - jax.lax.stop_gradient(log_ratio))
    loss, metrics = policy_loss(of_sequence, jnp.zeros_like(log_ratio), advantages, mask, count, clip, weights)
    return loss, metrics | ratio_metrics(log_ratio, mask, count, clip)


def gmpo_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    count: Scalar,
    clip: Clip,
    weights: Float[Array, "B R"],
) -> tuple[Float[Array, ""], Metrics]:
    """GMPO: -A times the geometric mean of a response's clipped token ratios (https://arxiv.org/abs/2507.20673).

        l = mean_t log rho'_t,   rho'_t = min(rho_t, 1 + high) if A > 0, else max(rho_t, 1 - low)
        loss = -1 / count  sum_t w_t A s_t,   s_t = sg(exp(l)) rho'_t / sg(rho'_t)

    As in `gspo_loss`, s_t = exp(l) in value, and with "sequence" weights and one advantage for all tokens of a response
    loss and gradient are those of the paper. Its default range is exp(-0.4) to exp(0.4). Clip fractions count tokens.
    """
    log_ratio = masked.keep(logprobs, mask) - masked.keep(old_logprobs, mask)
    advantages, weights = masked.keep(advantages, mask), masked.keep(weights, mask)
    upper, lower = jnp.log(1 + clip.high), jnp.log(1 - clip.low)
    above, below = (advantages > 0) & (log_ratio > upper), (advantages < 0) & (log_ratio < lower)
    clipped = jnp.where(above, upper, jnp.where(below, lower, jnp.clip(log_ratio, -clip.log_ratio, clip.log_ratio)))
    mean = jnp.sum(clipped, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
    of_sequence = jnp.exp(jax.lax.stop_gradient(mean) + (clipped - jax.lax.stop_gradient(clipped)))
    loss = -jnp.sum(weights * advantages * of_sequence) / count
    return loss, ratio_metrics(log_ratio, mask, count, clip) | {
        "loss/policy_avg": loss,
        "policy/clipfrac_avg": jnp.sum(above | below) / count,
        "policy/clipfrac_high_avg": jnp.sum(above) / count,
        "policy/clipfrac_low_avg": jnp.sum(below) / count,
    }


def sapo_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    count: Scalar,
    clip: Clip,
    weights: Float[Array, "B R"],
    temperatures: tuple[Scalar, Scalar],
) -> tuple[Float[Array, ""], Metrics]:
    """SAPO: a soft gate on the ratio in place of clipping (https://arxiv.org/abs/2511.20347).

        loss = -1 / count  sum_t w_t A_t 4 / tau sigmoid(tau (rho_t - 1)),   rho = pi / pi_old

    tau is the first of `temperatures` where A_t > 0, else the second. At rho = 1 the gradient is that of PPO. Of `clip`
    only the bound on log rho is used.
    """
    chex.assert_equal_shape([logprobs, weights])
    log_ratio = masked.keep(logprobs, mask) - masked.keep(old_logprobs, mask)
    advantages, weights = masked.keep(advantages, mask), masked.keep(weights, mask)
    tau = jnp.where(advantages > 0, *temperatures)
    ratio = jnp.exp(jnp.clip(log_ratio, -clip.log_ratio, clip.log_ratio))
    gate = 4 / tau * jax.nn.sigmoid(tau * (ratio - 1))
    loss = -jnp.sum(weights * advantages * gate) / count
    return loss, ratio_metrics(log_ratio, mask, count, clip) | {"loss/policy_avg": loss}


def kl_cov_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    count: Scalar,
    clip: Clip,
    weights: Float[Array, "B R"],
    selected: Bool[Array, "B R"],
    coef: Scalar,
) -> tuple[Float[Array, ""], Metrics]:
    """KL-Cov: the unclipped surrogate with a KL penalty on selected tokens (https://arxiv.org/abs/2505.22617).

        loss = -1 / count  sum_t w_t (rho_t A_t - [t selected] coef |log rho_t|),   rho = pi / pi_old

    |log rho| estimates KL(pi_old || pi), as in the authors' code; `selected` is `token_selection.kl_cov`. Of `clip`
    only the bound on log rho is used.
    """
    chex.assert_equal_shape([logprobs, weights, selected])
    log_ratio = masked.keep(logprobs, mask) - masked.keep(old_logprobs, mask)
    advantages, weights = masked.keep(advantages, mask), masked.keep(weights, mask)
    limited = jnp.clip(log_ratio, -clip.log_ratio, clip.log_ratio)
    penalty = coef * masked.keep(jnp.abs(limited), selected & mask)
    loss = -jnp.sum(weights * (advantages * jnp.exp(limited) - penalty)) / count
    return loss, ratio_metrics(log_ratio, mask, count, clip) | {"loss/policy_avg": loss}


def cispo_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    count: Scalar,
    clip: Clip,
    weights: Float[Array, "B R"],
) -> tuple[Float[Array, ""], Metrics]:
    """CISPO: REINFORCE with clipped importance weights, so every token keeps a gradient.

        loss = -1 / count  sum_t w_t sg(clip(rho_t, 1 - low, 1 + high)) A_t log pi_t,   rho = pi / pi_old

    Source: https://arxiv.org/abs/2506.13585, eq. 4. sg stops the gradient. The paper has no lower bound: low = 1. Clip
    fractions count the tokens whose rho is out of range, whatever their advantage; `clip.dual` is not used.
    """
    chex.assert_equal_shape([logprobs, weights])
    log_ratio = jax.lax.stop_gradient(masked.keep(logprobs, mask) - masked.keep(old_logprobs, mask))
    lower, upper = jnp.log(1 - clip.low), jnp.log(1 + clip.high)
    importance = jnp.exp(jnp.clip(log_ratio, lower, upper))
    loss, metrics = reinforce_loss(logprobs, advantages, mask, count, importance * weights)
    above, below = jnp.sum(log_ratio > upper) / count, jnp.sum(log_ratio < lower) / count
    return loss, metrics | ratio_metrics(log_ratio, mask, count, clip) | {
        "policy/clipfrac_avg": above + below,
        "policy/clipfrac_high_avg": above,
        "policy/clipfrac_low_avg": below,
    }


def reinforce_loss(
    logprobs: Float[Array, "B R"],
    advantages: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    count: Scalar,
    weights: Float[Array, "B R"],
) -> tuple[Float[Array, ""], Metrics]:
    """REINFORCE: -1 / count  sum_t w_t A_t log pi_t, for one optimizer step per rollout (Williams 1992).

    Its gradient is that of the expected reward; its value has no meaning.
    """
    advantages, weights = masked.keep(advantages, mask), masked.keep(weights, mask)
    loss = -jnp.sum(weights * advantages * masked.keep(logprobs, mask)) / count
    return loss, {"loss/policy_avg": loss}

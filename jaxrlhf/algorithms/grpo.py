"""Policy losses for the advantages of groups.py. GRPO and its variants use PPO's clipped surrogate:

GRPO      ppo.policy_loss, token_weights "sequence"     https://arxiv.org/abs/2402.03300, eq. 3
Dr. GRPO  ppo.policy_loss, token_weights "constant"     https://arxiv.org/abs/2503.20783
DAPO      ppo.policy_loss, token_weights "token",       https://arxiv.org/abs/2503.14476, eq. 8
          clip.high > clip.low, `scores.overlong_penalty`
GSPO      gspo_loss, token_weights "sequence"           https://arxiv.org/abs/2507.18071, eq. 5 and 13
CISPO     cispo_loss, token_weights "token"             https://arxiv.org/abs/2506.13585, eq. 4
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

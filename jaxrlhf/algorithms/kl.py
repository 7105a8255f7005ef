"""Estimators of KL(pi || ref) per token from samples of pi (J. Schulman, http://joschu.net/blog/kl-approx.html, 2020).

d = log pi(a) - log ref(a), a ~ pi. k1, k2 and k3 are elementwise and take no mask. The right one depends on its use:

    in the reward    only k1 has the gradient of the KL. The score-function gradient of E[k2] and E[k3] lacks their
                     pathwise term and almost vanishes near the reference.
    in the loss      k2 has the gradient of the KL, k3 only with importance weights. The expected
                     gradient of k1 is 0.

The config refuses the other combinations. `kl_estimator: exact` estimates nothing: it is the divergence over the whole
vocabulary (distillation.py) in each context of the rollout.
"""

from typing import Literal

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Metrics, Scalar


def k1(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """d. Unbiased; a single sample may be negative."""
    chex.assert_equal_shape([logprobs, ref_logprobs])
    return logprobs - ref_logprobs


def k2(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """d^2 / 2. Biased, but its pathwise gradient is that of the KL."""
    return 0.5 * jnp.square(k1(logprobs, ref_logprobs))


def k3(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """exp(-d) - 1 + d. Unbiased and never negative."""
    d = k1(logprobs, ref_logprobs)
    return jnp.expm1(-d) + d


def kl_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    ref_logprobs: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    count: Scalar,
    estimator: Literal["k2", "k3"],
    weights: Float[Array, "B R"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """KL penalty as a term of the loss, in nats per token, before it is multiplied by kl_coef.

        loss = 1 / count  sum_t w_t k2_t    or    1 / count  sum_t w_t rho_t k3_t,    rho = exp(log pi - log pi_old)

    For tokens sampled from pi_old, the expected gradient is that of KL(pi || ref) in the contexts of the rollout: with
    k2 only while pi is pi_old, with k3, whose gradient also flows through rho, for any pi. The effect of a token on the
    KL of later tokens is not included (it is for a KL in the reward). `count` is the number of real tokens of the whole
    optimizer batch; `weights` are extra token weights (None: 1).
    """
    logprobs, old_logprobs, ref_logprobs = (masked.keep(x, mask) for x in (logprobs, old_logprobs, ref_logprobs))
    if estimator == "k2":
        terms = k2(logprobs, ref_logprobs)
    else:
        terms = jnp.exp(logprobs - old_logprobs) * k3(logprobs, ref_logprobs)
    loss = jnp.sum(terms if weights is None else terms * masked.keep(weights, mask)) / count
    return loss, {"loss/kl_avg": loss}


def adaptive_kl_coef(
    kl_coef: Float[Array, ""], kl: Float[Array, ""], target: Scalar | None, horizon: Scalar, episodes: Scalar
) -> Float[Array, ""]:
    """KL coefficient after `episodes` responses with a mean KL of `kl` nats (https://arxiv.org/abs/1909.08593, 2.2).

        kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon)

    Unchanged without a target, or if `kl` is not finite.
    """
    chex.assert_rank([kl_coef, kl], 0)
    if target is None:
        return kl_coef
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + jnp.where(jnp.isfinite(error), error, 0.0) * episodes / horizon)

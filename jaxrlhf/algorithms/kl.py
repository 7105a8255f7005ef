"""Per-token estimators of KL(pi || ref) from samples of pi (J. Schulman, http://joschu.net/blog/kl-approx.html, 2020).

With d = log pi(a) - log ref(a), a ~ pi. All three are elementwise and know no mask. Which one is right depends on where
it is used: as a *reward* only k1 has the gradient of the KL (the score-function gradient of E[k2] and E[k3] lacks their
pathwise term and almost vanishes near the reference); as a *loss*, k1 has zero expected gradient, k2 has the right one,
and k3 only together with importance weights. Configs refuse the other pairs.
"""

from typing import Literal

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Scalar


def k1(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """d. Unbiased; a single sample may be negative."""
    return logprobs - ref_logprobs


def k2(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """d^2 / 2. Biased, but its pathwise gradient is that of the KL."""
    return 0.5 * jnp.square(logprobs - ref_logprobs)


def k3(logprobs: Float[Array, "*shape"], ref_logprobs: Float[Array, "*shape"]) -> Float[Array, "*shape"]:
    """exp(-d) - 1 + d. Unbiased and never negative."""
    d = logprobs - ref_logprobs
    return jnp.expm1(-d) + d


def kl_loss(
    logprobs: Float[Array, "B R"],
    old_logprobs: Float[Array, "B R"],
    ref_logprobs: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    count: Scalar,
    estimator: Literal["k2", "k3"],
    weights: Float[Array, "B R"] | None = None,
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """The KL as a term of the loss, in nats per token, to be multiplied by kl_coef.

        loss = 1 / count  sum_t w_t k2_t    or    1 / count  sum_t w_t rho_t k3_t,    rho = exp(log pi - log pi_old)

    For tokens drawn from pi_old, the expected gradient is that of KL(pi || ref) in the contexts of the rollout: for k2
    while pi is pi_old (later steps weigh tokens as pi_old drew them), for k3, whose gradient also flows through rho,
    at any pi. What a token does to the KL of later ones is not in it, as it is for a KL in the reward. `count` is the
    number of real tokens of the whole optimizer batch; `weights` are what tokens count otherwise, none: 1.
    """
    logprobs, old_logprobs, ref_logprobs = (masked.keep(x, mask) for x in (logprobs, old_logprobs, ref_logprobs))
    if estimator == "k2":
        terms = k2(logprobs, ref_logprobs)
    else:
        terms = jnp.exp(logprobs - old_logprobs) * k3(logprobs, ref_logprobs)
    loss = jnp.sum(terms if weights is None else terms * masked.keep(weights, mask)) / count
    return loss, {"loss/kl_avg": loss}


def adaptive_kl_coef(
    kl_coef: Float[Array, ""], kl: Float[Array, ""], target: float | None, horizon: float, episodes: int
) -> Float[Array, ""]:
    """The coefficient after `episodes` responses with a mean KL of `kl` nats (https://arxiv.org/abs/1909.08593, 2.2).

        kl_coef (1 + clip(kl / target - 1, -0.2, 0.2) episodes / horizon)

    Without a target it stays. A KL that is not finite changes nothing.
    """
    if target is None:
        return kl_coef
    error = jnp.clip(kl / target - 1, -0.2, 0.2)
    return kl_coef * (1 + jnp.where(jnp.isfinite(error), error, 0.0) * episodes / horizon)

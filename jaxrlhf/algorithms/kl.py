"""Per-token estimators of KL(pi || ref) from samples of pi (J. Schulman, http://joschu.net/blog/kl-approx.html, 2020).

With d = log pi(a) - log ref(a), a ~ pi. All three are elementwise and know no mask. Which one is right depends on where
it is used: as a *reward* only k1 has the gradient of the KL (the score-function gradient of E[k2] and E[k3] lacks their
pathwise term and almost vanishes near the reference); as a *loss*, k1 has zero expected gradient, k2 has the right one,
and k3 only together with importance weights.
"""

import jax.numpy as jnp
from jaxtyping import Array, Float


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

"""Advantages from token rewards and values."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Scalar

VARIANCE_FLOOR = 1e-8  # added to the variance, as in TRL


def gae(
    rewards: Float[Array, "B R"],
    values: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    bootstrap: Float[Array, " B"],
    gamma: Scalar,
    lam: Scalar | Float[Array, " B"],
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """Generalised advantage estimation: advantages and returns (https://arxiv.org/abs/1506.02438, eq. 16).

        A_t = delta_t + gamma lam A_t+,   delta_t = r_t + gamma V_t+ - V_t,   return_t = A_t + V_t

    t+ is the next *real* token: masked columns (padding, and gaps such as tool output) are skipped, and their rewards
    and values are never read. After the last real token A is 0 and V is `bootstrap`: 0 for a finished response, the
    value of the next state for a truncated one. Both results are 0 outside the mask. `lam` may differ between rows.
    """
    chex.assert_shape(bootstrap, rewards.shape[:1])
    assert jnp.shape(lam) in ((), bootstrap.shape)

    def step(carry, column):
        advantage_next, value_next = carry
        reward, value, real = column
        advantage = reward + gamma * value_next - value + gamma * lam * advantage_next
        carry = jnp.where(real, advantage, advantage_next), jnp.where(real, value, value_next)
        return carry, jnp.where(real, advantage, 0.0)

    rewards, values = masked.keep(rewards, mask), masked.keep(values, mask)
    end = jnp.zeros_like(bootstrap), bootstrap
    _, advantages = jax.lax.scan(step, end, (rewards.T, values.T, mask.T), reverse=True)
    return advantages.T, advantages.T + values


def length_adaptive_lambda(mask: Bool[Array, "B R"], alpha: Scalar) -> Float[Array, " B"]:
    """Lambda of each response for `gae`: 1 - 1 / (alpha length), at least 0 (https://arxiv.org/abs/2504.05118).

    The sum of the weights (1 - lam) lam^n with which later TD errors count is then spread over alpha length tokens.
    """
    chex.assert_rank(mask, 2)
    return jnp.maximum(1 - 1 / (alpha * jnp.maximum(jnp.sum(mask, axis=1), 1)), 0.0)


def td_errors(
    rewards: Float[Array, "B R"],
    values: Float[Array, "B R"],
    mask: Bool[Array, "B R"],
    bootstrap: Float[Array, " B"],
    gamma: Scalar,
) -> Float[Array, "B R"]:
    """Temporal-difference errors delta_t = r_t + gamma V_t+ - V_t of `gae`, which they are with lam = 0."""
    return gae(rewards, values, mask, bootstrap, gamma, 0.0)[0]


def reward_to_go(
    rewards: Float[Array, "B R"], mask: Bool[Array, "B R"], bootstrap: Float[Array, " B"], gamma: Scalar
) -> Float[Array, "B R"]:
    """Discounted sum of rewards: sum_k gamma^k r_t+k over the n real tokens from t on, plus gamma^n `bootstrap`.

    The same as `gae` with lam = 1 and values of 0.
    """
    return gae(rewards, jnp.zeros_like(rewards), mask, bootstrap, gamma, 1.0)[0]


def whiten(x: Float[Array, "*shape"], mask: Bool[Array, "*shape"], shift_mean: bool) -> Float[Array, "*shape"]:
    """Scale `x` to a standard deviation of 1 under the mask; 0 elsewhere. The mean becomes 0 only with `shift_mean`.

    Call it on the whole batch, not on a micro-batch or one device's shard. As in TRL, the variance is the unbiased one
    (divided by n - 1) plus 1e-8. The variance of a single real token is taken as 0.
    """
    n = jnp.sum(mask)
    mean = masked.total(x, mask) / jnp.maximum(n, 1)
    centred = masked.keep(x - mean, mask)
    unit = masked.power_of_two(jnp.max(jnp.abs(centred), initial=0.0))
    variance = jnp.sum(jnp.square(centred / unit)) / jnp.maximum(n - 1, 1)  # in units: it does not overflow
    scaled = centred / unit * jax.lax.rsqrt(variance + VARIANCE_FLOOR / unit / unit)
    return scaled if shift_mean else masked.keep(scaled + mean, mask)

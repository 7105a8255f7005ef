"""Reward models from preference pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrlhf.algorithms.masked import Scalar


def pairwise_loss(
    chosen: Float[Array, " B"], rejected: Float[Array, " B"], count: Scalar
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Bradley-Terry: -1/count sum log sigmoid(chosen - rejected) (https://arxiv.org/abs/2203.02155, eq. 1).

    `count` is the number of pairs of the whole optimizer batch. A tie is not accurate: a model that answers a constant
    has accuracy 0.
    """
    margin = chosen - rejected
    loss = -jnp.sum(jax.nn.log_sigmoid(margin)) / count
    return loss, {
        "loss": loss,
        "accuracy": jnp.sum(margin > 0) / count,
        "margin": jnp.sum(margin) / count,
        "mean_reward": 0.5 * jnp.sum(chosen + rejected) / count,
    }

"""Reward models from preference pairs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Scalar


def pairwise_loss(
    chosen: Float[Array, "*shape"], rejected: Float[Array, "*shape"], mask: Bool[Array, "*shape"], count: Scalar
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Bradley-Terry: -1/count sum log sigmoid(chosen - rejected) (https://arxiv.org/abs/2203.02155, eq. 1).

    `mask` says which entries are pairs, and `count` is the number of pairs of the whole optimizer batch. A tie is not
    accurate: a model that answers a constant has accuracy 0.
    """
    margin = masked.keep(chosen - rejected, mask)
    loss = -masked.total(jax.nn.log_sigmoid(margin), mask) / count
    return loss, {
        "loss": loss,
        "accuracy": jnp.sum(margin > 0) / count,
        "margin": jnp.sum(margin) / count,
        "mean_reward": 0.5 * masked.total(chosen + rejected, mask) / count,
    }

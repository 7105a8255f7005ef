"""Supervised fine-tuning."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Metrics, Scalar


def sft_loss(
    logprobs: Float[Array, "B T"], entropy: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], count: Scalar
) -> tuple[Float[Array, ""], Metrics]:
    """Cross-entropy -1/count sum log p(token) over `loss_mask`, in nats per token.

    `count` is the number of tokens in the loss masks of the whole optimizer batch, so every token has the same weight,
    whatever the length of its row. Column t of every argument belongs to the same predicted token.
    """
    loss = -jnp.sum(masked.keep(logprobs, loss_mask)) / count
    return loss, {"loss": loss, "entropy": masked.total(entropy, loss_mask) / count}

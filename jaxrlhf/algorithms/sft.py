"""Supervised fine-tuning."""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Scalar


def sft_loss(
    logprobs: Float[Array, "B T"], entropy: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], count: Scalar
) -> tuple[Float[Array, ""], dict[str, Float[Array, ""]]]:
    """Cross-entropy of the tokens to learn: -1/count sum log p(token), in nats per token.

    `count` is the number of tokens to learn in the whole optimizer batch, not a mean of means: long rows weigh as many
    tokens as they have. Column t of every argument is about the same predicted token.
    """
    loss = -jnp.sum(masked.keep(logprobs, loss_mask)) / count
    return loss, {"loss": loss, "entropy": masked.total(entropy, loss_mask) / count}

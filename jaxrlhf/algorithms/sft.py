"""Supervised fine-tuning."""

import jax
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


def dft_loss(
    logprobs: Float[Array, "B T"], entropy: Float[Array, "B T"], loss_mask: Bool[Array, "B T"], count: Scalar
) -> tuple[Float[Array, ""], Metrics]:
    """Dynamic fine-tuning: -1/count sum sg(p) log p over `loss_mask`, p = p(token) (https://arxiv.org/abs/2508.05629).

    sg stops the gradient. The weight p keeps tokens that the model finds improbable from dominating the gradient.
    Arguments are those of `sft_loss`.
    """
    kept = masked.keep(logprobs, loss_mask)
    loss = -masked.total(jax.lax.stop_gradient(jnp.exp(kept)) * kept, loss_mask) / count
    return loss, {"loss": loss, "entropy": masked.total(entropy, loss_mask) / count}

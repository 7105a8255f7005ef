"""The load-balancing loss of a mixture of experts."""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Float


def load_balancing_loss(
    choices: Float[Array, " E"], probabilities: Float[Array, " E"], experts_per_token: int
) -> Float[Array, ""]:
    """E Σ_e f_e P_e, where f_e is the number of choices of expert e per token, and P_e its mean probability (Switch
    Transformers, https://arxiv.org/abs/2101.03961, eq. 4 to 6, with several experts per token as in transformers).

    `choices` and `probabilities` are sums over tokens, and over layers, as if each layer had tokens of its own. With
    the `choices` of a whole batch, the losses of parts add up to that of the batch: it is linear in `probabilities`,
    through which alone gradients flow. It is `experts_per_token` if all experts have the same share, and 0 without
    tokens.
    """
    chex.assert_rank([choices, probabilities], 1)
    chex.assert_equal_shape([choices, probabilities])
    tokens = jnp.maximum(jnp.sum(choices), 1) / experts_per_token
    return len(choices) * jnp.sum(choices / tokens * probabilities / tokens)

"""Divergences between the next-token distributions of a teacher and a student."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrlhf.algorithms.masked import Scalar
from jaxrlhf.config.base import constant


def token_divergences(
    student: Float[Array, "*tokens V"], teacher: Float[Array, "*tokens V"], beta: Scalar, temperature: Scalar = 1.0
) -> dict[str, Float[Array, "*tokens"]]:
    """`loss`, `forward_kl` and `reverse_kl`, in nats, `entropy` and `teacher_entropy`, and `agreement` (1 where the
    most probable tokens are the same), for each token, from logits.

    With p = softmax(teacher / temperature) and q = softmax(student / temperature), the loss is

        beta = 0        KL(p, q), forward_kl
        beta = 1        KL(q, p), reverse_kl
        0 < beta < 1    beta KL(p, m) + (1 - beta) KL(q, m),   m = beta p + (1 - beta) q

    the generalised Jensen-Shannon divergence (https://arxiv.org/abs/2306.13649, eq. 1; TRL's `generalized_jsd_loss`).
    For a small beta it is about beta times the forward KL, for one near 1 about 1 - beta times the reverse KL. Only the
    loss has a gradient, and only to the student.
    """
    chex.assert_equal_shape((student, teacher))
    log_q = jax.nn.log_softmax(student / temperature)
    log_p = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)

    def kl(a: Array, b: Array) -> Array:
        return jnp.sum(jnp.exp(a) * (a - b), axis=-1)

    if constant(beta, 0):
        loss = kl(log_p, log_q)
    elif constant(beta, 1):
        loss = kl(log_q, log_p)
    else:
        log_m = jnp.logaddexp(jnp.log(beta) + log_p, jnp.log1p(-beta) + log_q)
        loss = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    fixed = jax.lax.stop_gradient(log_q)
    return {
        "loss": loss,
        "forward_kl": kl(log_p, fixed),
        "reverse_kl": kl(fixed, log_p),
        "entropy": -jnp.sum(jnp.exp(fixed) * fixed, axis=-1),
        "teacher_entropy": -jnp.sum(jnp.exp(log_p) * log_p, axis=-1),
        "agreement": (jnp.argmax(fixed, axis=-1) == jnp.argmax(log_p, axis=-1)).astype(jnp.float32),
    }

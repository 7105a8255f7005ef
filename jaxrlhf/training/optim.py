"""From an `Optim` section to an optax chain."""

import functools
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrlhf.config import Optim
from jaxrlhf.sharding import path_of
from jaxrlhf.types import Params

DECAYED = ("kernel", "embedding", "/a", "/b")  # matrices, those of adapters too


def schedule(config: Optim, learning_rate: float, total_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up from 0, then constant, or down to the final share at the end."""
    final = learning_rate * config.final_lr_fraction
    steps = max(total_steps - config.warmup_steps, 1)
    after = {
        "constant": optax.constant_schedule(learning_rate),
        "linear": optax.linear_schedule(learning_rate, final, steps),
        "cosine": optax.cosine_decay_schedule(learning_rate, steps, config.final_lr_fraction),
    }[config.schedule]
    if not config.warmup_steps:
        return after
    # Step 0 already moves: a warm-up of n reaches the full rate at step n.
    warmup = optax.linear_schedule(learning_rate / (config.warmup_steps + 1), learning_rate, config.warmup_steps)
    return optax.join_schedules([warmup, after], [config.warmup_steps])


@dataclass(frozen=True, eq=False)
class Optimizer:
    """A role's optimizer. Compared by identity, so that it can be a static argument of a jitted update."""

    chain: optax.GradientTransformationExtraArgs
    max_grad_norm: float  # clipping is done in training/step.py, which reports the norm before and after
    rate: optax.Schedule

    def rate_of(self, opt_state: Any) -> Any:
        """The learning rate that the next step applies. Steps that were skipped do not count."""
        return self.rate(opt_state[-1].count)


@functools.cache  # equal arguments give the same object, so that a second trainer finds the first one's programs
def make_optimizer(config: Optim, learning_rate: float, total_steps: int) -> Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101) on a schedule; decay touches matrices and embeddings only."""
    rate = schedule(config, learning_rate, total_steps)
    chain = optax.chain(
        scale_by_adam(config.beta1, config.beta2, config.eps),
        optax.add_decayed_weights(config.weight_decay, mask=_decayed) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(rate),
    )
    return Optimizer(chain, config.max_grad_norm, rate)


def scale_by_adam(beta1: float, beta2: float, eps: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` in the memory of one state. Its update takes `finite`; where false, moments and count stay.

    XLA would compute the update from the old moments while it writes the new ones, and so keep a second copy of them;
    a barrier between the two makes it read what was written.
    """
    plain = optax.scale_by_adam(beta1, beta2, eps)

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        finite: Array = extra["finite"]

        def moment(decay: float, old: Array, new: Array) -> Array:
            return jnp.where(finite, (1 - decay) * new + decay * old, old)

        mu = jax.tree.map(lambda m, g: moment(beta1, m, g), state.mu, updates)
        nu = jax.tree.map(lambda v, g: moment(beta2, v, g * g), state.nu, updates)
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        count = state.count + finite
        first, second = optax.tree.bias_correction(mu, beta1, count), optax.tree.bias_correction(nu, beta2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), first, second)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(plain.init, update)


def _decayed(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda keys, _: path_of(keys).endswith(DECAYED), params)

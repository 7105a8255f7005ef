"""Optimizers: an optax chain from an `Optim` section."""

import functools
import zlib
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.config import Optim
from jaxrlhf.training.muon import kinds, scale_by_muon
from jaxrlhf.types import Params

DECAYED = ("kernel", "embedding", "/a", "/b")  # matrices, adapters included


def schedule(config: Optim, learning_rate: float, total_steps: int) -> optax.Schedule:
    """Learning rate by optimizer step: linear warm-up from 0, then `schedule`, with a decay to `final_lr_fraction`."""
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


def warmup_warnings(config: Optim, steps: int) -> list[str]:
    """A warning if the warm-up does not end within the `steps` of a run."""
    if config.warmup_steps < steps:
        return []
    highest = np.asarray(schedule(config, config.learning_rate, steps)(steps - 1))
    return [
        f"warning: optim.warmup_steps ({config.warmup_steps}) does not end within the {steps} optimizer steps of this "
        f"run: the learning rate reaches {highest:.1e} of {config.learning_rate:.1e}"
    ]


@dataclass(frozen=True, eq=False)
class Optimizer:
    """A role's optimizer; compared by identity, so that it can be a static argument of jit."""

    chain: optax.GradientTransformationExtraArgs
    max_grad_norm: float  # applied by training/step.py, which reports the norm before and after
    rate: optax.Schedule

    def rate_of(self, opt_state: Any) -> Any:
        """The learning rate of the next step. Skipped steps do not count."""
        return self.rate(opt_state[-1].count)


@functools.cache  # equal arguments give the same object, so that a second trainer reuses compiled programs
def make_optimizer(config: Optim, learning_rate: float, total_steps: int) -> Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101) or Muon on a schedule; decay touches matrices and embeddings only."""
    rate = schedule(config, learning_rate, total_steps)
    scale = scale_by_adam(config.beta1, config.beta2, config.eps, config.state_dtype)
    if config.name == "muon":
        scale = optax.partition({"adamw": scale, "muon": scale_by_muon(config.momentum, config.state_dtype)}, kinds)
    chain = optax.chain(
        scale,
        optax.add_decayed_weights(config.weight_decay, mask=_decayed) if config.weight_decay else optax.identity(),
        optax.scale_by_learning_rate(rate),
    )
    return Optimizer(chain, config.max_grad_norm, rate)


def scale_by_adam(beta1: float, beta2: float, eps: float, dtype: str) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam` with moments in `dtype`, updated in place. Its update takes `finite`; if that is False,
    moments and count stay unchanged.

    Without the barrier XLA would compute the update from the old moments while writing the new ones, and keep a second
    copy of them.

    In bfloat16 the first moment rounds to nearest, as in optax. The second changes by 1 - beta2 of itself per step,
    less than half a unit in the last place of bfloat16, so that it would never change: it rounds stochastically.
    """

    def init(params: Any) -> optax.ScaleByAdamState:
        return optax.ScaleByAdamState(
            count=jnp.zeros([], jnp.int32),
            mu=optax.tree.zeros_like(params, dtype=dtype),
            nu=optax.tree.zeros_like(params, dtype=dtype),
        )

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        finite: Array = extra["finite"]
        count = state.count + finite

        def moment(decay: float, old: Array, new: Array) -> Array:
            return (1 - decay) * new + decay * old.astype(jnp.float32)

        def first(m: Array, g: Array) -> Array:
            return jnp.where(finite, moment(beta1, m, g).astype(dtype), m)

        def second(keys: Any, v: Array, g: Array) -> Array:
            new = moment(beta2, v, g * g)
            if dtype == "bfloat16":
                new = stochastic_round(
                    new, _mix(count.astype(jnp.uint32)) ^ np.uint32(zlib.crc32(sharding.path_of(keys).encode()))
                )
            return jnp.where(finite, new, v)

        mu = jax.tree.map(first, state.mu, updates)
        nu = jax.tree_util.tree_map_with_path(second, state.nu, updates)
        mu, nu = jax.lax.optimization_barrier((mu, nu))
        mean = optax.tree.bias_correction(optax.tree.cast(mu, jnp.float32), beta1, count)
        square = optax.tree.bias_correction(optax.tree.cast(nu, jnp.float32), beta2, count)
        updates = jax.tree.map(lambda m, v: m / (jnp.sqrt(v) + eps), mean, square)
        return updates, optax.ScaleByAdamState(count=count, mu=mu, nu=nu)

    return optax.GradientTransformationExtraArgs(init, update)


def stochastic_round(x: Array, seed: Array) -> Array:
    """Non-negative float32 `x` rounded stochastically to bfloat16, with mean `x` (https://arxiv.org/abs/2010.06192).

    The bits are a hash of `seed`, uint32 [], and an element's index, the same on any mesh; random bits of jax.random
    would take as much memory as `x` in float32.
    """
    noise = _mix(sharding.element_indices(x.shape, _mix(seed))) >> 16
    bits = jax.lax.bitcast_convert_type(x, jnp.uint32) + noise  # carries into the kept bits as often as x is above them
    return jax.lax.bitcast_convert_type((bits >> 16).astype(jnp.uint16), jnp.bfloat16)


def _mix(x: Array) -> Array:
    """MurmurHash3's finaliser, uint32 to uint32 (https://github.com/aappleby/smhasher)."""
    x = (x ^ (x >> 16)) * np.uint32(0x85EBCA6B)
    x = (x ^ (x >> 13)) * np.uint32(0xC2B2AE35)
    return x ^ (x >> 16)


def _decayed(params: Params) -> Params:
    return jax.tree_util.tree_map_with_path(lambda keys, _: sharding.path_of(keys).endswith(DECAYED), params)

"""Optimizers: an optax chain from an `Optim` section."""

import zlib
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import Array
from jax.typing import ArrayLike

from jaxrlhf import sharding
from jaxrlhf.config import Optim
from jaxrlhf.config.base import constant
from jaxrlhf.errors import ConfigError
from jaxrlhf.traced import settings
from jaxrlhf.training.muon import kinds, scale_by_muon
from jaxrlhf.types import Params

DECAYED = ("kernel", "embedding", "/a", "/b")  # matrices, adapters included


@settings("steps", "each")
@dataclass(frozen=True, kw_only=True)
class Ramp:
    """A number by step, `factor` (`span` share + `end`): the share goes from 1 to 0 over `steps`, in a straight line or
    as half a cosine."""

    shape: Literal["constant", "linear", "cosine"]
    factor: float = 1.0
    span: float = 1.0
    end: float = 0.0
    steps: float = 1.0
    each: float = 1.0  # part of the way of a step: 1 / steps, of half a cosine pi / steps

    def __call__(self, step: ArrayLike) -> ArrayLike:
        if self.shape == "constant":
            return self.factor
        done = jnp.clip(step, 0, self.steps)
        straight = self.shape == "linear"
        share = 1 - done * self.each if straight else 0.5 * (1 + jnp.cos(done * self.each))
        return self.factor * (self.span * share + self.end)


def ramp(shape: Literal["constant", "linear", "cosine"], start: float, end: float, steps: int) -> Ramp:
    """A number that goes from `start` to `end` within `steps`, and stays there."""
    inverse = np.float32(1) / np.float32(steps)
    if shape == "constant":
        return Ramp(shape=shape, factor=start)
    if shape == "linear":
        return Ramp(shape=shape, span=start - end, end=end, steps=float(steps), each=float(inverse))
    each, share = float(np.float32(np.pi) * inverse), end / start
    return Ramp(shape=shape, factor=start, span=1 - share, end=share, steps=float(steps), each=each)


@settings("warmup_steps")
@dataclass(frozen=True, kw_only=True)
class Schedule:
    """Learning rate by optimizer step: a linear warm-up, then another ramp."""

    warmup: Ramp | None
    warmup_steps: float
    after: Ramp

    def __call__(self, step: ArrayLike) -> ArrayLike:
        if self.warmup is None:
            return self.after(step)
        step = jnp.asarray(step)
        return jnp.where(step < self.warmup_steps, self.warmup(step), self.after(step - self.warmup_steps))


def schedule(config: Optim, learning_rate: float, total_steps: int) -> Schedule:
    """Learning rate by optimizer step: linear warm-up from 0, then `schedule`, with a decay to `final_lr_fraction`."""
    final, warmup = learning_rate * config.final_lr_fraction, None
    if config.warmup_steps:
        # Step 0 already moves: a warm-up of n reaches the full rate at step n.
        warmup = ramp("linear", learning_rate / (config.warmup_steps + 1), learning_rate, config.warmup_steps)
    after = ramp(config.schedule, learning_rate, final, max(total_steps - config.warmup_steps, 1))
    return Schedule(warmup=warmup, warmup_steps=float(config.warmup_steps), after=after)


def warmup_warnings(config: Optim, steps: int) -> list[str]:
    """A warning if the warm-up does not end within the `steps` of a run."""
    if config.warmup_steps < steps:
        return []
    highest = np.asarray(schedule(config, config.learning_rate, steps)(steps - 1))
    return [
        f"warning: optim.warmup_steps ({config.warmup_steps}) does not end within the {steps} optimizer steps of this "
        f"run: the learning rate reaches {highest:.1e} of {config.learning_rate:.1e}"
    ]


class Average(NamedTuple):
    """Coefficients of a moving average: decay old + rest new."""

    decay: float
    rest: float  # 1 - decay


def average(decay: float) -> Average:
    """The coefficients of a decay rate."""
    return Average(decay, 1 - decay)  # in float64: in float32 1 - 0.999 is off by 5e-5


@settings()
@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """A role's optimizer."""

    name: Literal["adamw", "muon"]
    state_dtype: Literal["float32", "bfloat16"]
    rate: Schedule
    beta1: Average
    beta2: Average
    eps: float
    momentum: Average
    weight_decay: float
    max_grad_norm: float  # applied by training/step.py, which reports the norm before and after

    @property
    def chain(self) -> optax.GradientTransformationExtraArgs:
        scale = scale_by_adam(self.beta1, self.beta2, self.eps, self.state_dtype)
        if self.name == "muon":
            scale = optax.partition({"adamw": scale, "muon": scale_by_muon(*self.momentum, self.state_dtype)}, kinds)
        decays = not constant(self.weight_decay, 0)
        return optax.chain(
            scale,
            optax.add_decayed_weights(self.weight_decay, mask=_decayed) if decays else optax.identity(),
            optax.scale_by_learning_rate(self.rate),
        )

    def rate_of(self, opt_state: Any) -> Any:
        """The learning rate of the next step. Skipped steps do not count."""
        return self.rate(opt_state[-1].count)


def make_optimizer(config: Optim, learning_rate: float, total_steps: int) -> Optimizer:
    """AdamW (https://arxiv.org/abs/1711.05101) or Muon on a schedule; decay touches matrices and embeddings only.

    Raises ConfigError for more steps than can be counted.
    """
    if total_steps >= 2**31:
        raise ConfigError(
            f"the run would have {total_steps:.3g} optimizer steps, which are counted in 32 bits; give it fewer "
            "epochs, steps or episodes"
        )
    return Optimizer(
        name=config.name,
        state_dtype=config.state_dtype,
        rate=schedule(config, learning_rate, total_steps),
        beta1=average(config.beta1),
        beta2=average(config.beta2),
        eps=config.eps,
        momentum=average(config.momentum),
        weight_decay=config.weight_decay,
        max_grad_norm=config.max_grad_norm,
    )


def scale_by_adam(beta1: Average, beta2: Average, eps: float, dtype: str) -> optax.GradientTransformationExtraArgs:
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

        def moment(beta: Average, old: Array, new: Array) -> Array:
            return beta.rest * new + beta.decay * old.astype(jnp.float32)

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
        mean = optax.tree.bias_correction(optax.tree.cast(mu, jnp.float32), beta1.decay, count)
        square = optax.tree.bias_correction(optax.tree.cast(nu, jnp.float32), beta2.decay, count)
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

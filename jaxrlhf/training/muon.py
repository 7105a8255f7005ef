"""Muon: orthogonalised momentum of matrices (K. Jordan et al., 2024, https://kellerjordan.github.io/posts/muon)."""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.types import Params

RMS = 0.2  # of an update's elements, that of AdamW's (https://arxiv.org/abs/2502.16982, section 2.2)
_AXES = optax.contrib.MuonDimensionNumbers(reduction_axis=-2, output_axis=-1)
_NEWTON_SCHULZ = optax.contrib.scale_by_muon(beta=0.0, nesterov=False, weight_dimension_numbers=_AXES)
"""Without momentum, which is applied here, so that steps can be skipped and moments updated in place."""


class MomentumState(NamedTuple):
    """Number of steps, and the average of the gradients."""

    steps: Array  # int32 []
    mu: Any


def kinds(params: Params) -> Params:
    """muon for the matrices of layers, of which each layer's (and each expert's) is one; adamw for embeddings, heads,
    routers, norms, biases and adapters."""

    def kind(keys: Any, _: Any) -> str:
        path = sharding.path_of(keys)
        matrix = path.startswith("layers/") and path.endswith("/kernel") and "router" not in path
        return "muon" if matrix else "adamw"

    return jax.tree_util.tree_map_with_path(kind, params)


def scale_by_muon(momentum: float, rest: float, dtype: str) -> optax.GradientTransformationExtraArgs:
    """Muon for stacks of matrices [..., in, out], with moments in `dtype`, scaled to the size of AdamW's updates.

        M <- momentum M + rest G
        update = 0.2 sqrt(max(in, out)) NewtonSchulz(momentum M + rest G)

    with `rest` = 1 - momentum and with bias corrections, as in `optax.contrib.muon`. The elements of an update have a
    root mean square of about 0.2, as those of AdamW, so that a learning rate and weight decay serve both
    (https://arxiv.org/abs/2502.16982). Its update takes `finite`; if that is False, moments and count stay unchanged.
    """

    def init(params: Any) -> MomentumState:
        return MomentumState(jnp.zeros([], jnp.int32), optax.tree.zeros_like(params, dtype=dtype))

    def update(updates: Any, state: Any, params: Any = None, **extra: Any) -> Any:
        finite: Array = extra["finite"]
        steps = state.steps + finite

        def average(m: Array, g: Array) -> Array:
            return jnp.where(finite, momentum * m.astype(jnp.float32) + rest * g, m).astype(dtype)

        mu = jax.lax.optimization_barrier(jax.tree.map(average, state.mu, updates))  # updated in place, as in Adam
        ahead = optax.tree.bias_correction(optax.tree.cast(mu, jnp.float32), momentum, steps + 1)
        now = optax.tree.bias_correction(updates, momentum, steps)

        def orthogonal(m: Array, g: Array) -> Array:
            direction = momentum * m + rest * g
            return RMS * max(m.shape[-2:]) ** 0.5 * _NEWTON_SCHULZ.update(direction, _NEWTON_SCHULZ.init(direction))[0]

        return jax.tree.map(orthogonal, ahead, now), MomentumState(steps, mu)

    return optax.GradientTransformationExtraArgs(init, update)

"""The two halves of an optimizer step: gradients summed over micro-batches, and an update that a NaN cannot enter."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrlhf.models import ModelConfig
from jaxrlhf.training.optim import Optimizer
from jaxrlhf.types import Params, TrainState

Metrics = dict[str, Array]
Loss = Callable[[Any, Any], tuple[Array, Metrics]]


def to_micro_batches(batch: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...] for every leaf. Strided, so that each device keeps its rows in every part."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def from_micro_batches(parts: Any) -> Any:
    """The inverse of `to_micro_batches`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), parts)


def in_float32(tree: Params) -> Params:
    """The tree in float32: gradients are added up, and moments kept, in float32, however parameters are stored."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def gradients(loss: Loss, params: Params, batch: Any, num_micro: int) -> tuple[Params, Metrics]:
    """Gradients and metrics of `loss(params, batch)` over `num_micro` slices of the batch.

    `loss` is a sum over rows divided by a count of the WHOLE batch, so slices add up to the undivided result. Metrics
    whose key ends in `_max` are combined by maximum, all others by addition.
    """

    def grad(rows: Any) -> tuple[Params, Metrics]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, rows)
        return in_float32(grads), metrics | {"loss": value}

    if num_micro == 1:
        return grad(batch)

    def micro(grads: Params, rows: Any) -> tuple[Params, Metrics]:
        new, metrics = grad(rows)
        return jax.tree.map(jnp.add, grads, new), metrics

    zeros = jax.tree.map(jnp.zeros_like, in_float32(params))
    grads, stacked = jax.lax.scan(micro, zeros, to_micro_batches(batch, num_micro))
    return grads, {k: v.max(0) if k.endswith("_max") else v.sum(0) for k, v in stacked.items()}


def dropout_keys(model: ModelConfig, key: Array, step: Array, *, rows: int) -> Array | None:
    """A key for each row of a batch of `rows`, if anything in the model drops: it must not depend on how rows are cut
    into micro-batches. `key` is the run's."""
    if model.head != "mlp" and not (model.adapters and model.adapters.dropout):
        return None
    return jax.random.split(jax.random.fold_in(key, step), rows)


def apply(
    state: TrainState,
    grads: dict[str, Params],
    loss: Array,
    optimizers: tuple[tuple[str, Optimizer], ...],
    accept: dict[str, Array] | None = None,
) -> tuple[TrainState, Metrics]:
    """One optimizer step for every role, or none: a non-finite loss or gradient leaves the state as it was, to the bit.

    So does a role that `accept` says false of, on its own. Each role's gradient is scaled down to its optimizer's
    `max_grad_norm` when its global norm is larger. Returns the new state (its `step` untouched) and per role that norm
    before and after and the learning rate applied, plus `skipped_updates` (0 or 1).
    """
    norms = {role: optax.tree.norm(grads[role]) for role in grads}
    finite = jnp.isfinite(loss) & jnp.all(jnp.stack([jnp.isfinite(n) for n in norms.values()]))
    params, opt_state, metrics = {}, {}, {"skipped_updates": 1.0 - finite.astype(jnp.float32)}
    for role, optimizer in optimizers:
        scale = jnp.minimum(1.0, optimizer.max_grad_norm / jnp.maximum(norms[role], 1e-30))
        clipped = jax.tree.map(lambda g, scale=scale: g * scale, grads[role])
        before: Any = state.opt_state[role]
        after: Any
        go = finite if accept is None else finite & accept[role]
        updates, after = optimizer.chain.update(clipped, before, state.params[role], finite=go)
        stepped = optax.apply_updates(state.params[role], updates)
        params[role], counts = jax.tree.map(
            lambda new, old, go=go: jnp.where(go, new, old), (stepped, after[1:]), (state.params[role], before[1:])
        )
        opt_state[role] = (after[0], *counts)  # Adam has kept its moments itself, in place
        metrics |= {
            f"{role}/grad_norm": norms[role],
            f"{role}/grad_norm_clipped": norms[role] * scale,
            f"{role}/learning_rate": optimizer.rate_of(state.opt_state[role]),
        }
    return dataclasses.replace(state, params=params, opt_state=opt_state), metrics


def one_role(metrics: Metrics) -> Metrics:
    """Metrics of `apply` where only one role trains, without the role in the key: grad_norm, grad_norm_clipped."""
    return {key.rpartition("/")[2]: value for key, value in metrics.items()}

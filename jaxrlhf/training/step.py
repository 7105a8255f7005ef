"""An optimizer step: gradients summed over micro-batches, and an update that skips NaNs."""

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms.router import load_balancing_loss
from jaxrlhf.models import ModelConfig
from jaxrlhf.traced import settings
from jaxrlhf.training import by_length
from jaxrlhf.training.by_length import Budget
from jaxrlhf.training.optim import Optimizer
from jaxrlhf.types import Params, TrainState

Metrics = dict[str, Array]
Loss = Callable[[Any, Any], tuple[Array, Metrics]]


def to_micro_batches(batch: Any, parts: int) -> Any:
    """[B, ...] -> [parts, B / parts, ...] for every leaf, strided so that each device keeps its rows."""
    return jax.tree.map(lambda x: x.reshape(x.shape[0] // parts, parts, *x.shape[1:]).swapaxes(0, 1), batch)


def from_micro_batches(parts: Any) -> Any:
    """The inverse of `to_micro_batches`."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(x.shape[0] * x.shape[1], *x.shape[2:]), parts)


def in_float32(tree: Params) -> Params:
    """The tree in float32, the dtype of summed gradients and moments whatever that of the parameters."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), tree)


def map_rows(function: Callable[[Any], Any], batch: Any, parts: int | Budget) -> Any:
    """The arrays of `function(rows)` for all rows of a batch, computed in `parts` micro-batches or within a budget."""
    if isinstance(parts, Budget):
        return by_length.mapped(function, batch, parts)
    return from_micro_batches(jax.lax.map(function, to_micro_batches(batch, parts)))


def gradients(
    loss: Loss, params: Params, batch: Any, num_micro: int | Budget, routers: Mapping[str, ModelConfig] | None = None
) -> tuple[Params, Metrics]:
    """Gradients and metrics of `loss(params, batch)` over `num_micro` micro-batches, or those of a budget.

    `loss` is a sum over rows divided by a count of the WHOLE batch, so micro-batches add up to the undivided result.
    Metrics whose key ends in `_max` are combined by maximum, all others by addition; but those in `_rows` (not with a
    budget) have the rows as their first axis, and are put together in the order of the batch.

    `routers` are models by the key of their `router_sums` among the metrics ("router", "critic_router"). Those that
    balance their experts add the load-balancing loss of the whole batch, times its coefficient, to the loss but not to
    the metric `loss`. With several micro-batches, a forward pass more counts the choices of the whole batch first.
    """
    balanced = {key: model for key, model in (routers or {}).items() if model.balances_experts}
    if not balanced:
        return _summed(loss, params, batch, num_micro)
    whole: Metrics | None = None
    if num_micro != 1:

        def count(_: Params, rows: Any) -> tuple[Array, Metrics]:
            metrics = loss(params, rows)[1]
            return jnp.float32(0), {key: metrics[key] for key in balanced}

        whole = _summed(count, {}, batch, num_micro)[1]

    def with_balance(params: Params, rows: Any) -> tuple[Array, Metrics]:
        value, metrics = loss(params, rows)
        total = value
        for key, model in balanced.items():
            choices, probabilities = (whole or metrics)[key][0], metrics[key][1]
            part = load_balancing_loss(choices, probabilities, model.experts_per_token)
            total += model.router_aux_loss_coef * part
        return total, metrics | {"unbalanced": value}

    grads, metrics = _summed(with_balance, params, batch, num_micro)
    metrics["loss"] = metrics.pop("unbalanced")
    for key, model in balanced.items():
        choices, probabilities = metrics.pop(key)
        metrics[f"loss/{key}_aux"] = load_balancing_loss(choices, probabilities, model.experts_per_token)
        metrics[f"{key}/largest_share"] = jnp.max(choices) / jnp.maximum(jnp.sum(choices), 1)
    return grads, metrics


def _summed(loss: Loss, params: Params, batch: Any, num_micro: int | Budget) -> tuple[Params, Metrics]:
    """`gradients` without the load-balancing loss."""

    def grad(rows: Any) -> tuple[Params, Metrics]:
        (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, rows)
        return in_float32(grads), metrics | {"loss": value}

    if isinstance(num_micro, Budget):
        return by_length.gradients(loss, params, batch, num_micro)
    if num_micro == 1:
        return grad(batch)

    def micro(grads: Params, rows: Any) -> tuple[Params, Metrics]:
        new, metrics = grad(rows)
        return jax.tree.map(jnp.add, grads, new), metrics

    zeros = jax.tree.map(jnp.zeros_like, in_float32(params))

    def combined(key: str, parts: Any) -> Any:
        if key.endswith("_rows"):
            return from_micro_batches(parts)
        return parts.max(0) if key.endswith("_max") else parts.sum(0)

    grads, stacked = jax.lax.scan(micro, zeros, to_micro_batches(batch, num_micro))
    return grads, {key: combined(key, parts) for key, parts in stacked.items()}


def gradients_in_turn(
    losses: Mapping[str, tuple[Loss, Mapping[str, ModelConfig]]],
    params: dict[str, Params],
    batch: Any,
    num_micro: int | Budget,
    mesh: jax.sharding.Mesh,
) -> tuple[dict[str, Params], Metrics]:
    """`gradients` of the sum of several losses by role, each of which, with its routers, depends on the parameters of
    its role alone. Those of a role are computed after those of the one before, so that the activations of only one are
    in memory."""
    grads: dict[str, Params] = {}
    metrics: Metrics = {"loss": jnp.float32(0)}
    for role, (loss, routers) in losses.items():

        @jax.jit  # traced once, for the shapes and the branch
        def computed(params: Params, batch: Any, loss: Any = loss, routers: Any = routers) -> tuple[Params, Metrics]:
            new, of_role = gradients(loss, params, batch, num_micro, routers)
            return sharding.constrain(new, mesh), of_role  # in a branch XLA would have them whole on every device

        args = {role: params[role]}, batch
        if grads:
            # Never true, which XLA does not know: on a CPU it ignores `optimization_barrier`, and sets aside the
            # activations of all roles, filled with zeros, before the first forward pass.
            skip = sum(optax.tree.norm(known) for known in grads.values()) < 0
            shapes = jax.eval_shape(computed, *args)

            def zeros(*_: Any, shapes: Any = shapes) -> tuple[Params, Metrics]:
                new, of_role = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
                return sharding.constrain(new, mesh), of_role

            new, of_role = jax.lax.cond(skip, zeros, computed, *args)
        else:
            new, of_role = computed(*args)
        grads |= new
        metrics |= of_role | {"loss": metrics["loss"] + of_role["loss"]}
    return grads, metrics


def dropout_keys(model: ModelConfig, key: Array, step: Array, *, rows: int) -> Array | None:
    """A dropout key for each row of a batch of `rows`, whatever the micro-batches; None for a model without dropout.
    `key` is the run's."""
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
    """One optimizer step for every role; a non-finite loss or gradient leaves the state bit-identical.

    A role for which `accept` is False is left unchanged on its own. Each gradient is clipped to its optimizer's
    `max_grad_norm` by global norm. Returns the new state (`step` unchanged) and, per role, the norm before and after
    clipping and the learning rate, plus `skipped_updates` (0 or 1).
    """
    norms = {role: optax.tree.norm(grads[role]) for role in grads}
    finite = jnp.isfinite(loss) & jnp.all(jnp.stack([jnp.isfinite(n) for n in norms.values()]))
    params, opt_state, metrics = {}, {}, {"skipped_updates": 1.0 - finite.astype(jnp.float32)}
    for role, optimizer in optimizers:
        scale = jnp.minimum(1.0, optimizer.max_grad_norm / jnp.maximum(norms[role], 1e-30))
        clipped = jax.tree.map(lambda g, scale=scale: g * scale, grads[role])
        before: Any = state.opt_state[role]
        after: Any
        accepted = finite if accept is None else finite & accept[role]
        updates, after = optimizer.chain.update(clipped, before, state.params[role], finite=accepted)
        stepped = optax.apply_updates(state.params[role], updates)
        params[role], counts = jax.tree.map(
            lambda new, old, accepted=accepted: jnp.where(accepted, new, old),
            (stepped, after[1:]),
            (state.params[role], before[1:]),
        )
        opt_state[role] = (after[0], *counts)  # the first has handled its moments itself, in place
        metrics |= {
            f"{role}/grad_norm": norms[role],
            f"{role}/grad_norm_clipped": norms[role] * scale,
            f"{role}/learning_rate": optimizer.rate_of(state.opt_state[role]),
        }
    return dataclasses.replace(state, params=params, opt_state=opt_state), metrics


@settings()
@dataclass(frozen=True)
class Spec:
    """Settings of a supervised update."""

    model: ModelConfig
    optimizer: Optimizer
    num_micro: int | Budget  # micro-batches of an optimizer step, or their size in tokens
    mesh: jax.sharding.Mesh
    objective: Any = None  # the loss and its coefficients


def supervised_step(
    loss: Callable[[Params, Any, Array | None], tuple[Array, Metrics]],
    state: TrainState,
    frozen: Params,
    batch: Any,
    key: Array,
    spec: Spec,
) -> tuple[TrainState, Metrics]:
    """One optimizer step of the only role of `state`. Returns the next state and the metrics of `loss` and `apply`.

    `loss(params, rows, keys)` is given all parameters, some rows of `batch`, and a key for each row if the model has
    dropout. `frozen` are the parameters that do not train; `key` is the run's, folded with the step for dropout.
    """
    ((role, trained),) = state.params.items()
    keys = dropout_keys(spec.model, key, state.step, rows=jax.tree.leaves(batch)[0].shape[0])
    grads, metrics = gradients(
        lambda params, rows: loss({**frozen, **params}, *rows),
        trained,
        (batch, keys),
        spec.num_micro,
        {"router": spec.model},
    )
    state, applied = apply(state, {role: grads}, metrics["loss"], ((role, spec.optimizer),))
    metrics |= {name.removeprefix(f"{role}/"): value for name, value in applied.items()}
    return sharding.constrain(dataclasses.replace(state, step=state.step + 1), spec.mesh), metrics

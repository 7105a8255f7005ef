"""The jitted step of distillation."""

import functools
from dataclasses import dataclass

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.config import Distill
from jaxrlhf.models import ModelConfig, forward, forward_with_router
from jaxrlhf.traced import settings
from jaxrlhf.training.divergence import Predictor, divergence_sums
from jaxrlhf.training.step import Metrics, Spec, supervised_step
from jaxrlhf.types import Batch, Params, TrainState


@settings()
@dataclass(frozen=True)
class Objective:
    """Settings of the loss besides the student."""

    distill: Distill
    teacher: ModelConfig


def loss(
    params: Params, teacher: Params, batch: Batch, keys: Array | None, *, model: ModelConfig, objective: Objective,
    count: Array,
) -> tuple[Array, Metrics]:  # fmt: skip
    """Divergence of the tokens under `loss_mask`, summed and divided by `count`; `keys` [B] are for dropout.

    See `divergence_sums`.
    """
    hidden, router = forward_with_router(params, model, batch.tokens, batch.mask, keys=keys)
    hidden = hidden[:, :-1]
    theirs = jax.lax.stop_gradient(forward(teacher, objective.teacher, batch.tokens, batch.mask))[:, :-1]
    student, other = Predictor(params, model, hidden), Predictor(teacher, objective.teacher, theirs)
    options = objective.distill.beta, objective.distill.temperature
    sums = divergence_sums(student, other, batch.loss_mask[:, 1:], *options)
    metrics = {name: total / count for name, total in sums.items()}
    named = {name if name in ("loss", "entropy") else f"distill/{name}": metrics[name] for name in metrics}
    return metrics["loss"], named | router


@functools.partial(jax.jit, donate_argnames="state")
def update(
    state: TrainState, frozen: Params, teacher: Params, batch: Batch, key: Array, *, spec: Spec
) -> tuple[TrainState, Metrics]:
    """One optimizer step on `batch`. `frozen` is the base model under adapters, else empty; `key` is the run's."""
    tokens = jnp.sum(batch.loss_mask)
    count = jnp.maximum(tokens, 1)

    def mean_loss(params: Params, rows: Batch, keys: Array | None) -> tuple[Array, Metrics]:
        return loss(params, teacher, rows, keys, model=spec.model, objective=spec.objective, count=count)

    state, metrics = supervised_step(mean_loss, state, frozen, batch, key, spec)
    return state, metrics | {"num_tokens": tokens}


@functools.partial(jax.jit, static_argnames="model")
def evaluate(
    params: Params, teacher: Params, batch: Batch, *, model: ModelConfig, objective: Objective
) -> tuple[Array, Metrics]:
    """Number of tokens of a held-out batch, and the means of its metrics."""
    tokens = jnp.sum(batch.loss_mask)
    count = jnp.maximum(tokens, 1)
    metrics = loss(params, teacher, batch, None, model=model, objective=objective, count=count)[1]
    return tokens, {name: value for name, value in metrics.items() if name != "router"}

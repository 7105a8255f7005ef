"""The jitted step of distillation. The logits of teacher and student exist for a few columns of the batch at a time."""

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import runtime
from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.distillation import token_divergences
from jaxrlhf.config import Distill
from jaxrlhf.models import ModelConfig, forward, forward_with_router, lm_logits, place, row_axes
from jaxrlhf.training.step import Metrics, Spec, supervised_step
from jaxrlhf.types import Batch, Params, TrainState


class Objective(NamedTuple):
    """Static arguments of the loss besides the student."""

    distill: Distill
    teacher: ModelConfig


def loss(
    params: Params, teacher: Params, batch: Batch, keys: Array | None, *, model: ModelConfig, objective: Objective,
    count: Array,
) -> tuple[Array, Metrics]:  # fmt: skip
    """Divergence of the tokens under `loss_mask`, summed and divided by `count`; `keys` [B] are for dropout.

    The softmax is over the tokens that both models have rows for. Raises nothing and sums in float32.
    """
    hidden, router = forward_with_router(params, model, batch.tokens, batch.mask, keys=keys)
    hidden = hidden[:, :-1]
    theirs = jax.lax.stop_gradient(forward(teacher, objective.teacher, batch.tokens, batch.mask))[:, :-1]
    sums = divergence_sums(params, teacher, hidden, theirs, batch.loss_mask[:, 1:], model=model, objective=objective)
    metrics = {name: total / count for name, total in sums.items()}
    named = {name if name in ("loss", "entropy") else f"distill/{name}": metrics[name] for name in metrics}
    return metrics["loss"], named | router


def divergence_sums(
    params: Params, teacher: Params, hidden: Array, theirs: Array, mask: Array, *, model: ModelConfig,
    objective: Objective,
) -> dict[str, Array]:  # fmt: skip
    """`token_divergences` summed over the tokens of `mask` [B, T], from the hidden states of student and teacher
    [B, T, D], a chunk of columns at a time: in the backward pass its logits are computed again."""
    distill, vocabulary = objective.distill, min(model.vocab_size, objective.teacher.vocab_size)
    columns = mask.shape[1]
    width = chunk_width(model, *mask.shape)
    number = -(-columns // width)

    def chunks(x: Array) -> Array:
        """[B, T, ...] -> [n, B, w, ...], filled up with zeros."""
        x = jnp.pad(x, [(0, 0), (0, number * width - columns), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(x.shape[0], number, width, *x.shape[2:]).swapaxes(0, 1)

    def logits(params: Params, model: ModelConfig, hidden: Array) -> Array:
        return place(lm_logits(params, model, hidden), model, "rows", None, "tensor")[..., :vocabulary]

    @jax.checkpoint
    def of_chunk(ours: Array, theirs: Array, mask: Array) -> dict[str, Array]:
        found = token_divergences(
            logits(params, model, ours), logits(teacher, objective.teacher, theirs), distill.beta, distill.temperature
        )
        return {name: masked.total(values, mask) for name, values in found.items()}

    def add(sums: dict[str, Array], chunk: tuple[Array, Array, Array]) -> tuple[dict[str, Array], None]:
        return jax.tree.map(jnp.add, sums, of_chunk(*chunk)), None

    parts = chunks(hidden), chunks(theirs), chunks(mask)
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_chunk, *(part[0] for part in parts)))
    return jax.lax.scan(add, zeros, parts)[0]


def chunk_width(model: ModelConfig, rows: int, columns: int) -> int:
    """Columns of a batch whose logits a device computes at a time."""
    shards = math.prod(model.mesh.shape[axis] for axis in row_axes(model.mesh)) if model.mesh else 1
    tensor = model.mesh.shape["tensor"] if model.mesh else 1
    each = max(rows // shards, 1) * model.vocab_size // tensor
    return min(columns, max(1, runtime.logits_alive(model.platform) // each))


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="state")
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


@functools.partial(jax.jit, static_argnames=("model", "objective"))
def evaluate(
    params: Params, teacher: Params, batch: Batch, *, model: ModelConfig, objective: Objective
) -> tuple[Array, Metrics]:
    """Number of tokens of a held-out batch, and the means of its metrics."""
    tokens = jnp.sum(batch.loss_mask)
    count = jnp.maximum(tokens, 1)
    metrics = loss(params, teacher, batch, None, model=model, objective=objective, count=count)[1]
    return tokens, {name: value for name, value in metrics.items() if name != "router"}

"""Divergences between two models over the whole vocabulary, from their hidden states. The logits of both exist for a
few columns of the batch at a time."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import runtime
from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.distillation import token_divergences
from jaxrlhf.algorithms.masked import Scalar
from jaxrlhf.models import ModelConfig, lm_logits, place, row_axes
from jaxrlhf.types import Params


class Predictor(NamedTuple):
    """A model and its hidden states [B, T, D] of a batch."""

    params: Params
    model: ModelConfig
    hidden: Array


def divergence_sums(
    student: Predictor,
    teacher: Predictor,
    mask: Array,
    beta: Scalar,
    temperature: Scalar,
    weights: Array | None = None,
) -> dict[str, Array]:
    """`token_divergences` summed over the tokens of `mask` [B, T], times `weights` f32 [B, T] if there are any, a chunk
    of columns at a time: in the backward pass its logits are computed again.

    The softmax is over the tokens that both models have rows for. Sums are float32.
    """
    vocabulary = min(student.model.vocab_size, teacher.model.vocab_size)
    columns = mask.shape[1]
    width = chunk_width(student.model, *mask.shape)
    number = -(-columns // width)

    def chunks(x: Array) -> Array:
        """[B, T, ...] -> [n, B, w, ...], filled up with zeros."""
        x = jnp.pad(x, [(0, 0), (0, number * width - columns), *[(0, 0)] * (x.ndim - 2)])
        return x.reshape(x.shape[0], number, width, *x.shape[2:]).swapaxes(0, 1)

    def logits(predictor: Predictor, hidden: Array) -> Array:
        model = predictor.model
        return place(lm_logits(predictor.params, model, hidden), model, "rows", None, "tensor")[..., :vocabulary]

    @jax.checkpoint
    def of_chunk(ours: Array, theirs: Array, mask: Array, *weights: Array) -> dict[str, Array]:
        found = token_divergences(logits(student, ours), logits(teacher, theirs), beta, temperature)
        for factor in weights:
            found = {name: values * factor for name, values in found.items()}
        return {name: masked.total(values, mask) for name, values in found.items()}

    def add(sums: dict[str, Array], chunk: tuple[Array, ...]) -> tuple[dict[str, Array], None]:
        return jax.tree.map(jnp.add, sums, of_chunk(*chunk)), None

    arrays = student.hidden, teacher.hidden, mask, *([] if weights is None else [weights])
    parts = tuple(map(chunks, arrays))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_chunk, *(part[0] for part in parts)))
    return jax.lax.scan(add, zeros, parts)[0]


def chunk_width(model: ModelConfig, rows: int, columns: int) -> int:
    """Columns of a batch whose logits a device computes at a time."""
    shards = math.prod(model.mesh.shape[axis] for axis in row_axes(model.mesh)) if model.mesh else 1
    tensor = model.mesh.shape["tensor"] if model.mesh else 1
    each = max(rows // shards, 1) * model.vocab_size // tensor
    return min(columns, max(1, runtime.logits_alive(model.platform) // each))

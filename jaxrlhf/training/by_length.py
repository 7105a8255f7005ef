"""Micro-batches by a token budget: rows of like length together, no wider than they need, in one compiled program.

Rows are sorted by length, the longest first. A micro-batch is as wide as its first row requires, of the five widths in
EIGHTHS of the batch's columns, and takes as many of the next rows as the budget allows at this width. The program holds
the computation at each of the widths, so that rows of other lengths need no other program.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf.errors import ConfigError
from jaxrlhf.types import Batch, Experience, GroupExperience, Pairs, Params, Responses, Rollout

EIGHTHS = (1, 2, 4, 6, 8)
"""Widths of micro-batches, as eighths of the batch's columns."""


class Budget(NamedTuple):
    """The size of micro-batches."""

    tokens: int  # rows x texts x columns, padding included
    multiple: int  # their rows are a multiple of it: the devices that share them
    option: str  # that sets `tokens`, for errors


class Shape(NamedTuple):
    width: int  # columns of a text
    rows: int


def shapes(budget: Budget, columns: int, rows: int, texts: int) -> tuple[Shape, ...]:
    """The shapes of micro-batches of a batch with so many rows, of so many texts each, narrowest first.

    Raises ConfigError if the budget does not hold `multiple` rows of all columns.
    """
    least = columns * texts * budget.multiple
    if budget.tokens < least:
        of_texts = f"{texts} texts of {columns} tokens" if texts > 1 else f"{columns} tokens"
        devices = f" on each of {budget.multiple} devices" if budget.multiple > 1 else ""
        raise ConfigError(
            f"{budget.option} is {budget.tokens}, and the longest row takes {of_texts} with padding{devices}; give at "
            f"least {least}, or shorten rows (data.max_length, data.max_prompt_length, sampling.response_length)"
        )
    whole = -(-rows // budget.multiple)  # in units of `multiple`
    found = {}
    for width in sorted({-(-columns * part // 8) for part in EIGHTHS}):
        found[width] = budget.multiple * min(whole, budget.tokens // (width * texts * budget.multiple))
    return tuple(map(Shape, found, found.values()))


def gradients(
    loss: Callable[[Params, Any], tuple[Array, dict[str, Array]]], params: Params, batch: Any, budget: Budget
) -> tuple[Params, dict[str, Array]]:
    """Gradients in float32 and metrics of `loss(params, rows)`, `loss` among them, added up over micro-batches.

    `loss` is a sum over real rows and tokens; rows that fill up a micro-batch are zeros, all masks included.
    """
    plan, order, lengths = _plan(batch, budget)

    def branch(shape: Shape) -> Callable[..., Any]:
        def run(params: Params, start: Array) -> tuple[Params, dict[str, Array]]:
            rows = cut(_taken(batch, order, start, shape.rows), shape.width)
            (value, metrics), grads = jax.value_and_grad(loss, has_aux=True)(params, rows)
            return jax.tree.map(lambda x: x.astype(jnp.float32), grads), metrics | {"loss": value}

        return run

    branches = [branch(shape) for shape in plan]
    grads, metrics = jax.eval_shape(branches[0], params, jnp.int32(0))
    zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), grads)
    none = {k: jnp.full(x.shape, -jnp.inf if k.endswith("_max") else 0, x.dtype) for k, x in metrics.items()}

    def body(carry: Any) -> Any:
        start, grads, metrics = carry
        kind = _kind(plan, lengths[order[start]])
        new_grads, new = jax.lax.switch(kind, branches, params, start)
        metrics = {k: jnp.maximum(v, new[k]) if k.endswith("_max") else v + new[k] for k, v in metrics.items()}
        return start + _sizes(plan)[kind], jax.tree.map(jnp.add, grads, new_grads), metrics

    start = jnp.int32(0), zeros, none
    _, grads, metrics = jax.lax.while_loop(lambda carry: carry[0] < len(order), body, start)
    return grads, metrics


def mapped(function: Callable[[Any], Any], batch: Any, budget: Budget) -> Any:
    """The arrays of `function(rows)`, whose first axis are the rows, for all rows of the batch, in their order. What
    narrower micro-batches lack of the other axes is 0."""
    plan, order, lengths = _plan(batch, budget)
    whole = jax.eval_shape(function, batch)
    room = len(order) + max(shape.rows for shape in plan)  # the last micro-batch may be filled up

    def branch(shape: Shape) -> Callable[..., Any]:
        def run(results: Any, start: Array) -> Any:
            found = function(cut(_taken(batch, order, start, shape.rows), shape.width))

            def write(result: Array, part: Array) -> Array:
                padding = [(0, 0), *((0, a - b) for a, b in zip(result.shape[1:], part.shape[1:], strict=True))]
                return jax.lax.dynamic_update_slice_in_dim(result, jnp.pad(part, padding), start, axis=0)

            return jax.tree.map(write, results, found)

        return run

    branches = [branch(shape) for shape in plan]

    def body(carry: Any) -> Any:
        start, results = carry
        kind = _kind(plan, lengths[order[start]])
        return start + _sizes(plan)[kind], jax.lax.switch(kind, branches, results, start)

    empty = jax.tree.map(lambda x: jnp.zeros((room, *x.shape[1:]), x.dtype), whole)
    _, results = jax.lax.while_loop(lambda carry: carry[0] < len(order), body, (jnp.int32(0), empty))
    inverse = jnp.argsort(order)
    return jax.tree.map(lambda x: x[inverse], results)


def _plan(batch: Any, budget: Budget) -> tuple[tuple[Shape, ...], Array, Array]:
    """(shapes, row numbers by falling length, length of each row)."""
    lengths, (columns, texts) = row_lengths(batch), size(batch)
    return shapes(budget, columns, len(lengths), texts), jnp.argsort(-lengths, stable=True), lengths


def _kind(plan: tuple[Shape, ...], length: Array) -> Array:
    """The narrowest of the shapes that holds a row."""
    return jnp.searchsorted(jnp.array([shape.width for shape in plan]), length)


def _sizes(plan: tuple[Shape, ...]) -> Array:
    return jnp.array([shape.rows for shape in plan], jnp.int32)


def _taken(batch: Any, order: Array, start: Array, rows: int) -> Any:
    """Rows `start` to `start + rows` of the sorted batch; zeros after its last one."""
    places = start + jnp.arange(rows)
    chosen, real = order[jnp.minimum(places, len(order) - 1)], places < len(order)

    def take(x: Array) -> Array:
        if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
            return x[chosen]
        return jnp.where(real.reshape(-1, *[1] * (x.ndim - 1)), x[chosen], jnp.zeros((), x.dtype))

    return jax.tree.map(take, batch)


def row_lengths(batch: Any) -> Array:
    """Columns that each row needs, int32 [B]: the tokens of its longest text; of a rollout, from the first to the last
    real token. Of a tuple, that of its first member."""
    match batch:
        case Batch():
            return jnp.sum(batch.mask, axis=1, dtype=jnp.int32)
        case Pairs():
            return jnp.maximum(row_lengths(batch.chosen), row_lengths(batch.rejected))
        case Responses():
            return jnp.max(jnp.sum(batch.mask, axis=2, dtype=jnp.int32), axis=1)
        case Rollout():
            columns = batch.mask.shape[1]
            last = columns - jnp.argmax(batch.mask[:, ::-1], axis=1)
            return jnp.where(jnp.any(batch.mask, axis=1), last - jnp.argmax(batch.mask, axis=1), 0).astype(jnp.int32)
        case Experience() | GroupExperience():
            return row_lengths(batch.rollout)
        case _:
            return row_lengths(batch[0])


def size(batch: Any) -> tuple[int, int]:
    """(columns, texts of a row)."""
    match batch:
        case Pairs():
            return batch.chosen.tokens.shape[1], 2
        case Responses():
            return batch.tokens.shape[2], batch.tokens.shape[1]
        case Batch() | Rollout():
            return batch.tokens.shape[1], 1
        case Experience() | GroupExperience():
            return size(batch.rollout)
        case _:
            return size(batch[0])


def cut(batch: Any, width: int) -> Any:
    """The rows in `width` columns, which must hold them. Those of a rollout are moved to begin in column 0. Of a tuple,
    every member with columns is cut; arrays beside a rollout have those of its responses."""
    match batch:
        case Batch() | Pairs():
            return jax.tree.map(lambda x: x[:, :width], batch)
        case Responses():
            return dataclasses.replace(batch, tokens=batch.tokens[..., :width], mask=batch.mask[..., :width])
        case Rollout():
            return _cut_rollout(batch, width)
        case Experience() | GroupExperience():
            others = _cut_columns(dataclasses.replace(batch, rollout=None), _lost(batch.rollout, width))
            return dataclasses.replace(others, rollout=_cut_rollout(batch.rollout, width))
        case (Experience() | GroupExperience() | Rollout() as first, *others):
            rollout = first if isinstance(first, Rollout) else first.rollout
            return cut(first, width), *_cut_columns(others, _lost(rollout, width))
        case tuple():
            parts = (cut(part, width) for part in batch)
            return type(batch)(*parts) if hasattr(batch, "_fields") else tuple(parts)
    return batch


def _lost(rollout: Rollout, width: int) -> int:
    """Response columns that rows of `width` columns cannot have."""
    return max(rollout.response_mask.shape[1] - width, 0)


def _cut_columns(tree: Any, lost: int) -> Any:
    """Arrays [B, R, ...] or [B, R + 1, ...] without the last `lost` columns; arrays [B] as they are."""
    return jax.tree.map(lambda x: x[:, : x.shape[1] - lost] if x.ndim > 1 else x, tree)


def _cut_rollout(rollout: Rollout, width: int) -> Rollout:
    columns, response = rollout.tokens.shape[1], rollout.response_mask.shape[1]
    assert rollout.start is None, "a rollout is cut once"
    first = jnp.where(jnp.any(rollout.mask, axis=1), jnp.argmax(rollout.mask, axis=1), 0)
    source = first[:, None] + jnp.arange(width)
    index = jnp.minimum(source, columns - 1)
    return dataclasses.replace(
        _cut_columns(rollout, _lost(rollout, width)),
        tokens=jnp.take_along_axis(rollout.tokens, index, axis=1),
        mask=jnp.take_along_axis(rollout.mask, index, axis=1) & (source < columns),
        start=columns - response - first,
    )

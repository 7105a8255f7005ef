"""Generation for more prompts than fit at once: a finished row gives its slot to the next prompt.

Three programs: `_admit` prefills a few prompts into free slots, `_advance` draws tokens until enough rows have ended,
CHUNK for a row at most, and `_select` shrinks the slots once no prompt is waiting. The host only assigns rows to slots;
a response depends on its prompt and its key alone. `generate_in_chunks` runs the first two for a batch without slots,
with a cache that grows.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrlhf import distributed, sharding
from jaxrlhf.rollout.cache import check_slots, empty_slots, grow_cache, slot_shapes, slot_shardings
from jaxrlhf.rollout.decode import Decoding, advance, as_rollout, by_rows, generate, start
from jaxrlhf.rollout.queue import PromptQueue, SlotTable
from jaxrlhf.types import KVCache, Params, Prompts, Rollout, Slots, map_layers

SHRINK = 4
"""With no prompt waiting, generation continues in a quarter of the slots once the busy rows fit there."""
CHUNK = 64
"""Tokens that a program draws for a row before the host looks for a request to stop."""
PARTS = 4
"""The most parts in which the cache of a batch grows, of at least two CHUNKs each. Each is a program of its own, which
compiles in 1.6 s for 30 layers; growing to 256 tokens saves 0.4 s of a rollout of 8 rows (docs/performance.md)."""


def generate_in_chunks(
    params: Params,
    decoding: Decoding,
    prompts: Prompts,
    key: Array,
    group: int = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> Rollout:
    """Generate what `decode.generate` does, its rows spread over `mesh` if given, in programs that draw CHUNK tokens.

    Responses of up to CHUNK tokens, and all on TPUs, take a single program. Raises Interrupted after a request to stop,
    which is looked for between programs.
    """
    distributed.check_stop()
    if _is_one_program(decoding):
        return generate(*_at_once(params, decoding, prompts, key, group))
    rows = len(prompts.index) * group
    columns, (room, *wider) = prompts.tokens.shape[1], _rooms(decoding)
    state = empty_slots(decoding, rows, columns, mesh, room)
    state = _admit(params, decoding, state, prompts, None, key, columns)
    state, idle = _advance_until(params, decoding, state, rows, columns, room)
    for room in wider:
        if idle == rows:
            break
        state = dataclasses.replace(state, cache=grow_cache(state.cache, columns + room, decoding.model))
        state, idle = _advance_until(params, decoding, state, rows, columns, room)
    return _rollout(prompts, group, dataclasses.replace(state, cache=None))


def chunk_programs(
    params: Params,
    decoding: Decoding,
    prompts: Prompts,
    key: Array,
    group: int = 1,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Yield (jitted function, arguments) of the programs that `generate_in_chunks` runs. Arguments as in
    `slot_programs`."""
    if _is_one_program(decoding):
        yield generate, _at_once(params, decoding, prompts, key, group)
        return
    columns, rooms = prompts.tokens.shape[1], _rooms(decoding)
    states = [slot_shapes(decoding, len(prompts.index) * group, columns, mesh, room) for room in rooms]
    yield _admit, (params, decoding, states[0], prompts, None, key, columns)
    for state in states:
        yield _advance, (params, decoding, state, np.int32(0), columns)


def _is_one_program(decoding: Decoding) -> bool:
    # Inside its loop a TPU's compiler gives the cache another layout: every program would begin and end with a copy.
    return decoding.model.platform == "tpu" or decoding.sampling.response_length <= CHUNK


def _rooms(decoding: Decoding) -> tuple[int, ...]:
    """Columns of the cache for responses, at first and each time it has grown: attention reads all columns, filled or
    not."""
    length = decoding.sampling.response_length
    parts = max(1, min(PARTS, length // (2 * CHUNK)))
    return (*(-(-i * length // (parts * CHUNK)) * CHUNK for i in range(1, parts)), length)


def _at_once(params: Params, decoding: Decoding, prompts: Prompts, key: Array, group: int) -> tuple[Any, ...]:
    """Arguments of `decode.generate`."""
    return params, decoding.model, prompts, key, decoding.sampling, decoding.stop_ids, decoding.pad_id, group


def generate_in_slots(
    params: Params, decoding: Decoding, queue: PromptQueue, key: Array, mesh: jax.sharding.Mesh | None = None
) -> Rollout:
    """Generate what `decode.generate` would for the prompts of `queue`, in its slots, spread over `mesh` if given.

    A prompt is prefilled once for those of its rows that start together.

    Returns:
        A rollout of numpy arrays.

    Raises:
        ConfigError: the slots are fewer than 1 or cannot be split evenly over the mesh, or the cache does not fit in
            memory.
    """
    sampling = decoding.sampling
    check_slots(decoding.model, queue.slots, queue.columns + sampling.response_length, mesh)
    if mesh is not None:
        sharding.check_rows(queue.slots, mesh, "rollout.slots")
    shards = 1 if mesh is None else sharding.row_shards(mesh)
    state = empty_slots(decoding, queue.slots, queue.columns, mesh)
    table = SlotTable(queue.slots)
    names = ("tokens", "logprobs", "count", "ended", *(("support",) if sampling.renormalise_logprobs else ()))
    rows = len(queue.prompts.index) * queue.group
    results = {name: np.zeros((rows, *getattr(state, name).shape[1:]), getattr(state, name).dtype) for name in names}
    while queue or table.busy:
        while queue and table.free >= queue.slots_needed(table.busy):
            admitted, starting = queue.take(table.free)
            state = _admit(params, decoding, state, admitted, table.assign(starting), key, queue.columns)
        smaller = _fewer(table.size, shards)
        if not queue and 0 < table.busy <= smaller:
            state = _select(state, table.shrink(smaller), mesh)
            smaller = _fewer(table.size, shards)
        # idle slots at which to stop: for the next prefill, for fewer slots, or all
        if queue:
            enough = table.free + min(queue.slots_needed(table.busy), table.busy)
        else:
            enough = table.size - (smaller if table.busy > smaller else 0)
        state, _ = _advance_until(params, decoding, state, enough, queue.columns)
        on_host = sharding.fetch({name: getattr(state, name) for name in names})
        busy = ~on_host["ended"] & (on_host["count"] < sampling.response_length)
        ended, ended_rows = table.release(busy)
        for name in names:
            results[name][ended_rows] = on_host[name][ended]
    return as_rollout(np, queue.prompts, queue.group, **results)


def slot_programs(
    params: Params, decoding: Decoding, queue: PromptQueue, key: Array, mesh: jax.sharding.Mesh | None = None
) -> Iterator[tuple[Callable[..., Any], tuple[Any, ...]]]:
    """Yield (jitted function, arguments) of the programs `generate_in_slots` runs: `_admit` once per prompt width, and
    `_advance`.

    `params` may be arrays or ShapeDtypeStructs; the slots are ShapeDtypeStructs. Programs for fewer slots are left out.
    """
    state = slot_shapes(decoding, queue.slots, queue.columns, mesh)
    widths = set()
    while queue:
        admitted, rows = queue.take(queue.slots)
        if admitted.tokens.shape[1] not in widths:
            widths.add(admitted.tokens.shape[1])
            yield _admit, (params, decoding, state, admitted, np.zeros(len(rows), np.int32), key, queue.columns)
    yield _advance, (params, decoding, state, np.int32(0), queue.columns)


def _fewer(slots: int, shards: int) -> int:
    """The next smaller number of slots that a mesh can split evenly; 0 if there is none."""
    return slots // SHRINK // shards * shards


@partial(jax.jit, donate_argnames="slots", static_argnames="columns")
def _admit(
    params: Params,
    decoding: Decoding,
    slots: Slots,
    prompts: Prompts,
    targets: Array | None,
    key: Array,
    columns: int,
) -> Slots:
    """Prefill prompts [m] and start n rows of each in slots `targets` [m * n], or, if it is None, in all slots in their
    order; out-of-bounds targets are dropped. `columns` of the cache are for prompts."""
    starting = len(slots.count) if targets is None else len(targets)
    started = start(params, decoding, prompts, key, starting // len(prompts.index))
    first = columns - prompts.tokens.shape[1]
    rows = slice(None) if targets is None else targets

    def write(old: Array, new: Array) -> Array:
        return old.at[rows].set(new, mode="drop")

    def write_columns(old: Array, new: Array, axis: int = 2) -> Array:
        at = rows, *[slice(None)] * (axis - 1), slice(first, columns)
        return old.at[at].set(new, mode="drop")

    padding = ((0, 0), (first, slots.cache.valid.shape[1] - columns))
    cache = KVCache(
        k=map_layers(partial(write_columns, axis=decoding.model.key_columns), slots.cache.k, started.cache.k),
        v=map_layers(write_columns, slots.cache.v, started.cache.v),
        positions=write(slots.cache.positions, jnp.pad(started.cache.positions, padding)),
        valid=write(slots.cache.valid, jnp.pad(started.cache.valid, padding)),
        states=jax.tree.map(write, slots.cache.states, started.cache.states),
    )
    by_row = (dataclasses.replace(x, clock=None, cache=None) for x in (slots, started))
    return dataclasses.replace(jax.tree.map(write, *by_row), clock=slots.clock, cache=cache)


def _advance_until(
    params: Params, decoding: Decoding, slots: Slots, enough: int, columns: int, end: int | None = None
) -> tuple[Slots, int]:
    """Draw tokens until at least `enough` rows are idle, or the clock is at `end`, a multiple of CHUNK, in programs of
    CHUNK tokens; returns the number of idle rows, too. Raises Interrupted after a request to stop."""
    idle = -1
    while idle < enough and (end is None or int(slots.clock) < end):
        distributed.check_stop()
        slots, idle = _advance(params, decoding, slots, np.int32(enough), columns)
    return slots, int(idle)


@partial(jax.jit, donate_argnames="slots", static_argnames="columns")
def _advance(params: Params, decoding: Decoding, slots: Slots, enough: Array, columns: int) -> tuple[Slots, Array]:
    """Draw tokens, CHUNK at most for a row, until at least `enough` rows are idle; returns their number, too."""
    slots = advance(params, decoding, slots, enough, columns, CHUNK)
    return slots, jnp.sum(~slots.busy)


@partial(jax.jit, static_argnames="group")
def _rollout(prompts: Prompts, group: int, slots: Slots) -> Rollout:
    return as_rollout(jnp, prompts, group, slots.tokens, slots.logprobs, slots.count, slots.ended, slots.support)


@partial(jax.jit, static_argnames="mesh")
def _select(slots: Slots, kept: Array, mesh: jax.sharding.Mesh | None) -> Slots:
    """Keep the slots with the numbers `kept`, split over the mesh as before."""
    rest = jax.tree.map(lambda x: x[kept] if x.ndim else x, dataclasses.replace(slots, cache=None))
    fewer = dataclasses.replace(rest, cache=by_rows(lambda x: x[kept], slots.cache))
    return fewer if mesh is None else jax.lax.with_sharding_constraint(fewer, slot_shardings(fewer, mesh))

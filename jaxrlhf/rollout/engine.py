"""Generation for more prompts than fit at once: a finished row gives its slot to the next prompt.

Three programs: `_admit` prefills a few prompts into free slots, `_advance` draws tokens until enough rows have ended,
CHUNK for a row at most, and `_select` shrinks the slots once no prompt is waiting. The host only assigns rows to slots;
a response depends on its prompt and its key alone. `generate_in_chunks` runs the first two for a batch without slots.
"""

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrlhf import distributed, memory, sharding
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig, empty_cache
from jaxrlhf.rollout.decode import Decoding, advance, as_rollout, by_rows, empty_slots, generate, start
from jaxrlhf.rollout.queue import PromptQueue, SlotTable
from jaxrlhf.types import KVCache, Params, Prompts, Rollout, Slots, map_layers

SHRINK = 4
"""With no prompt waiting, generation continues in a quarter of the slots once the busy rows fit there."""
CHUNK = 64
"""Tokens that a program draws for a row before the host looks for a request to stop."""


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
    state = _empty_slots(decoding, rows, prompts.tokens.shape[1], mesh)
    state = _admit(params, decoding, state, prompts, None, key)
    state = _advance_until(params, decoding, state, rows)
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
    state = _slot_shapes(decoding, len(prompts.index) * group, prompts.tokens.shape[1], mesh)
    yield _admit, (params, decoding, state, prompts, None, key)
    yield _advance, (params, decoding, state, np.int32(0))


def _is_one_program(decoding: Decoding) -> bool:
    # Inside its loop a TPU's compiler gives the cache another layout: every program would begin and end with a copy.
    return decoding.model.platform == "tpu" or decoding.sampling.response_length <= CHUNK


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
    state = _empty_slots(decoding, queue.slots, queue.columns, mesh)
    table = SlotTable(queue.slots)
    names = ("tokens", "logprobs", "count", "ended", *(("support",) if sampling.renormalise_logprobs else ()))
    rows = len(queue.prompts.index) * queue.group
    results = {name: np.zeros((rows, *getattr(state, name).shape[1:]), getattr(state, name).dtype) for name in names}
    while queue or table.busy:
        while queue and table.free >= queue.slots_needed(table.busy):
            admitted, starting = queue.take(table.free)
            state = _admit(params, decoding, state, admitted, table.assign(starting), key)
        smaller = _fewer(table.size, shards)
        if not queue and 0 < table.busy <= smaller:
            state = _select(state, table.shrink(smaller), mesh)
            smaller = _fewer(table.size, shards)
        # idle slots at which to stop: for the next prefill, for fewer slots, or all
        if queue:
            enough = table.free + min(queue.slots_needed(table.busy), table.busy)
        else:
            enough = table.size - (smaller if table.busy > smaller else 0)
        state = _advance_until(params, decoding, state, enough)
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
    state = _slot_shapes(decoding, queue.slots, queue.columns, mesh)
    widths = set()
    while queue:
        admitted, rows = queue.take(queue.slots)
        if admitted.tokens.shape[1] not in widths:
            widths.add(admitted.tokens.shape[1])
            yield _admit, (params, decoding, state, admitted, np.zeros(len(rows), np.int32), key)
    yield _advance, (params, decoding, state, np.int32(0))


def check_slots(model: ModelConfig, slots: int, columns: int, mesh: jax.sharding.Mesh | None = None) -> None:
    """Raise ConfigError for less than one slot, or if a cache [slots, columns] does not fit in device memory."""
    if slots < 1:
        raise ConfigError(f"rollout.slots is {slots}; it must be at least 1")
    if mesh is not None and not sharding.is_here(mesh):
        return  # `jaxrlhf plan` tells what its devices need
    shards = 1
    if mesh is not None and sharding.platform(mesh) != "cpu":  # CPU devices share memory
        shards = cache_shards(model, mesh)
    itemsize = jnp.dtype(model.dtype).itemsize
    slot_bytes = 2 * len(model.layers_with("attention")) * model.num_kv_heads * columns * model.head_dim * itemsize
    state = jax.eval_shape(lambda: empty_cache(model, 1, 0).states)
    slot_bytes += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    free = memory.free_on_device()
    if free is not None and slots * slot_bytes > (free := free * shards):
        raise ConfigError(
            f"{slots} slots of {columns} tokens need {slots * slot_bytes / 2**30:.1f} GiB for keys and values, but "
            f"{free / 2**30:.1f} GiB are free; set rollout.slots to {max(1, int(0.8 * free / slot_bytes))} or less, or "
            "lower sampling.response_length"
        )


def cache_shapes(model: ModelConfig, slots: int, columns: int, mesh: jax.sharding.Mesh) -> KVCache:
    """The shapes of a cache [slots, columns], with their shardings."""
    cache = jax.eval_shape(lambda: empty_cache(model, slots, columns))
    return sharding.with_shardings(cache, _cache_shardings(cache, mesh))


def _fewer(slots: int, shards: int) -> int:
    """The next smaller number of slots that a mesh can split evenly; 0 if there is none."""
    return slots // SHRINK // shards * shards


def cache_shards(model: ModelConfig, mesh: jax.sharding.Mesh) -> int:
    """Number of shards of the keys and values of a cache: rows, and heads if `tensor` divides them."""
    tensor = mesh.shape["tensor"]
    return sharding.row_shards(mesh) * (tensor if model.num_kv_heads % tensor == 0 else 1)


def _slot_shapes(decoding: Decoding, batch: int, columns: int, mesh: jax.sharding.Mesh | None) -> Slots:
    """The shapes of `empty_slots`, with their shardings if there is a mesh."""
    state = jax.eval_shape(lambda: empty_slots(decoding, batch, columns))
    return state if mesh is None else sharding.with_shardings(state, _shardings(state, mesh))


def _shardings(slots: Slots, mesh: jax.sharding.Mesh) -> Any:
    rows, replicated = NamedSharding(mesh, sharding.ROWS), NamedSharding(mesh, P())
    cache = _cache_shardings(slots.cache, mesh)
    return dataclasses.replace(jax.tree.map(lambda x: rows if x.ndim else replicated, slots), cache=cache)


def _cache_shardings(cache: KVCache, mesh: jax.sharding.Mesh) -> Any:
    """Rows are split like those of a batch, heads of keys, values and states over `tensor`."""
    rows, tensor = NamedSharding(mesh, sharding.ROWS), mesh.shape["tensor"]

    def heads(x: Any) -> NamedSharding:
        split = ("tensor",) if tensor > 1 and x.shape[-3] % tensor == 0 else ()
        if x.ndim == 5:  # stacked [L, S, K, B, H]
            return NamedSharding(mesh, P(None, None, *(split or (None,)), *sharding.ROWS))
        return NamedSharding(mesh, P(*sharding.ROWS, *split))

    return dataclasses.replace(
        jax.tree.map(lambda _: rows, cache),
        k=jax.tree.map(heads, cache.k),
        v=jax.tree.map(heads, cache.v),
        states=tuple((rows, heads(state)) for _, state in cache.states),
    )


@partial(jax.jit, static_argnames=("batch", "prompt_columns", "mesh"))
def _empty_slots(decoding: Decoding, batch: int, prompt_columns: int, mesh: jax.sharding.Mesh | None) -> Slots:
    slots = empty_slots(decoding, batch, prompt_columns)
    return slots if mesh is None else jax.lax.with_sharding_constraint(slots, _shardings(slots, mesh))


@partial(jax.jit, donate_argnames="slots")
def _admit(
    params: Params, decoding: Decoding, slots: Slots, prompts: Prompts, targets: Array | None, key: Array
) -> Slots:
    """Prefill prompts [m] and start n rows of each in slots `targets` [m * n], or, if it is None, in all slots in their
    order; out-of-bounds targets are dropped."""
    starting = len(slots.count) if targets is None else len(targets)
    started = start(params, decoding, prompts, key, starting // len(prompts.index))
    length = slots.tokens.shape[1]
    columns = slots.cache.valid.shape[1] - length
    first = columns - prompts.tokens.shape[1]
    rows = slice(None) if targets is None else targets

    def write(old: Array, new: Array) -> Array:
        return old.at[rows].set(new, mode="drop")

    def write_columns(old: Array, new: Array) -> Array:
        return old.at[rows, :, first:columns].set(new, mode="drop")

    padding = ((0, 0), (first, length))
    cache = KVCache(
        k=map_layers(write_columns, slots.cache.k, started.cache.k),
        v=map_layers(write_columns, slots.cache.v, started.cache.v),
        positions=write(slots.cache.positions, jnp.pad(started.cache.positions, padding)),
        valid=write(slots.cache.valid, jnp.pad(started.cache.valid, padding)),
        states=jax.tree.map(write, slots.cache.states, started.cache.states),
    )
    by_row = (dataclasses.replace(x, clock=None, cache=None) for x in (slots, started))
    return dataclasses.replace(jax.tree.map(write, *by_row), clock=slots.clock, cache=cache)


def _advance_until(params: Params, decoding: Decoding, slots: Slots, enough: int) -> Slots:
    """Draw tokens until at least `enough` rows are idle, in programs of CHUNK tokens. Raises Interrupted after a
    request to stop."""
    idle = -1
    while idle < enough:
        distributed.check_stop()
        slots, idle = _advance(params, decoding, slots, np.int32(enough))
    return slots


@partial(jax.jit, donate_argnames="slots")
def _advance(params: Params, decoding: Decoding, slots: Slots, enough: Array) -> tuple[Slots, Array]:
    """Draw tokens, CHUNK at most for a row, until at least `enough` rows are idle; returns their number, too."""
    slots = advance(params, decoding, slots, enough, CHUNK)
    return slots, jnp.sum(~slots.busy)


@partial(jax.jit, static_argnames="group")
def _rollout(prompts: Prompts, group: int, slots: Slots) -> Rollout:
    return as_rollout(jnp, prompts, group, slots.tokens, slots.logprobs, slots.count, slots.ended, slots.support)


@partial(jax.jit, static_argnames="mesh")
def _select(slots: Slots, kept: Array, mesh: jax.sharding.Mesh | None) -> Slots:
    """Keep the slots with the numbers `kept`, split over the mesh as before."""
    rest = jax.tree.map(lambda x: x[kept] if x.ndim else x, dataclasses.replace(slots, cache=None))
    fewer = dataclasses.replace(rest, cache=by_rows(lambda x: x[kept], slots.cache))
    return fewer if mesh is None else jax.lax.with_sharding_constraint(fewer, _shardings(fewer, mesh))

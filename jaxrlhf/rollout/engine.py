"""More prompts than fit at once: slots that are given to the next prompt when their row has ended.

Three programs do the work: `_admit` reads a few prompts and puts them into free slots, `_advance` draws tokens until
enough rows have ended, `_keep` leaves empty slots behind when nothing waits any more. The host only decides which row
goes where; what a row says depends on its prompt and its key.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrlhf import compilation, memory, sharding
from jaxrlhf.config import Sampling
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig
from jaxrlhf.rollout.decode import advance, draw, empty_slots, prefill, row_keys
from jaxrlhf.rollout.queue import FREE, Part, Queue, SlotTable
from jaxrlhf.types import Params, Prompts, Rollout, Slots

SHRINK = 4  # with the queue empty, the rest goes on in a quarter of the slots as soon as it fits there


def answer(
    params: Params,
    model: ModelConfig,
    prompts: Prompts,
    key: Array,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    pad_id: int,
    *,
    slots: int,
    group: int = 1,
    limits: Sequence[int] | None = None,
    columns: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> Rollout:
    """What `generate` returns for the same arguments, as host arrays, made `slots` rows at a time; see `stream`."""
    rows, length = prompts.tokens.shape[0] * group, sampling.response_length
    tokens = np.full((rows, length), pad_id, np.int32)
    logprobs = np.zeros((rows, length), np.float32)
    count, finished = np.zeros(rows, np.int32), np.zeros(rows, bool)
    support = np.zeros((rows, length, -(-model.vocab_size // 8)), np.uint8) if sampling.renormalise_logprobs else None
    for part in stream(
        params, model, prompts, key, sampling, stop_ids, pad_id,
        slots=slots, group=group, limits=limits, columns=columns, mesh=mesh,
    ):  # fmt: skip
        span = slice(count[part.row], count[part.row] + len(part.tokens))
        tokens[part.row, span], logprobs[part.row, span] = part.tokens, part.logprobs
        if support is not None and part.support is not None:
            support[part.row, span] = part.support
        count[part.row] += len(part.tokens)
        finished[part.row] = part.finished
    prompts = jax.tree.map(lambda x: np.repeat(np.asarray(x), group, axis=0), prompts)
    mask = np.arange(length) < count[:, None]
    made: dict[str, Any] = {  # arrays of numpy, where a program's rollout has jax's
        "tokens": np.concatenate([prompts.tokens, tokens], axis=1),
        "mask": np.concatenate([prompts.mask, mask], axis=1),
        "response_mask": mask,
        "logprobs": logprobs,
        "finished": finished,
        "index": prompts.index,
        "sample": prompts.sample + np.arange(rows, dtype=np.int32) % group,
        "support": support,
    }
    return Rollout(**made)


def stream(
    params: Params,
    model: ModelConfig,
    prompts: Prompts,
    key: Array,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    pad_id: int,
    *,
    slots: int,
    group: int = 1,
    limits: Sequence[int] | None = None,
    columns: int = 0,
    every: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> Iterator[Part]:
    """Answer all prompts (arrays on the host, left-padded), giving out each row's tokens as they come.

    Rows are numbered as in `generate`: n*i .. n*i + n - 1 answer prompt i, which is read once for those of its rows
    that begin together. `limits` is the most tokens of each row (None: `sampling.response_length`); `columns` is the
    least room for a prompt: calls with the same share their programs, whatever their longest prompt. With `every`,
    parts come at least every so many tokens; without, whenever the host has something to do. `mesh` spreads the slots.

    Raises ConfigError for a slot count below 1, for one that the mesh cannot split evenly, or when the device has no
    room for the cache.
    """
    queue = Queue(prompts, sampling, group, min(slots, len(prompts.index) * group), limits)
    columns = max(columns, *queue.widths)
    check_slots(model, queue.slots, columns + sampling.response_length, mesh)
    state = empty_slots(model, queue.slots, columns, sampling, pad_id)
    if mesh is not None:
        sharding.check_rows(queue.slots, mesh, "rollout.slots")
        state = jax.device_put(state, _places(state, mesh))
    shrinks = mesh is None or mesh.size == 1
    table = SlotTable(queue.slots)
    while queue.waiting or table.busy:
        while queue.waiting and len(table.free) >= queue.wanted(table.busy):
            part, rows = queue.take(len(table.free))
            where = np.array([len(table.rows) if row == FREE else table.give(row) for row in rows.tolist()], np.int32)
            state = _admit(params, model, state, part, where, queue.limits[rows], key, sampling, stop_ids)
        size = len(table.rows)
        if not queue.waiting and size >= SHRINK and table.busy <= size // SHRINK and shrinks:
            state = _keep(state, table.shrink(size // SHRINK))
            size = len(table.rows)
        if queue.waiting:
            enough = len(table.free) + min(queue.wanted(table.busy), table.busy)
        else:
            enough = size - size // SHRINK if table.busy > size // SHRINK and shrinks else size
        steps = np.int32(every or sampling.response_length)
        state = _advance(params, model, state, steps, np.int32(enough), sampling, stop_ids)
        yield from table.harvest(state)


def prepare(
    params: Params,
    model: ModelConfig,
    prompts: Prompts,
    key: Array,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    pad_id: int,
    *,
    slots: int,
    group: int = 1,
    columns: int = 0,
    mesh: jax.sharding.Mesh | None = None,
) -> None:
    """Compile what `answer` calls for these arguments, `params` being arrays or their shapes."""
    queue = Queue(prompts, sampling, group, min(slots, len(prompts.index) * group), None)
    columns = max(columns, *queue.widths)
    state = jax.eval_shape(lambda: empty_slots(model, queue.slots, columns, sampling, pad_id))
    if mesh is not None:
        state = sharding.with_shardings(state, _places(state, mesh))
    widths = set()
    while queue.waiting:
        part, rows = queue.take(queue.slots)
        if (width := part.tokens.shape[1]) not in widths:
            widths.add(width)
            places = np.zeros(len(rows), np.int32)
            compilation.compile_shapes(
                _admit, params, model, state, part, places, queue.limits[rows], key, sampling, stop_ids
            )
    compilation.compile_shapes(_advance, params, model, state, np.int32(0), np.int32(0), sampling, stop_ids)


def _places(slots: Slots, mesh: jax.sharding.Mesh) -> Any:
    return jax.tree.map(lambda x: NamedSharding(mesh, sharding.ROWS if x.ndim else P()), slots)


def check_slots(model: ModelConfig, slots: int, columns: int, mesh: jax.sharding.Mesh | None = None) -> None:
    """Refuse fewer than one slot, and a cache [slots, columns] that the devices of `mesh` have no room for."""
    if slots < 1:
        raise ConfigError(f"rollout.slots is {slots}; at least one row must be answered at a time")
    itemsize = jnp.dtype(model.dtype).itemsize
    # a CPU's devices share its memory
    shares = sharding.row_shards(mesh) if mesh and jax.default_backend() != "cpu" else 1
    each = 2 * model.num_layers * model.num_kv_heads * columns * model.head_dim * itemsize
    free = memory.free_on_device()
    if free is not None and slots * each > (free := free * shares):
        raise ConfigError(
            f"{slots} slots of {columns} tokens need {slots * each / 2**30:.1f} GiB for keys and values, but "
            f"{free / 2**30:.1f} GiB are free; set rollout.slots to {max(1, int(0.8 * free / each))} or less, or lower "
            "sampling.response_length"
        )


@partial(jax.jit, static_argnames=("model", "sampling", "stop_ids"), donate_argnames="slots")
def _admit(
    params: Params,
    model: ModelConfig,
    slots: Slots,
    prompts: Prompts,
    places: Array,
    limits: Array,
    key: Array,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Slots:
    """Read prompts [m] and begin m * n rows, n of each prompt, in `places` [m * n]; one past the end is nowhere."""
    hidden, cache = prefill(params, model, prompts)
    each = places.shape[0] // hidden.shape[0]
    prompts, hidden, cache = jax.tree.map(lambda x: jnp.repeat(x, each, axis=0), (prompts, hidden, cache))
    count, length = places.shape[0], slots.tokens.shape[1]
    columns = slots.cache.valid.shape[1] - length
    first = columns - prompts.tokens.shape[1]
    fresh = dataclasses.replace(
        empty_slots(model, count, -length, sampling, 0),
        limit=limits,
        ended=jnp.zeros(count, bool),
        prompt_length=jnp.sum(prompts.mask, axis=1, dtype=jnp.int32),
        keys=row_keys(key, prompts.index, prompts.sample + jnp.arange(count) % each),
    )
    fresh = draw(params, model, fresh, hidden, sampling, stop_ids)

    def put(old: Array, new: Array) -> Array:
        return old.at[places].set(new, mode="drop")

    def put_columns(old: Array, new: Array) -> Array:
        return old.at[places, :, first:columns].set(new, mode="drop")

    room = ((0, 0), (first, length))
    cache = dataclasses.replace(
        slots.cache,
        k=jax.tree.map(put_columns, slots.cache.k, cache.k),
        v=jax.tree.map(put_columns, slots.cache.v, cache.v),
        positions=put(slots.cache.positions, jnp.pad(cache.positions, room)),
        valid=put(slots.cache.valid, jnp.pad(cache.valid, room)),
    )
    names = ("count", "limit", "ended", "prompt_length", "keys", "tokens", "logprobs", "support")
    begun = {name: jax.tree.map(put, getattr(slots, name), getattr(fresh, name)) for name in names}
    return dataclasses.replace(slots, cache=cache, **begun)


_advance = partial(jax.jit, static_argnames=("model", "sampling", "stop_ids"), donate_argnames="slots")(advance)


@jax.jit
def _keep(slots: Slots, kept: Array) -> Slots:
    """The slots `kept` alone."""
    return jax.tree.map(lambda x: x[kept] if x.ndim else x, slots)

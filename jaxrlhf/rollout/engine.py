"""More prompts than fit at once: slots that are given to the next prompt when their row has ended.

Three programs do the work: `_admit` reads a few prompts and puts them into free slots, `_advance` draws tokens until
enough rows have ended, `_keep` leaves empty slots behind when nothing waits any more. The host only decides which row
goes where; what a row says depends on its prompt and its key.
"""

import collections
import dataclasses
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array

from jaxrlhf import memory, sharding
from jaxrlhf.config import Sampling
from jaxrlhf.data.batching import bucket
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig
from jaxrlhf.rollout.decode import Slots, advance, draw, empty_slots, prefill, row_keys
from jaxrlhf.types import Params, Prompts, Rollout

FREE = -1
REFILL = 8  # one prefill reads prompts for an eighth of the slots, and waits until so many are free
SHRINK = 4  # with the queue empty, the rest goes on in a quarter of the slots as soon as it fits there


@dataclass(frozen=True)
class Part:
    """What a row has said since its last part."""

    row: int
    tokens: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # f32 [n]
    support: np.ndarray | None  # uint8 [n, ceil(V / 8)]
    done: bool  # the row's last part
    finished: bool  # done with a stop token, not by running out of room


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
    queue = _Queue(prompts, sampling, group, min(slots, len(prompts.index) * group), limits)
    columns = max(columns, *queue.widths)
    check_slots(model, queue.slots, columns + sampling.response_length)
    state = empty_slots(model, queue.slots, columns, sampling, pad_id)
    if mesh is not None:
        sharding.check_rows(queue.slots, mesh, "rollout.slots")
        state = jax.tree.map(lambda x: sharding.put_rows(x, mesh) if x.ndim else sharding.put_whole(x, mesh), state)
    places = _Places(queue.slots)
    while queue.waiting or places.busy:
        while queue.waiting and len(places.free) >= queue.wanted(places.busy):
            part, rows = queue.take(len(places.free))
            where = np.array([len(places.rows) if row == FREE else places.give(row) for row in rows.tolist()], np.int32)
            state = _admit(params, model, state, part, where, queue.limits[rows], key, sampling, stop_ids)
        size = len(places.rows)
        if not queue.waiting and size >= SHRINK and places.busy <= size // SHRINK and mesh is None:
            state = _keep(state, places.shrink(size // SHRINK))
            size = len(places.rows)
        if queue.waiting:
            enough = len(places.free) + min(queue.wanted(places.busy), places.busy)
        else:
            enough = size - size // SHRINK if places.busy > size // SHRINK and mesh is None else size
        steps = np.int32(every or sampling.response_length)
        state = _advance(params, model, state, steps, np.int32(enough), sampling, stop_ids)
        yield from places.harvest(state)


class _Queue:
    """The rows that wait, `unit` of a prompt together. Prompts of one width stand side by side, to be read together."""

    def __init__(
        self, prompts: Prompts, sampling: Sampling, group: int, slots: int, limits: Sequence[int] | None
    ) -> None:
        self.prompts = jax.tree.map(np.asarray, prompts)
        most = self.prompts.tokens.shape[1]
        self.widths = [bucket(int(n), most) for n in self.prompts.mask.sum(axis=1)]
        self.group = group
        self.unit = max(1, min(group, slots))
        self.slots = slots - slots % self.unit
        self.reads = max(1, self.slots // (REFILL * self.unit))
        starts = [(i, first) for i in range(len(self.widths)) for first in range(0, group, self.unit)]
        self.waiting = collections.deque(sorted(starts, key=lambda start: self.widths[start[0]]))
        caps = np.full(len(self.widths) * group, sampling.response_length, np.int32)
        self.limits = caps if limits is None else np.minimum(caps, np.asarray(limits, np.int32))

    def wanted(self, busy: int) -> int:
        """Free slots to wait for before the next prefill."""
        return self.unit * min(self.reads, len(self.waiting)) if busy else self.unit

    def take(self, free: int) -> tuple[Prompts, np.ndarray]:
        """(prompts to read [reads, width], the rows to begin [reads * unit], FREE where there is none)."""
        width, taken = self.widths[self.waiting[0][0]], []
        most = min(self.reads, free // self.unit)
        while self.waiting and len(taken) < most and self.widths[self.waiting[0][0]] == width:
            taken.append(self.waiting.popleft())
        rows = np.full((self.reads, self.unit), FREE)
        for i, (prompt, first) in enumerate(taken):
            count = min(self.unit, self.group - first)
            rows[i, :count] = prompt * self.group + first + np.arange(count)
        chosen, first = np.array(taken + taken[:1] * (self.reads - len(taken)), np.int32).T
        part = Prompts(
            tokens=self.prompts.tokens[chosen, -width:],
            mask=self.prompts.mask[chosen, -width:],
            index=self.prompts.index[chosen],
            sample=self.prompts.sample[chosen] + first,
        )
        return part, rows.reshape(-1)


class _Places:
    """Which row each slot holds, and how many of its tokens have been given out."""

    def __init__(self, slots: int) -> None:
        self.rows, self.given = [FREE] * slots, [0] * slots

    @property
    def free(self) -> list[int]:
        return [slot for slot, row in enumerate(self.rows) if row == FREE]

    @property
    def busy(self) -> int:
        return len(self.rows) - len(self.free)

    def give(self, row: int) -> int:
        slot = self.free[0]
        self.rows[slot], self.given[slot] = row, 0
        return slot

    def shrink(self, size: int) -> np.ndarray:
        """The `size` slots to keep, busy ones first."""
        kept = sorted(range(len(self.rows)), key=lambda slot: (self.rows[slot] == FREE, slot))[:size]
        self.rows, self.given = [self.rows[slot] for slot in kept], [self.given[slot] for slot in kept]
        return np.array(kept, np.int32)

    def harvest(self, state: Slots) -> Iterator[Part]:
        """What every row has said since the last time; rows that are done leave their slot."""
        tokens, logprobs, support, count, ended, busy = jax.device_get(
            (state.tokens, state.logprobs, state.support, state.count, state.ended, state.busy)
        )
        for slot, row in enumerate(self.rows):
            new = slice(self.given[slot], int(count[slot]))
            if row == FREE or (busy[slot] and new.start == new.stop):
                continue
            self.given[slot] = new.stop
            self.rows[slot] = row if busy[slot] else FREE
            yield Part(
                row=row,
                tokens=np.array(tokens[slot, new]),
                logprobs=np.array(logprobs[slot, new]),
                support=None if support is None else np.array(support[slot, new]),
                done=not busy[slot],
                finished=bool(ended[slot]),
            )


def check_slots(model: ModelConfig, slots: int, columns: int) -> None:
    """Refuse fewer than one slot, and a cache [slots, columns] that the device has no room for."""
    if slots < 1:
        raise ConfigError(f"rollout.slots is {slots}; at least one row must be answered at a time")
    itemsize = jnp.dtype(model.dtype).itemsize
    each = 2 * model.num_layers * model.num_kv_heads * columns * model.head_dim * itemsize
    free = memory.free_on_device()
    if free is not None and slots * each > free:
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

"""The host's side of the engine: which rows wait, and which row each slot holds."""

import collections
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import jax
import numpy as np

from jaxrlhf.config import Sampling
from jaxrlhf.data.batching import bucket
from jaxrlhf.types import Prompts, Slots

FREE = -1
REFILL = 8  # one prefill reads prompts for an eighth of the slots, and waits until so many are free


@dataclass(frozen=True)
class Part:
    """What a row has said since its last part."""

    row: int
    tokens: np.ndarray  # int32 [n]
    logprobs: np.ndarray  # f32 [n]
    support: np.ndarray | None  # uint8 [n, ceil(V / 8)]
    done: bool  # the row's last part
    finished: bool  # done with a stop token, not by running out of room


class Queue:
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


class SlotTable:
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

"""Host-side bookkeeping of the slot engine: the queue of waiting rows, and the row that each slot holds."""

import collections

import numpy as np

from jaxrlhf import sharding
from jaxrlhf.data.batching import bucket
from jaxrlhf.types import Prompts

FREE = -1
"""Row number of an empty slot."""
REFILL_FRACTION = 8
"""One prefill reads prompts for an eighth of the slots, and waits until that many are free."""


class PromptQueue:
    """Rows waiting for a slot: `group` responses to each prompt, up to `slots` of them together.

    Prompts are sorted by padded width, so that the prompts of one prefill have the same width.

    Args:
        prompts: arrays on the host, left-padded.
        columns: least number of prompt columns in the cache. Queues with equal `columns` share their programs, whatever
            their longest prompt.

    Attributes:
        slots: number of slots, a multiple of `rows_per_prompt`.
        rows_per_prompt: rows that start together and share the prefill of their prompt.
        columns: cache columns that every prompt fits in.
    """

    def __init__(self, prompts: Prompts, slots: int, group: int = 1, columns: int = 0) -> None:
        self.prompts = sharding.fetch(prompts)
        count, longest = self.prompts.tokens.shape
        slots = min(slots, count * group)
        self.group = group
        self.rows_per_prompt = max(1, min(group, slots))
        self.slots = slots - slots % self.rows_per_prompt
        self.prefill_size = max(1, self.slots // (REFILL_FRACTION * self.rows_per_prompt))
        self._widths = [bucket(int(length), longest) for length in self.prompts.mask.sum(axis=1)]
        self.columns = max(columns, *self._widths)
        starts = [(i, sample) for i in range(count) for sample in range(0, group, self.rows_per_prompt)]
        self._waiting = collections.deque(sorted(starts, key=lambda start: self._widths[start[0]]))

    def __bool__(self) -> bool:
        return bool(self._waiting)

    def slots_needed(self, busy: int) -> int:
        """Number of free slots to wait for before the next prefill."""
        return self.rows_per_prompt * (min(self.prefill_size, len(self._waiting)) if busy else 1)

    def take(self, free: int) -> tuple[Prompts, np.ndarray]:
        """Remove the next prompts, as many as `free` slots can take.

        Returns:
            Prompts [prefill_size, width], filled up by repeating the first, and the row numbers to start
            [prefill_size * rows_per_prompt], FREE where there is no row.
        """
        width, taken = self._widths[self._waiting[0][0]], []
        most = min(self.prefill_size, free // self.rows_per_prompt)
        while self._waiting and len(taken) < most and self._widths[self._waiting[0][0]] == width:
            taken.append(self._waiting.popleft())
        rows = np.full((self.prefill_size, self.rows_per_prompt), FREE)
        for i, (prompt, sample) in enumerate(taken):
            count = min(self.rows_per_prompt, self.group - sample)
            rows[i, :count] = prompt * self.group + sample + np.arange(count)
        chosen, samples = np.array(taken + taken[:1] * (self.prefill_size - len(taken)), np.int32).T
        prompts = Prompts(
            tokens=self.prompts.tokens[chosen, -width:],
            mask=self.prompts.mask[chosen, -width:],
            index=self.prompts.index[chosen],
            sample=self.prompts.sample[chosen] + samples,
            given=None if self.prompts.given is None else self.prompts.given[chosen],
        )
        return prompts, rows.reshape(-1)


class SlotTable:
    """The row number that each slot holds."""

    def __init__(self, slots: int) -> None:
        self.rows = np.full(slots, FREE)

    @property
    def size(self) -> int:
        return len(self.rows)

    @property
    def free(self) -> int:
        return int(np.sum(self.rows == FREE))

    @property
    def busy(self) -> int:
        return self.size - self.free

    def assign(self, rows: np.ndarray) -> np.ndarray:
        """Give each row a free slot; int32 slot numbers, out of bounds where the row is FREE."""
        slots, started = np.full(len(rows), self.size, np.int32), rows != FREE
        slots[started] = np.flatnonzero(self.rows == FREE)[: np.sum(started)]
        self.rows[slots[started]] = rows[started]
        return slots

    def shrink(self, size: int) -> np.ndarray:
        """Keep `size` slots, busy ones first, and return their numbers (int32)."""
        kept = np.argsort(self.rows == FREE, kind="stable")[:size]
        self.rows = self.rows[kept]
        return kept.astype(np.int32)

    def release(self, busy: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Free the slots whose row has ended (`busy` is bool [S]); (slot numbers, row numbers)."""
        slots = np.flatnonzero(~busy & (self.rows != FREE))
        rows = self.rows[slots]
        self.rows[slots] = FREE
        return slots, rows

"""Pack several sequences into one row, so that little of a batch is padding."""

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

from jaxrlhf.data.datasets import SFTRow, Split
from jaxrlhf.data.held_out import Lazy
from jaxrlhf.data.mixing import draws
from jaxrlhf.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PackedRow(SFTRow):
    """Concatenated sequences of the given `lengths`; of pairs, each chosen one right before its rejected one."""

    lengths: list[int]


def pack(split: Split[T], texts: Callable[[T], Sequence[SFTRow]], width: int, least: int = 1) -> Split[PackedRow]:
    """Pack a split into rows of at most `width` tokens and note their number in the report.

    `texts(example)` returns the sequences of an example, which stay together. Raises ConfigError if there are fewer
    than `least` training rows (the batch size).
    """

    def rows(examples: Sequence[T], first: int, count: int) -> list[list[int]]:
        """The numbers of the examples in each row."""
        sizes = [sum(len(text.tokens) for text in texts(examples[i])) for i in range(first, first + count)]
        return [[first + i for i in row] for row in best_fit(sizes, width)]

    def packed(examples: Sequence[T], numbers: list[list[int]]) -> Sequence[PackedRow]:
        made = Lazy(len(numbers), lambda k: _concatenate([t for i in numbers[k] for t in texts(examples[i])]))
        return list(made) if isinstance(examples, list) else made

    firsts = np.cumsum([0, *split.sizes]).tolist()
    by_part = [rows(split.train, *part) for part in zip(firsts, split.sizes, strict=False)]  # each row of one data set
    train = packed(split.train, [row for part in by_part for row in part])
    validation = packed(split.validation, rows(split.validation, 0, len(split.validation)))
    parts = split.parts
    if parts:
        total, counts = sum(split.sizes), list(map(len, by_part))
        shares = draws([part.name for part in parts], counts, [part.draws / total for part in parts], 1.0)
        parts = tuple(
            dataclasses.replace(part, rows=size, draws=share)
            for part, size, share in zip(parts, counts, shares, strict=True)
        )
    if len(train) < least:
        raise ConfigError(
            f"train.packing makes {len(train)} rows of {width} tokens of {len(split.train)} examples, fewer than "
            f"train.batch_size {least}, so a step would train on the same row more than once; lower train.batch_size "
            "or leave packing off"
        )
    padding = 1 - sum(len(row.tokens) for row in train) / (width * len(train))
    note = f"packed: {len(split.train)} examples in {len(train)} rows of {width} tokens, {padding:.1%} padding"
    if validation:
        note += f"; {len(split.validation)} held-out examples in {len(validation)} rows"
    report = dataclasses.replace(split.report, notes=[*split.report.notes, note])
    return Split(train, validation, report, parts)


def best_fit(sizes: Sequence[int], width: int) -> list[list[int]]:
    """Pack items of `sizes` into rows of at most `width`: lists of item numbers, rows and numbers in order.

    Best fit decreasing (Johnson 1974, https://doi.org/10.1137/0203025): the largest item first, each into the row where
    it leaves the least room. Uses at most 11/9 of the minimal number of rows, plus one.
    """
    rows: list[list[int]] = []
    rows_by_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # distinct and sorted: at most `width` of them for any number of rows
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        assert 0 < sizes[i] <= width, f"{sizes[i]} tokens do not fit in {width}"
        at = bisect.bisect_left(rooms, sizes[i])
        if at == len(rooms):
            row, room = len(rows), width
            rows.append([])
        else:
            room = rooms[at]
            row = rows_by_room[room].pop()
            if not rows_by_room[room]:
                del rooms[at]
        rows[row].append(i)
        left = room - sizes[i]
        if not rows_by_room[left]:
            bisect.insort(rooms, left)
        rows_by_room[left].append(row)
    return sorted(sorted(row) for row in rows)


def _concatenate(texts: Sequence[SFTRow]) -> PackedRow:
    return PackedRow(
        tokens=[token for text in texts for token in text.tokens],
        loss_mask=[loss for text in texts for loss in text.loss_mask],
        lengths=[len(text.tokens) for text in texts],
    )

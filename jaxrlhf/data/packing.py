"""Several texts in a row, one after the other, so that little of a batch is padding."""

import bisect
import dataclasses
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

from jaxrlhf.data.datasets import SFTRow, Split
from jaxrlhf.errors import ConfigError

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class PackedRow(SFTRow):
    """Texts end to end; of pairs, each chosen text right before its rejected one. lengths: tokens of each text."""

    lengths: list[int]


def pack(split: Split[T], texts: Callable[[T], Sequence[SFTRow]], width: int, least: int = 1) -> Split[PackedRow]:
    """The examples of a split in rows of at most `width` tokens; the report says how many rows they fill.

    `texts(example)` are what stands in the row, one text or both of a pair; those of an example stay together.
    Raises ConfigError for fewer than `least` rows, a batch.
    """

    def rows(examples: Sequence[T]) -> list[PackedRow]:
        sizes = [sum(len(text.tokens) for text in texts(example)) for example in examples]
        return [_joined([text for i in row for text in texts(examples[i])]) for row in best_fit(sizes, width)]

    train, validation = rows(split.train), rows(split.validation)
    if len(train) < least:
        raise ConfigError(
            f"train.packing makes {len(train)} rows of {width} tokens of {len(split.train)} examples, and "
            f"train.batch_size is {least}: a step would learn from rows more than once; give a smaller batch_size, or "
            "leave packing off"
        )
    empty = 1 - sum(len(row.tokens) for row in train) / (width * len(train))
    note = f"packed: {len(split.train)} examples in {len(train)} rows of {width} tokens, {empty:.1%} of them padding"
    if validation:
        note += f"; the {len(validation)} rows held out have {len(split.validation)}"
    report = dataclasses.replace(split.report, notes=[*split.report.notes, note])
    return Split(train, validation, report)


def best_fit(sizes: Sequence[int], width: int) -> list[list[int]]:
    """The numbers of `sizes` in rows that hold at most `width`, rows and numbers in order.

    Best fit decreasing (Johnson 1974, https://doi.org/10.1137/0203025): the largest first, each into the row that it
    leaves least room in. At most 11/9 of the fewest rows possible, and one.
    """
    rows: list[list[int]] = []
    with_room: dict[int, list[int]] = defaultdict(list)
    rooms: list[int] = []  # sorted, each once: at most `width` of them, however many rows
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        assert 0 < sizes[i] <= width, f"{sizes[i]} tokens do not fit in {width}"
        at = bisect.bisect_left(rooms, sizes[i])
        if at == len(rooms):
            row, room = len(rows), width
            rows.append([])
        else:
            room = rooms[at]
            row = with_room[room].pop()
            if not with_room[room]:
                del rooms[at]
        rows[row].append(i)
        left = room - sizes[i]
        if not with_room[left]:
            bisect.insort(rooms, left)
        with_room[left].append(row)
    return sorted(sorted(row) for row in rows)


def _joined(texts: Sequence[SFTRow]) -> PackedRow:
    return PackedRow(
        tokens=[token for text in texts for token in text.tokens],
        loss_mask=[learnt for text in texts for learnt in text.loss_mask],
        lengths=[len(text.tokens) for text in texts],
    )

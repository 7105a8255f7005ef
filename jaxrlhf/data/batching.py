"""Pad rows to numpy arrays on the host. Masks come from lengths, never from token ids."""

import collections
import dataclasses
import heapq
from collections.abc import Iterable, Sequence
from typing import Any, TypeVar

import numpy as np

from jaxrlhf.data.datasets import PairRow, PromptRow, SFTRow
from jaxrlhf.data.labelled import RankedRow
from jaxrlhf.data.packing import PackedRow
from jaxrlhf.types import Batch, PackedPairs, Pairs, Prompts, Responses

T = TypeVar("T")


def bucket(length: int, limit: int) -> int:
    """Round up to the next of 16, 24, 32, 48, 64, 96, ... and at most `limit`.

    Two sizes per doubling: few shapes to compile, and less than a third of the columns is added as padding.
    """
    assert length <= limit, f"{length} tokens do not fit in {limit}"
    size = 16
    while size < length:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return min(size, limit)


def widths(longest: Iterable[int], limit: int, worth: float) -> tuple[int, ...]:
    """Widths for batches whose longest rows have these lengths, narrowest first: of those of `bucket` the widest, and
    others as long as each saves at least `worth` columns in all batches together."""
    counts = collections.Counter(bucket(length, limit) for length in longest)

    def columns(chosen: set[int]) -> int:
        return sum(number * min(w for w in chosen if w >= width) for width, number in counts.items())

    chosen = {max(counts)}
    while others := counts.keys() - chosen:
        best = min(others, key=lambda width: (columns({*chosen, width}), width))
        if columns(chosen) - columns({*chosen, best}) < worth:
            break
        chosen.add(best)
    return tuple(sorted(chosen))


def batch(rows: Sequence[SFTRow], pad_id: int, length: int) -> Batch:
    """Right-pad rows to a `Batch` [len(rows), length]; every row must fit."""
    tokens, mask = _pad([row.tokens for row in rows], pad_id, length)
    loss_mask = np.zeros(mask.shape, bool)
    for i, row in enumerate(rows):
        loss_mask[i, : len(row.tokens)] = row.loss_mask
    return Batch(tokens=tokens, mask=mask, loss_mask=loss_mask)  # type: ignore[arg-type]


def _pad(sequences: Sequence[list[int]], pad_id: int, length: int, left: bool = False) -> tuple[np.ndarray, np.ndarray]:
    """Pad on the right or `left`: tokens i32 and mask bool, both [len(sequences), length]."""
    tokens = np.full((len(sequences), length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    for i, sequence in enumerate(sequences):
        size = len(sequence)
        assert size <= length, f"{size} tokens do not fit in {length}"
        columns = slice(length - size, None) if left else slice(size)
        tokens[i, columns], mask[i, columns] = sequence, True
    return tokens, mask


def pairs(rows: Sequence[PairRow], pad_id: int, length: int) -> Pairs:
    """Right-pad pairs to two batches, each [len(rows), length]."""
    chosen, rejected = [row.chosen for row in rows], [row.rejected for row in rows]
    return Pairs(chosen=batch(chosen, pad_id, length), rejected=batch(rejected, pad_id, length))


def texts(row: Any) -> tuple[SFTRow, ...]:
    """Sequences of a row: one, both of a pair, or all of a ranking."""
    if isinstance(row, PairRow):
        return row.chosen, row.rejected
    return row.responses if isinstance(row, RankedRow) else (row,)


def responses(rows: Sequence[Any], targets: Sequence[float], pad_id: int, length: int, group: int) -> Responses:
    """Right-pad rows with at most `group` sequences to `Responses` [len(rows), group, length], one target per row.

    Empty slots of a group have a mask that is true for their first token, and `real` false.
    """
    tokens = np.full((len(rows), group, length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    real = np.zeros(tokens.shape[:2], bool)
    mask[:, :, 0] = True
    for i, row in enumerate(rows):
        sequences = [text.tokens for text in texts(row)]
        count = len(sequences)
        tokens[i, :count], mask[i, :count] = _pad(sequences, pad_id, length)
        real[i, :count] = True
    return Responses(tokens, mask, real, np.asarray(targets, np.float32))  # type: ignore[arg-type]


def packed(rows: Sequence[PackedRow], pad_id: int, length: int) -> Batch:
    """`batch` with segments and positions, both 0 for padding, so that padding attends to at least one token."""
    segments = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        size = len(row.tokens)
        segments[i, :size] = np.repeat(np.arange(len(row.lengths)), row.lengths)
        positions[i, :size] = np.concatenate([np.arange(n) for n in row.lengths])
    return dataclasses.replace(batch(rows, pad_id, length), segments=segments, positions=positions)  # type: ignore[arg-type]


def packed_pairs(rows: Sequence[PackedRow], pad_id: int, length: int, most: int) -> PackedPairs:
    """`PackedPairs` [len(rows), length] with slots for `most` pairs per row."""
    ends = np.zeros((2, len(rows), most), np.int32)
    valid = np.zeros((len(rows), most), bool)
    for i, row in enumerate(rows):
        last = np.cumsum(row.lengths) - 1
        ends[:, i, : len(last) // 2] = last.reshape(-1, 2).T
        valid[i, : len(last) // 2] = True
    return PackedPairs(packed(rows, pad_id, length), *ends, valid)  # type: ignore[arg-type]


def longest(rows: Sequence[T], count: int) -> list[T]:
    """The `count` longest rows, repeated if there are fewer; empty if there are no rows."""
    by_length = heapq.nlargest(count, rows, key=row_length)
    return [by_length[i % len(by_length)] for i in range(count)] if by_length else []


def row_length(row: Any) -> int:
    """Tokens of a row, or of its longest sequence."""
    return len(row.tokens) if isinstance(row, PromptRow) else max(len(text.tokens) for text in texts(row))


def prompts(rows: Sequence[PromptRow], pad_id: int, length: int, samples: Sequence[int] | None = None) -> Prompts:
    """Left-pad prompts to `Prompts` [len(rows), length]. `samples` numbers the completions of a prompt; None: all 0."""
    assert all(row.tokens for row in rows), "an empty prompt"
    tokens, mask = _pad([row.tokens for row in rows], pad_id, length, left=True)
    index = np.array([row.index for row in rows], np.int32)
    sample = np.zeros(len(rows), np.int32) if samples is None else np.asarray(samples, np.int32)
    assert sample.shape == index.shape, (sample.shape, index.shape)
    return Prompts(tokens=tokens, mask=mask, index=index, sample=sample)  # type: ignore[arg-type]

"""Rows of token lists to padded arrays, on the host. Masks come from lengths, never from token ids."""

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np

from jaxrlhf.data.datasets import PairRow, PromptRow, SFTRow
from jaxrlhf.data.labelled import RankedRow
from jaxrlhf.data.packing import PackedRow
from jaxrlhf.types import Batch, PackedPairs, Pairs, Prompts, Responses

T = TypeVar("T")


def bucket(length: int, limit: int) -> int:
    """The padded length for `length` tokens: the next of 16, 24, 32, 48, 64, 96, ... and never more than `limit`.

    Two sizes per doubling: few programs to compile, and less than a third of a batch's columns is padding added here.
    """
    assert length <= limit, f"{length} tokens do not fit in {limit}"
    size = 16
    while size < length:
        size += size // 2 if size & (size - 1) == 0 else size // 3
    return min(size, limit)


def batch(rows: Sequence[SFTRow], pad_id: int, length: int) -> Batch:
    """Right-padded `Batch` of numpy arrays [len(rows), length]; every row must fit."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    loss_mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        size = len(row.tokens)
        assert size <= length, f"{size} tokens do not fit in {length}"
        tokens[i, :size] = row.tokens
        mask[i, :size] = True
        loss_mask[i, :size] = row.loss_mask
    return Batch(tokens=tokens, mask=mask, loss_mask=loss_mask)  # type: ignore[arg-type]


def pairs(rows: Sequence[PairRow], pad_id: int, length: int) -> Pairs:
    """`Pairs` of two right-padded batches, each [len(rows), length]."""
    chosen, rejected = [row.chosen for row in rows], [row.rejected for row in rows]
    return Pairs(chosen=batch(chosen, pad_id, length), rejected=batch(rejected, pad_id, length))


def texts(row: Any) -> tuple[SFTRow, ...]:
    """The sequences of a row: one, both of a pair, all of a ranking."""
    if isinstance(row, PairRow):
        return row.chosen, row.rejected
    return row.responses if isinstance(row, RankedRow) else (row,)


def responses(rows: Sequence[Any], targets: Sequence[float], pad_id: int, length: int, group: int) -> Responses:
    """`Responses` [len(rows), group, length] of rows with at most `group` texts, and what is said of each row."""
    tokens = np.full((len(rows), group, length), pad_id, np.int32)
    mask = np.zeros(tokens.shape, bool)
    real = np.zeros(tokens.shape[:2], bool)
    mask[:, :, 0] = True
    for i, row in enumerate(rows):
        for k, text in enumerate(texts(row)):
            size = len(text.tokens)
            assert size <= length, f"{size} tokens do not fit in {length}"
            tokens[i, k, :size], mask[i, k, :size], real[i, k] = text.tokens, True, True
    return Responses(tokens, mask, real, np.asarray(targets, np.float32))  # type: ignore[arg-type]


def packed(rows: Sequence[PackedRow], pad_id: int, length: int) -> Batch:
    """`batch` with segments and positions. Padding has segment 0 and position 0: there is a token that it may see."""
    segments = np.zeros((len(rows), length), np.int32)
    positions = np.zeros((len(rows), length), np.int32)
    for i, row in enumerate(rows):
        size = len(row.tokens)
        segments[i, :size] = np.repeat(np.arange(len(row.lengths)), row.lengths)
        positions[i, :size] = np.concatenate([np.arange(n) for n in row.lengths])
    made = batch(rows, pad_id, length)
    return dataclasses.replace(made, segments=segments, positions=positions)  # type: ignore[arg-type]


def packed_pairs(rows: Sequence[PackedRow], pad_id: int, length: int, most: int) -> PackedPairs:
    """`PackedPairs` [len(rows), length] with room for `most` pairs in a row."""
    ends = np.zeros((2, len(rows), most), np.int32)
    valid = np.zeros((len(rows), most), bool)
    for i, row in enumerate(rows):
        last = np.cumsum(row.lengths) - 1
        ends[:, i, : len(last) // 2] = last.reshape(-1, 2).T
        valid[i, : len(last) // 2] = True
    return PackedPairs(packed(rows, pad_id, length), *ends, valid)  # type: ignore[arg-type]


def longest(rows: Sequence[T], count: int) -> list[T]:
    """The `count` longest rows, again and again if there are fewer; none if there are none."""
    by_length = sorted(rows, key=lambda row: -longer(row))
    return [by_length[i % len(by_length)] for i in range(count)] if by_length else []


def longer(row: Any) -> int:
    """Tokens of a row; of several texts, those of the longest."""
    return len(row.tokens) if isinstance(row, PromptRow) else max(len(text.tokens) for text in texts(row))


def prompts(rows: Sequence[PromptRow], pad_id: int, length: int, samples: Sequence[int] | None = None) -> Prompts:
    """Left-padded `Prompts` [len(rows), length]. `samples` numbers each row's completion of its prompt; None: all 0."""
    tokens = np.full((len(rows), length), pad_id, np.int32)
    mask = np.zeros((len(rows), length), bool)
    for i, row in enumerate(rows):
        size = len(row.tokens)
        assert 0 < size <= length, f"{size} tokens do not fit in {length}"
        tokens[i, length - size :] = row.tokens
        mask[i, length - size :] = True
    index = np.array([row.index for row in rows], np.int32)
    sample = np.zeros(len(rows), np.int32) if samples is None else np.asarray(samples, np.int32)
    assert sample.shape == index.shape, (sample.shape, index.shape)
    return Prompts(tokens=tokens, mask=mask, index=index, sample=sample)  # type: ignore[arg-type]

"""Mix data sets by weight. The order of rows is a function of (seed, epoch), as that of a single data set."""

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from jaxrlhf.data.loader import permutation
from jaxrlhf.errors import DataError


@dataclass(frozen=True)
class Part:
    """A data set of a mixture. Its training rows follow those of the part before."""

    name: str
    rows: int  # to train on
    held_out: int
    draws: int
    """Rows of it in an epoch of the mixture, which has as many draws as the mixture has rows."""


def draws(names: Sequence[str], rows: Sequence[int], weights: Sequence[float | None], temperature: float) -> list[int]:
    """Rows that each data set has in an epoch: sum(rows) shared out in proportion to weight^(1 / temperature) by
    largest remainders. A weight of None is the number of rows.

    With these weights temperature 1 is all rows once, and above 1 as in T5 (https://arxiv.org/abs/1910.10683, section
    3.5.2). Raises DataError for a data set that gets no row.
    """
    total = sum(rows)
    shares = np.array([size if w is None else w for size, w in zip(rows, weights, strict=True)]) ** (1 / temperature)
    quotas = total * shares / shares.sum()
    counts = np.floor(quotas + 1e-9).astype(int)
    counts[np.argsort(counts - quotas, kind="stable")[: total - counts.sum()]] += 1
    for name, count, quota in zip(names, counts, quotas, strict=True):
        if count == 0:
            raise DataError(
                f"data.mix: the weight of {name} comes to {quota:.2g} of the {total} rows of an epoch, so that none of "
                "its rows would be trained on; raise its weight, or leave it out"
            )
    return counts.tolist()


@functools.lru_cache(maxsize=4)
def interleaved(counts: tuple[int, ...]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """(data set, number among its own) of each place when data sets of these `counts` are spread evenly: every stretch
    of places has rows of each in proportion, to within a row."""
    part = np.repeat(np.arange(len(counts)), counts)
    number = np.concatenate([np.arange(count) for count in counts])
    place = np.concatenate([(np.arange(count) + 0.5) / max(count, 1) for count in counts])
    order = np.argsort(place, kind="stable")
    return part[order], number[order]


def mixed_rows_at(step: int, batch_size: int, parts: Sequence[Part], seed: int, shuffle: bool) -> NDArray[np.int64]:
    """Row numbers of the batch of `step`, int64 [batch_size], in the rows of all `parts` one after the other.

    Places of an epoch are dealt to the parts evenly, the same in each epoch. A part fills its places with an endless
    stream of its own epochs, in the order `permutation(rows, seed, epoch, part)`, or in file order without `shuffle`.
    """
    which, numbers = interleaved(tuple(part.draws for part in parts))
    epoch, place = np.divmod(np.arange(step * batch_size, (step + 1) * batch_size), len(which))
    found, first = np.zeros(batch_size, np.int64), 0
    for i, part in enumerate(parts):
        mine = which[place] == i
        passes, row = np.divmod(epoch[mine] * part.draws + numbers[place[mine]], part.rows)
        if shuffle:
            for own in np.unique(passes):
                here = passes == own
                row[here] = _order_of(i)(part.rows, seed, int(own), i)[row[here]]
        found[mine] = first + row
        first += part.rows
    return found


def passes(parts: Sequence[Part], rows: int) -> dict[str, float]:
    """Epochs of each part after this number of rows of the mixture."""
    which, _ = interleaved(tuple(part.draws for part in parts))
    epoch, place = divmod(rows, len(which))
    counts = np.bincount(which[:place], minlength=len(parts))
    return {part.name: (epoch * part.draws + int(count)) / part.rows for part, count in zip(parts, counts, strict=True)}


@functools.lru_cache(maxsize=64)
def _order_of(part: int) -> Callable[..., NDArray[np.int64]]:
    """`permutation` with a cache of a data set's own: of its last two epochs."""
    return functools.lru_cache(maxsize=2)(permutation.__wrapped__)

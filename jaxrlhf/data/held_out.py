"""Hold out rows or prompts, and find rows that are on both sides."""

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxrlhf.config import Data
from jaxrlhf.data.examples import Example
from jaxrlhf.data.loader import permutation
from jaxrlhf.errors import DataError

T = TypeVar("T")
_SPLIT = 0x5EED  # separates the random order of the split from those of the epochs


@dataclass(frozen=True)
class Lazy(Sequence[T]):
    """Rows that are made when they are asked for, by `read(number)`."""

    size: int
    read: Callable[[int], T]

    def __len__(self) -> int:
        return self.size

    def __getitem__(self, at: Any) -> Any:
        if isinstance(at, slice):
            return [self.read(i) for i in range(*at.indices(self.size))]
        if not -self.size <= at < self.size:
            raise IndexError(at)
        return self.read(int(at) % self.size)


@dataclass(frozen=True)
class Usable(Generic[T]):
    """The usable rows of a data set. prompts, contents: numbers that are equal for equal prompts and rows."""

    rows: Sequence[T]
    numbers: NDArray[np.int64]  # of the row of the data that each is made of
    prompts: NDArray[np.uint64]
    contents: NDArray[np.uint64]

    def __len__(self) -> int:
        return len(self.rows)

    @classmethod
    def of(cls, rows: Sequence[T], prepared: Sequence[Any]) -> "Usable[T]":
        """`rows` with the numbers and digests of `prepared`."""
        digests = np.array([item.digests for item in prepared], np.uint64).reshape(-1, 2)
        return cls(rows, np.array([item.number for item in prepared], np.int64), digests[:, 0], digests[:, 1])

    def where(self, chosen: NDArray[np.bool_]) -> "Usable[T]":
        """The rows for which `chosen` is true."""
        places = np.flatnonzero(chosen)
        rows: Sequence[T] = Lazy(len(places), lambda k: self.rows[places[k]])
        rows = list(rows) if isinstance(self.rows, list) else rows
        return Usable(rows, self.numbers[chosen], self.prompts[chosen], self.contents[chosen])


def digests(example: Example) -> tuple[int, int]:
    """(of the prompt, of the whole example), 64 bits each. The prompt of a whole conversation is what precedes its
    first answer, that of a text the text."""
    prompt, completions = example.prompt, [*example.completions]
    if prompt is None:
        (content,) = completions
        answers = [i for i, turn in enumerate(content) if not isinstance(turn, str) and turn["role"] == "assistant"]
        prompt = content[: answers[0]] if answers else content
    key = json.dumps(prompt, sort_keys=True, default=str)
    return _digest(key), _digest(f"{key} {json.dumps([completions, example.scores], sort_keys=True, default=str)}")


def _digest(text: str) -> int:
    return int.from_bytes(hashlib.blake2b(text.encode(errors="surrogatepass"), digest_size=8).digest())


def split(rows: Usable[T], total: int, config: Data) -> tuple[Usable[T], Usable[T]]:
    """Hold out `config.validation_fraction` of the `total` rows of the data, or of its different prompts: (rows to
    train on, held-out rows)."""
    if config.split_by == "prompt":
        _, first, prompt = np.unique(rows.prompts, return_index=True, return_inverse=True)
        place = np.argsort(np.argsort(first))  # of each different prompt, by its first row
        chosen = np.isin(place[prompt], _drawn(len(first), config))
    else:
        chosen = np.isin(rows.numbers, _drawn(total, config))
    return rows.where(~chosen), rows.where(chosen)


def overlap(train: Usable[T], held_out: Usable[T], config: Data, source: str) -> list[str]:
    """A note on held-out rows that are also trained on, or whose prompt is; [] if there are none.

    Raises DataError if all rows of another source are also trained on.
    """
    same = int(np.isin(held_out.contents, train.contents).sum())
    same_prompt = int(np.isin(held_out.prompts, train.prompts).sum())
    if same == len(held_out) and not config.validation_fraction:
        raise DataError(
            f"data {source}: all {same} held-out rows are also trained on, so they would measure memory; name other "
            "rows in data.validation_path or another split in data.validation_split, or set data.validation_fraction"
        )
    if not same_prompt:
        return []
    remedy = ""
    if config.validation_fraction and config.split_by == "row":
        remedy = "; data.split_by: prompt keeps a prompt on one side"
    equal = f", {same} of them with the same completion" if same else ""
    return [f"{same_prompt} of {len(held_out)} held-out rows have a prompt that is also trained on{equal}{remedy}"]


def _drawn(total: int, config: Data) -> NDArray[np.int64]:
    count = max(1, round(config.validation_fraction * total))
    return permutation(total, config.split_seed, _SPLIT)[:count]

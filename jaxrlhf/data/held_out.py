"""Hold out rows or prompts, and find rows that are on both sides."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, TypeVar

from jaxrlhf.config import Data
from jaxrlhf.data.examples import Example
from jaxrlhf.data.loader import permutation
from jaxrlhf.errors import DataError

T = TypeVar("T")
_SPLIT = 0x5EED  # separates the random order of the split from those of the epochs


@dataclass(frozen=True, slots=True)
class Usable(Generic[T]):
    """A row made of row `number` of the data. prompt, content: text that is equal for equal prompts and rows."""

    number: int
    prompt: str
    content: str
    row: T


def usable(number: int, example: Example, row: T) -> Usable[T]:
    """Describe a usable row. The prompt of a whole conversation is what precedes its first answer, that of a text the
    text."""
    prompt, completions = example.prompt, [*example.completions]
    if prompt is None:
        (content,) = completions
        answers = [i for i, turn in enumerate(content) if not isinstance(turn, str) and turn["role"] == "assistant"]
        prompt = content[: answers[0]] if answers else content
    key = json.dumps(prompt, sort_keys=True, default=str)
    return Usable(number, key, f"{key} {json.dumps([completions, example.scores], sort_keys=True, default=str)}", row)


def split(rows: Sequence[Usable[T]], total: int, config: Data) -> tuple[list[Usable[T]], list[Usable[T]]]:
    """Hold out `config.validation_fraction` of the `total` rows of the data, or of its different prompts: (rows to
    train on, held-out rows)."""
    if config.split_by == "prompt":
        prompts = list(dict.fromkeys(row.prompt for row in rows))
        held_out = {prompts[i] for i in _drawn(len(prompts), config)}
        chosen = [row.prompt in held_out for row in rows]
    else:
        numbers = _drawn(total, config)
        chosen = [row.number in numbers for row in rows]
    parts = list(zip(rows, chosen, strict=True))
    return [row for row, held in parts if not held], [row for row, held in parts if held]


def overlap(train: Sequence[Usable[T]], held_out: Sequence[Usable[T]], config: Data, source: str) -> list[str]:
    """A note on held-out rows that are also trained on, or whose prompt is; [] if there are none.

    Raises DataError if all rows of another source are also trained on.
    """
    contents, prompts = {row.content for row in train}, {row.prompt for row in train}
    same = sum(row.content in contents for row in held_out)
    same_prompt = sum(row.prompt in prompts for row in held_out)
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


def _drawn(total: int, config: Data) -> set[int]:
    count = max(1, round(config.validation_fraction * total))
    return {int(i) for i in permutation(total, config.split_seed, _SPLIT)[:count]}

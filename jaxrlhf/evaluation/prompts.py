"""The prompts of an evaluation, from one or several files, with their references and categories."""

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.config import PPOConfig, replace
from jaxrlhf.data.datasets import PromptRow, columns
from jaxrlhf.data.formats import answer_column
from jaxrlhf.data.sources import Rows
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, DataError, quoted
from jaxrlhf.evaluation import generation

CATEGORY = "category"
"""Column of the categories unless another is named."""
NO_CATEGORY = "(none)"


@dataclass(frozen=True)
class Question:
    """A prompt to evaluate on. `row.index` counts the rows of all files, `number` those of `file`, both from 0."""

    row: PromptRow
    file: str
    number: int
    reference: str | None
    category: str


@dataclass(frozen=True)
class Questions:
    """All prompts that leave room for a response in the model's context, with the tokenizer that read them.

    references_from, category_from: column names, "" if there are none.
    """

    tokenizer: Tokenizer
    questions: list[Question]
    references_from: str
    category_from: str

    @property
    def rows(self) -> list[PromptRow]:
        return [question.row for question in self.questions]

    def sample(self, count: int, seed: int) -> "Questions":
        """`count` random prompts without replacement, in file order; all if there are fewer."""
        picked = np.random.default_rng(seed).permutation(len(self.questions))[:count]
        return dataclasses.replace(self, questions=[self.questions[i] for i in sorted(picked)])

    def only(self, indices: set[int]) -> "Questions":
        """The prompts whose `row.index` is among `indices`."""
        return dataclasses.replace(self, questions=[q for q in self.questions if q.row.index in indices])


def read(config: PPOConfig, files: Sequence[str], references: str, by: str, *, has_reward: bool) -> Questions:
    """Read the prompts of `files` (none: `config.data.path`), each in its own format; no weights.

    `references` is the column of reference answers ("": the answer column of each file's format), `by` that of the
    categories ("": `category`, if there is one). Raises ConfigError for a column that no file has, and without
    references if there is no reward; DataError for unreadable data.
    """
    tokenizer, found, offset = None, [], 0
    answers: dict[str, None] = {}
    for file in files or [config.data.path]:
        tokenizer, split = generation.read_prompts(replace(config, **{"data.path": file}))
        names = columns(split.train)
        column = references if references in names else "" if references else _answer_column(config, file, split.train)
        answers |= dict.fromkeys([column] if column else [])
        for row in split.train:
            moved = dataclasses.replace(row, index=offset + row.index)
            reference = _reference_text(row, column, file) if column else None
            group = category(row.columns, by or CATEGORY, f"row {row.index + 1} of {file}")
            found.append(Question(moved, file, row.index, reference, group))
        offset += split.report.rows
    assert tokenizer is not None
    names = list(columns([question.row for question in found]))
    sources = " and ".join(files or [config.data.path])
    for column in filter(None, (references, by)):
        if column not in names:
            raise ConfigError(f"there is no column {column!r} in {sources}; it has {', '.join(names)}")
    if not (answers or has_reward):
        raise ConfigError(
            f"nothing to measure completions by: give a reward (--reward, --reward-model, --reward.KEY), or name the "
            f"column of {sources} that has reference answers (--references); it has {', '.join(names)}. A reward that "
            "a run was given in Python is not in its config: give its file and name, --reward FILE.py:NAME"
        )
    category_from = by or (CATEGORY if CATEGORY in names else "")
    return Questions(tokenizer, found, ", ".join(answers), category_from)


def _answer_column(config: PPOConfig, file: str, rows: Sequence[PromptRow]) -> str:
    return answer_column(Rows(file, [row.columns for row in rows], []), config.data)


def category(row: Mapping[str, Any], column: str, where: str) -> str:
    """The category of a row, which is at the place `where` names; NO_CATEGORY if it has none. Raises DataError."""
    value = row.get(column)
    if value is None or value == "":
        return NO_CATEGORY
    if isinstance(value, str | int | float):
        return str(value)
    raise DataError(
        f"{where}: column {column!r} is {quoted(value)}; expected text or a number as the category; name another "
        "column (--by)"
    )


def _reference_text(row: PromptRow, column: str, file: str) -> str | None:
    """Text of `column` in a row (the last assistant turn of a conversation); None if the row has none."""
    value = row.columns.get(column)
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        value = value[-1].get("content")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"row {row.index + 1} of the prompts in {file}: column {column!r} is {quoted(value)}; expected text, a number "
        "or a conversation that ends with the assistant"
    )

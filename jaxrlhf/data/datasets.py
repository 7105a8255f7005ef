"""Files to tokenised rows, split and accounted for: every row that is lost or cut is counted and named."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

import numpy as np

from jaxrlhf.config import Data
from jaxrlhf.data import labels
from jaxrlhf.data.formats import Content, Example, Task, normalise, recognise
from jaxrlhf.data.loader import permutation
from jaxrlhf.data.sources import Rows, SourceLocation, read
from jaxrlhf.data.tokenise import Tokens, draft, fit, refusal, tokenise
from jaxrlhf.data.tokenizer import GUARD, Tokenizer
from jaxrlhf.errors import ConfigError, DataError

T = TypeVar("T")
_HELD_OUT = 0x5EED  # keeps the split apart from the order of epochs, which is drawn in the same way


@dataclass(frozen=True, slots=True)
class SFTRow:
    """One sequence; loss_mask is true for the tokens to predict, never for the first."""

    tokens: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two answers to one prompt: the same prompt tokens, then an answer with its end token (the loss mask). margin: by
    how much the first is better. tied: neither is."""

    chosen: SFTRow
    rejected: SFTRow
    margin: float = 0.0
    tied: bool = False


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt to answer. text: what a reward function sees, the prompt as people wrote it, without chat format; of a
    conversation with several turns a transcript. columns: the whole row. index: its number in the file, from 0.
    messages: the turns of a prompt that is a conversation."""

    tokens: list[int]
    text: str
    columns: dict[str, Any]
    index: int
    messages: list[dict[str, Any]] | None = field(default=None, repr=False)  # follows from columns: no part of a hash


@dataclass
class Report:
    """What became of the rows, for people: print it. Rows are named by file line, or by their place from 1."""

    source: str
    reading: str
    rows: int
    train: int = 0
    validation: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> places
    cut: dict[str, list[str]] = field(default_factory=dict)  # what was cut -> places
    lengths: list[int] = field(default_factory=list)  # tokens of each row kept; of a pair, with the longer answer
    notes: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        held_out = f", {self.validation} held out" if self.validation else ""
        lines = [f"data {self.source}: {self.rows} rows, {self.reading}; {self.train} kept{held_out}"]
        for verb, reasons in (("dropped", self.dropped), ("cut", self.cut)):
            for reason, places in reasons.items():
                named = ", ".join(places[:5]) + (", ..." if len(places) > 5 else "")
                lines.append(f"{verb} {len(places)}: {reason} ({named})")
        if self.lengths:
            low, half, high, top = np.quantile(self.lengths, [0, 0.5, 0.95, 1], method="nearest")
            lines.append(f"tokens per row: {low} to {top}, half up to {half}, 95% up to {high}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Split(Generic[T]):
    """Rows to train on, rows held out (perhaps none), and what became of the rest."""

    train: list[T]
    validation: list[T]
    report: Report


def sft_rows(config: Data, tokenizer: Tokenizer, completion_only: bool) -> Split[SFTRow]:
    """Sequences to learn: completions, or assistant turns, each with the token that ends it; all tokens where
    `completion_only` is false, and of plain text. Raises DataError and ConfigError."""

    def row(tokens: Tokens, example: Example, rows: Rows, i: int) -> SFTRow:
        return SFTRow(*tokens.sequence(0, learn_all=not completion_only))

    return train_validation_split(config, tokenizer, "sft", row)


def pair_rows(config: Data, tokenizer: Tokenizer, *, margins: bool = False, ties: bool = False) -> Split[PairRow]:
    """Preference pairs; the loss masks cover the answers. With `margins` the column `margin` is read, with `ties` the
    columns that `judgements.tied` knows. Raises DataError, also for pairs that are all tied or none, and ConfigError.
    """

    def row(tokens: Tokens, example: Example, rows: Rows, i: int) -> PairRow:
        where = f"data {rows.places[i]}"
        margin = labels.number(rows.rows[i], "margin", where) if margins else 0.0
        if margin < 0:
            raise DataError(f"{where}: column 'margin' is {margin:g}; the chosen answer is better by 0 or more")
        tied = ties and labels.tied(rows.rows[i], where)
        return PairRow(SFTRow(*tokens.sequence(0)), SFTRow(*tokens.sequence(1)), margin, tied)

    split = train_validation_split(config, tokenizer, "pairs", row)
    if ties:
        count = sum(pair.tied for pair in split.train)
        split.report.notes.append(f"{count} of {len(split.train)} pairs to train on are ties")
        if count in (0, len(split.train)):
            raise DataError(
                f"data {config.path}: {count} of {len(split.train)} pairs to train on are ties (columns tie, tied or "
                "label); learning from ties needs pairs with one and pairs without"
            )
        if split.validation and all(pair.tied for pair in split.validation):
            raise DataError(
                f"data {config.path}: all {len(split.validation)} held-out pairs are ties, which no accuracy can be "
                "measured on; hold out more"
            )
    return split


def prompt_rows(config: Data, tokenizer: Tokenizer) -> Split[PromptRow]:
    """Prompts to answer, ready for generation. Raises DataError and ConfigError."""

    return train_validation_split(config, tokenizer, "prompts", _prompt_row)


def prompts_from_texts(
    texts: Sequence[str], columns: Mapping[str, Sequence[Any]], config: Data, tokenizer: Tokenizer
) -> list[PromptRow]:
    """Finished prompts given in Python, as `prompt_rows` would read them from a column `prompt`; none may be lost.

    `columns` holds a value per prompt. Raises DataError for a prompt that cannot be used, by its number from 1.
    """
    for name, values in columns.items():
        if len(values) != len(texts):
            raise DataError(f"column '{name}' has {len(values)} values for {len(texts)} prompts")
    rows = [{"prompt": text, **{name: values[i] for name, values in columns.items()}} for i, text in enumerate(texts)]
    places = [SourceLocation("prompts", i + 1, line=False) for i in range(len(rows))]
    kept, report = _usable(
        Rows("prompts", rows, places), replace(config, template="", columns={}), tokenizer, "prompts", _prompt_row
    )
    if len(kept) < len(rows):
        raise DataError(f"not every prompt can be used\n{report}")
    return list(kept.values())


def columns(rows: Sequence[PromptRow]) -> dict[str, list[Any]]:
    """The columns of the data set, for reward functions: a value per row, None where a row has none."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return {name: [row.columns.get(name) for row in rows] for name in names}


def _prompt_row(tokens: Tokens, example: Example, rows: Rows, i: int) -> PromptRow:
    assert example.prompt is not None
    taken = {"prompts", "completions"} & set(rows.rows[i])
    if taken:
        raise DataError(
            f"data {rows.source}: a column may not be called {taken.pop()!r}, because a reward function has an "
            "argument of that name; rename it with data.columns"
        )
    turns = None if isinstance(example.prompt, str) else example.prompt
    return PromptRow(tokens.prompt, as_written(example.prompt), rows.rows[i], i, turns)


def as_written(prompt: Content) -> str:
    """A prompt as people wrote it, without chat format; a conversation with several turns as a transcript."""
    if isinstance(prompt, str):
        return prompt.replace(GUARD, "")
    said = [turn for turn in prompt if turn["role"] != "system"]
    if len(said) == 1:
        return said[0]["content"]
    return "\n\n".join(f"{turn['role'].capitalize()}: {turn['content']}" for turn in prompt)


def train_validation_split(config: Data, tokenizer: Tokenizer, task: Task, row: Callable[..., T]) -> Split[T]:
    """The rows of `task`, row `i` as `row(tokens, example, rows, i)` makes it. Raises DataError and ConfigError."""
    if config.validation_path and config.validation_fraction:
        raise ConfigError("data.validation_path and data.validation_fraction both hold rows out; set one of them")
    rows = read(config)
    kept, report = _usable(rows, config, tokenizer, task, row)
    held: dict[int, T] = {}
    if config.validation_fraction:
        count = max(1, round(config.validation_fraction * len(rows.rows)))
        chosen = {int(i) for i in permutation(len(rows.rows), config.split_seed, _HELD_OUT)[:count]}
        held = {i: value for i, value in kept.items() if i in chosen}
        kept = {i: value for i, value in kept.items() if i not in chosen}
        if not held or not kept:
            raise DataError(
                f"data {rows.source}: data.validation_fraction {config.validation_fraction} leaves {len(kept)} rows to "
                f"train on and {len(held)} held out\n{report}"
            )
    elif config.validation_path:
        held, other = _usable(read(config, config.validation_path), config, tokenizer, task, row)
        report.notes.append(f"held out: {other}")
    report.train, report.validation = len(kept), len(held)
    return Split(list(kept.values()), list(held.values()), report)


def _usable(
    rows: Rows, config: Data, tokenizer: Tokenizer, task: Task, row: Callable[..., T]
) -> tuple[dict[int, T], Report]:
    """The rows that can be used, by number, and the report."""
    reading = recognise(rows.columns, task, config, rows.source)
    guard = (lambda text: text) if config.control_tokens else tokenizer.guard
    report = Report(rows.source, str(reading), len(rows.rows))
    examples: dict[int, Example] = {}
    drafts = {}
    for i, place in enumerate(rows.places):
        example = normalise(rows, i, reading, config, tokenizer.has_chat, guard)
        if reason := refusal(example, task, tokenizer.bos_id is not None):
            report.dropped.setdefault(reason, []).append(place.short)
            continue
        try:
            drafts[i], examples[i] = draft(example, task, tokenizer), example
        except DataError as error:
            raise DataError(f"data {place}: {error}") from error
    kept: dict[int, T] = {}
    for i, tokens in zip(drafts, tokenise(list(drafts.values()), tokenizer), strict=True):
        place = rows.places[i]
        fitted, note = fit(tokens, config, tokenizer)
        if fitted is None and config.truncation == "error":
            raise DataError(f"data {place}: {note} ({len(tokens)} tokens), and data.truncation is error")
        if note:
            (report.dropped if fitted is None else report.cut).setdefault(note, []).append(place.short)
        if fitted is not None:
            kept[i] = row(fitted, examples[i], rows, i)
            report.lengths.append(len(fitted))
    report.train = len(kept)
    if not kept:
        raise DataError(f"data {rows.source}: none of its {len(rows.rows)} rows can be used\n{report}")
    plain = next(iter(drafts.values())).plain
    report.notes.append("written as plain text" if plain else "written in the tokenizer's chat format")
    if spelt := sum(item.guarded for item in drafts.values()):
        report.notes.append(f"{spelt} rows spell control tokens of the tokenizer; they are read as ordinary text")
    return kept, report

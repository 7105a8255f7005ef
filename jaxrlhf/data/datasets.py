"""Load data sets as tokenised rows, split into training and held-out rows, with a report of dropped and cut rows."""

import json
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray

from jaxrlhf.config import Data
from jaxrlhf.data import held_out, labels, token_cache
from jaxrlhf.data.examples import Content, Example
from jaxrlhf.data.file_readers import SourceLocation
from jaxrlhf.data.formats import Task
from jaxrlhf.data.held_out import Lazy, Usable
from jaxrlhf.data.loader import rows_at
from jaxrlhf.data.mixing import Part, draws, interleaved, mixed_rows_at, passes
from jaxrlhf.data.preparation import Preparation, Report
from jaxrlhf.data.sources import Rows, read_rows, validation_source
from jaxrlhf.data.tokenise import TokenisedExample
from jaxrlhf.data.tokenizer import ESCAPE, Tokenizer
from jaxrlhf.errors import DataError, counted

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class SFTRow:
    """One sequence. loss_mask is true for the tokens to train on, never for the first."""

    tokens: list[int]
    loss_mask: list[bool]


@dataclass(frozen=True, slots=True)
class PairRow:
    """Two completions of one prompt; the loss masks cover the completions with their end token. margin: by how much
    chosen is better. tied: neither is better."""

    chosen: SFTRow
    rejected: SFTRow
    margin: float = 0.0
    tied: bool = False


@dataclass(frozen=True, slots=True)
class PromptRow:
    """A prompt for generation.

    text: the prompt without chat template, for reward functions; a transcript if it has several turns.
    columns: the whole row.    index: the row's number in the file, from 0.    messages: the turns, if it has turns.
    """

    tokens: list[int]
    text: str
    columns: dict[str, Any]
    index: int
    messages: list[dict[str, Any]] | None = field(default=None, repr=False)  # follows from columns: not hashed


@dataclass(frozen=True)
class Split(Generic[T]):
    """Training rows, held-out rows (perhaps none) and the report. `parts` are the data sets of a mixture."""

    train: Sequence[T]
    validation: Sequence[T]
    report: Report
    parts: tuple[Part, ...] = ()

    @property
    def sizes(self) -> list[int]:
        """Numbers of training rows of its data sets, which follow each other."""
        return [part.rows for part in self.parts] or [len(self.train)]

    def rows_at(self, step: int, batch_size: int, seed: int, shuffle: bool) -> list[int]:
        """Numbers of the training rows of the batch of `step`."""
        if self.parts:
            return mixed_rows_at(step, batch_size, self.parts, seed, shuffle).tolist()
        return rows_at(step, batch_size, len(self.train), seed, shuffle).tolist()

    def epochs(self, rows: int) -> dict[str, float]:
        """Metrics after training on this number of rows: passes over all of them, and over each part of a mixture."""
        of_parts = {f"epochs/{name}": value for name, value in passes(self.parts, rows).items()} if self.parts else {}
        return {"epoch": rows / len(self.train), **of_parts}


def sft_rows(config: Data, tokenizer: Tokenizer, completion_only: bool) -> Split[SFTRow]:
    """Load sequences for supervised fine-tuning. The loss mask covers completions or assistant turns with their end
    token; without `completion_only`, and for plain text, all tokens. Raises DataError."""

    def make_row(tokens: TokenisedExample, example: Example, rows: Rows, i: int) -> SFTRow:
        return SFTRow(*tokens.sequence(0, all_tokens=not completion_only))

    return train_validation_split(config, tokenizer, "sft", make_row, variant=str(completion_only))


def pair_rows(config: Data, tokenizer: Tokenizer, *, margins: bool = False, ties: bool = False) -> Split[PairRow]:
    """Load preference pairs. `margins` reads the column `margin`; `ties` keeps pairs of which neither is better.

    Raises ConfigError, and DataError, with `ties` also if the training pairs are all ties or none, or the held-out
    pairs are all ties.
    """

    def make_row(tokens: TokenisedExample, example: Example, rows: Rows, i: int) -> PairRow:
        where = f"data {rows.locations[i]}"
        margin = labels.parse_number(rows.rows[i], "margin", where) if margins else 0.0
        if margin < 0:
            raise DataError(f"{where}: column 'margin' is {margin:g}; expected 0 or more, as chosen is the better one")
        tied = example.scores[0] == example.scores[1]
        return PairRow(SFTRow(*tokens.sequence(0)), SFTRow(*tokens.sequence(1)), margin, tied)

    split = train_validation_split(config, tokenizer, "pairs", make_row, ties=ties, variant=str(margins))
    if ties:
        count = sum(pair.tied for pair in split.train)
        note = f"{count} of {len(split.train)} pairs to train on are ties"
        split.report.notes.append(note)
        if count in (0, len(split.train)):
            raise DataError(
                f"data {config.name}: {note} (columns tie, tied or label, or equal scores); training with ties needs "
                "both tied and untied pairs"
            )
        if split.validation and all(pair.tied for pair in split.validation):
            raise DataError(
                f"data {config.name}: all {len(split.validation)} held-out pairs are ties, so accuracy is undefined; "
                "hold out more rows"
            )
    return split


def prompt_rows(config: Data, tokenizer: Tokenizer) -> Split[PromptRow]:
    """Load prompts for generation. Raises DataError."""
    return train_validation_split(config, tokenizer, "prompts", _prompt_row, variant="")


def prompts_from_texts(
    texts: Sequence[str], columns: Mapping[str, Sequence[Any]], config: Data, tokenizer: Tokenizer
) -> list[PromptRow]:
    """Convert finished prompts as `prompt_rows` does for a column `prompt`. `columns` holds a value per prompt.

    Raises DataError for a prompt that cannot be used, by its number from 1.
    """
    for name, values in columns.items():
        if len(values) != len(texts):
            raise DataError(f"column '{name}' has {counted(len(values), 'value')} for {counted(len(texts), 'prompt')}")
    _check_names(columns, "prompts")
    locations = [SourceLocation("prompts", i + 1, line=False) for i in range(len(texts))]
    rows = Rows("prompts", [{"prompt": text} for text in texts], locations)
    config = replace(config, mix=(), mix_temperature=1.0, template="", columns={})
    preparation = Preparation(rows, config, tokenizer, "prompts", _prompt_row)
    kept = [item.row for item in preparation.add(rows)]
    report = preparation.finish()
    if len(kept) < len(texts):
        raise DataError(f"not every prompt can be used\n{report}")
    given = [{"prompt": text, **{name: values[i] for name, values in columns.items()}} for i, text in enumerate(texts)]
    return [replace(row, columns=values) for row, values in zip(kept, given, strict=True)]


def columns(rows: Sequence[PromptRow]) -> dict[str, list[Any]]:
    """Columns of the data set for reward functions: one value per row, None where a row lacks the column."""
    names = dict.fromkeys(name for row in rows for name in row.columns)
    return {name: [row.columns.get(name) for row in rows] for name in names}


def _prompt_row(tokens: TokenisedExample, example: Example, rows: Rows, i: int) -> PromptRow:
    assert example.prompt is not None
    _check_names(rows.rows[i], rows.source)
    messages = None if isinstance(example.prompt, str) else example.prompt
    return PromptRow(tokens.prompt, prompt_text(example.prompt), rows.rows[i], rows.start + i, messages)


def _check_names(names: Iterable[str], source: str) -> None:
    for name in names:
        if name in ("prompts", "completions"):
            raise DataError(
                f"data {source}: a column may not be called {name!r}, because reward functions have an argument of "
                "that name; rename it with data.columns"
            )


def prompt_text(prompt: Content) -> str:
    """Return the text of a prompt without chat template; a transcript, with its tool calls, if it has several turns."""
    if isinstance(prompt, str):
        return prompt.replace(ESCAPE, "")
    turns = [turn for turn in prompt if turn["role"] != "system"]
    if len(turns) == 1:
        return turns[0]["content"]
    texts = [
        "\n".join(filter(None, (turn["content"], *map(_call_text, turn.get("tool_calls", []))))) for turn in prompt
    ]
    return "\n\n".join(f"{turn['role'].capitalize()}: {text}" for turn, text in zip(prompt, texts, strict=True))


def _call_text(call: dict[str, Any]) -> str:
    function = call["function"]
    return json.dumps({"name": function["name"], "arguments": function["arguments"]}, ensure_ascii=False)


def train_validation_split(
    config: Data,
    tokenizer: Tokenizer,
    task: Task,
    make_row: Callable[..., T],
    *,
    ties: bool = False,
    variant: str | None = None,
) -> Split[T]:
    """Load the data of `task`; `make_row(tokens, example, rows, i)` creates a row. `ties` keeps pairs of which neither
    is better. `variant` names what else rows depend on, if they can be kept in `config.token_cache`. Raises
    DataError."""
    if not config.mix:
        train, validation, report = _load(config, tokenizer, task, make_row, ties, variant)
        return Split(train.rows, validation.rows, report)
    loaded: list[_Loaded[T]] = []
    for i, source in enumerate(config.sources):
        try:
            loaded.append(_load(source, tokenizer, task, make_row, ties, variant))
        except DataError as error:
            told = str(error).replace("data.columns", f"data.mix.{i}.columns")
            others = [f"{report.source} ({report.format})" for _, _, report in loaded]
            others += [other.path for other in config.sources[len(loaded) + 1 :]]
            raise DataError(f"{told}\nIt is part of data.mix, beside {', '.join(others) or 'nothing else'}") from error
    return _mixed(loaded, config)


def _mixed(loaded: "Sequence[_Loaded[T]]", config: Data) -> Split[T]:
    """The rows of all data sets one after the other, and held-out rows evenly spread. Prompts are numbered on."""
    trains, held_out, reports = zip(*loaded, strict=True)
    names, sizes, others = [source.label for source in config.mix], [*map(len, trains)], [*map(len, held_out)]
    per_epoch = draws(names, sizes, [source.weight for source in config.mix], config.mix_temperature)
    parts = tuple(map(Part, names, sizes, others, per_epoch))
    firsts = [sum(report.rows for report in reports[:i]) for i in range(len(reports))]
    which, numbers = np.repeat(np.arange(len(sizes)), sizes), np.concatenate([np.arange(size) for size in sizes])
    train = _view([part.rows for part in trains], firsts, which, numbers)
    validation = _view([part.rows for part in held_out], firsts, *interleaved(tuple(others)))
    notes = []
    for name, part in zip(names, held_out, strict=True):
        for other, rows in zip(names, trains, strict=True):
            if other != name and (same := int(np.isin(part.prompts, rows.prompts).sum())):
                notes.append(f"{same} of {len(part)} held-out rows of {name} have a prompt that {other} trains on")
    total = sum(sizes)
    shares = [
        f"{part.name} {part.draws / total:.1%} ({part.draws} rows of {part.rows}, {part.draws / part.rows:.3g} epochs"
        f"{f', {part.held_out} held out' if part.held_out else ''})"
        for part in parts
    ]
    report = Report(
        source=f"mix of {', '.join(names)}",
        format=f"in an epoch {', '.join(shares)}",
        rows=sum(report.rows for report in reports),
        train=total,
        validation=len(validation),
        lengths=array("i", chain.from_iterable(report.lengths for report in reports)),
        notes=notes,
        warnings=[f"{report.source}: {text}" for report in reports for text in report.warnings],
        parts=[*reports],
    )
    return Split(train, validation, report, parts)


def _view(
    parts: Sequence[Sequence[T]], firsts: Sequence[int], which: NDArray[np.int64], numbers: NDArray[np.int64]
) -> Sequence[T]:
    """Row `numbers[k]` of part `which[k]` as row k; a list if all parts are."""
    rows = Lazy(len(which), lambda k: _numbered_from(firsts[which[k]], parts[which[k]][numbers[k]]))
    return list(rows) if all(isinstance(part, list) for part in parts) else rows


def _numbered_from(first: int, row: T) -> T:
    """A row of a mixture: prompts are numbered on from those of the data sets before."""
    return replace(row, index=first + row.index) if isinstance(row, PromptRow) else row


_Loaded = tuple[Usable[T], Usable[T], Report]
"""Rows to train on, held-out rows, and the report of a single data set."""


def _load(
    config: Data, tokenizer: Tokenizer, task: Task, make_row: Callable[..., T], ties: bool, variant: str | None
) -> "_Loaded[T]":
    def prepare(config: Data, label: str = "") -> tuple[Usable[T], Report]:
        if config.token_cache and variant is not None:
            kind = f"{task} {ties} {variant}"

            def begin(survey: Rows) -> Preparation[T]:
                return Preparation(survey, config, tokenizer, task, make_row, ties)

            return token_cache.prepare(config, label, tokenizer, kind, begin)
        rows = read_rows(config, label=label)
        preparation = Preparation(rows, config, tokenizer, task, make_row, ties)
        prepared = [*preparation.add(rows)]
        report = preparation.finish()
        return Usable.of([item.row for item in prepared], prepared), report

    source = config.validation_path or (config.path if config.validation_split else "")
    train, report = prepare(config)
    validation: Usable[T] = train.where(np.zeros(len(train), bool))
    if config.validation_fraction:
        train, validation = held_out.split(train, report.rows, config)
        if not len(validation) or not len(train):
            raise DataError(
                f"data {config.path}: data.validation_fraction {config.validation_fraction} leaves "
                f"{counted(len(train), 'row')} to train on and {len(validation)} held out\n{report}"
            )
    elif source:
        validation, validation_report = prepare(*validation_source(config))
        report.notes.append(f"held out: {validation_report}")
    if len(validation):
        report.notes += held_out.overlap(train, validation, config, source)
    if config.validation_fraction:
        report.notes.append(
            f"{counted(len(validation), 'row')} held out for evaluation, not trained on: data.validation_fraction is "
            f"{config.validation_fraction:g}"
        )
    report.train, report.validation = len(train), len(validation)
    return train, validation, report

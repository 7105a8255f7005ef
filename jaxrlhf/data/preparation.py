"""Convert, tokenise and truncate the rows of a data set, some at a time, with a report of dropped and cut rows."""

from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import numpy as np

from jaxrlhf.config import Data
from jaxrlhf.data import checks, held_out
from jaxrlhf.data.checks import LOSSLESS_ROWS
from jaxrlhf.data.examples import Content, Example, to_examples
from jaxrlhf.data.formats import Task, recognise
from jaxrlhf.data.omissions import Omissions, first_few
from jaxrlhf.data.sources import Rows
from jaxrlhf.data.tokenise import RenderedExample, drop_reason, render, tokenise, truncate
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import DataError, counted

T = TypeVar("T")


@dataclass
class Report:
    """Printable summary of loading: rows kept, dropped and cut, by file line or row number from 1. That of a mixture
    has a report of each data set."""

    source: str
    format: str
    rows: int
    train: int = 0
    validation: int = 0
    dropped: dict[str, list[str]] = field(default_factory=dict)  # reason -> locations
    cut: dict[str, list[str]] = field(default_factory=dict)  # what was cut -> locations
    lengths: Any = field(default_factory=lambda: array("i"))  # tokens of each row, with its longest completion
    notes: list[str] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)  # about its texts, for a run: `jaxrlhf data` has them in its own
    parts: "list[Report]" = field(default_factory=list)

    def __str__(self) -> str:
        held_out = f", {self.validation} held out" if self.validation else ""
        lines = [f"data {self.source}: {counted(self.rows, 'row')}, {self.format}; {self.train} kept{held_out}"]
        lines = [*map(str, self.parts), *lines]
        for verb, reasons in (("dropped", self.dropped), ("cut", self.cut)):
            for reason, locations in reasons.items():
                lines.append(f"{verb} {len(locations)}: {reason} ({first_few(locations)})")
        if len(self.lengths):
            low, median, high, top = np.quantile(self.lengths, [0, 0.5, 0.95, 1], method="nearest")
            lines.append(f"tokens per row: {low} to {top}, median {median}, 95th percentile {high}")
        return "\n".join([*lines, *self.notes])


@dataclass(frozen=True)
class Prepared(Generic[T]):
    """A usable row made of row `number` of the data, with `held_out.digests` of its example."""

    number: int
    digests: tuple[int, int]
    row: T


class Preparation(Generic[T]):
    """Usable rows of a data set, several of a row with several scores, and their report.

    `survey` are all rows, or enough of them to recognise their format. `make_row(tokens, example, rows, i)` creates a
    row. `ties` keeps pairs of which neither is better.
    """

    def __init__(
        self,
        survey: Rows,
        config: Data,
        tokenizer: Tokenizer,
        task: Task,
        make_row: Callable[..., T],
        ties: bool = False,
    ) -> None:
        self._survey, self._config, self._tokenizer, self._ties = survey, config, tokenizer, ties
        self._task: Task = task
        self._make_row, self._format = make_row, recognise(survey, task, config)
        self._escape: Callable[[str], str] = (lambda text: text) if config.control_tokens else tokenizer.escape
        self.report = Report(survey.source, str(self._format), 0)
        self._notes: Counter[str] = Counter()
        self._counts: Counter[str] = Counter()
        self._omissions = Omissions(tokenizer)
        self._first: list[tuple[str, Example]] = []  # those whose texts are checked
        self._glued: list[str] = []

    def add(self, rows: Rows) -> Iterator[Prepared[T]]:
        """The usable ones of some rows. Raises DataError."""
        examples, rendered = self._rendered(rows)
        if self._task == "prompts":
            rows = self._format.reward_columns(rows)
        config, report = self._config, self.report
        for (i, example), tokens in zip(examples, tokenise(rendered, self._tokenizer), strict=True):
            location = rows.locations[i]
            truncated, note = truncate(tokens, config, self._tokenizer)
            if truncated is None and config.truncation == "error":
                raise DataError(f"data {location}: {note}; the row has {len(tokens)}, and data.truncation is error")
            if note:
                (report.dropped if truncated is None else report.cut).setdefault(note, []).append(location.short)
            if truncated is not None:
                report.train += 1
                report.lengths.append(len(truncated))
                row = self._make_row(truncated, example, rows, i)
                yield Prepared(rows.start + i, held_out.digests(example), row)
        report.rows += len(rows.rows)
        located = [(rows.locations[i].short, example) for i, example in examples]
        self._first += located[: max(0, LOSSLESS_ROWS - len(self._first))]
        self._glued += checks.glued(located)
        for (_, example), text in zip(examples, rendered, strict=True):
            self._counts["plain"] += text.plain
            self._counts["rendered"] += 1
            self._counts["empty prompt"] += example.prompt == ""
            self._counts["repeated"] += _repeats_prompt(example)
            self._counts["escaped"] += text.has_escapes

    def _rendered(self, rows: Rows) -> tuple[list[tuple[int, Example]], list[RenderedExample]]:
        """Examples with the number of their row, and their texts."""
        examples: list[tuple[int, Example]] = []
        rendered: list[RenderedExample] = []
        tokenizer, dropped = self._tokenizer, self.report.dropped
        task = self._task
        for i, location in enumerate(rows.locations):
            found, reason = to_examples(
                rows, i, self._format, self._config, tokenizer.has_chat, self._escape, self._notes
            )
            if reason:
                dropped.setdefault(reason, []).append(location.short)
            for example in found:
                tied = task == "pairs" and not self._ties and example.scores[0] == example.scores[-1]
                reason = drop_reason(example, task, tokenizer.bos_id is not None) or ("it is a tie" if tied else "")
                if reason:
                    dropped.setdefault(reason, []).append(location.short)
                    continue
                try:
                    texts = render(example, task, tokenizer)
                except DataError as error:
                    raise DataError(f"data {location}: {error}") from error
                self._omissions.add(example, texts, location.short)
                if texts.has_equal_completions:
                    dropped.setdefault("the chat template writes two completions alike", []).append(location.short)
                    continue
                rendered.append(texts)
                examples.append((i, example))
        return examples, rendered

    def finish(self) -> Report:
        """The report of all rows added. Raises DataError if none of them can be used."""
        report, counts, found = self.report, self._counts, self._format
        if not report.train:
            raise DataError(f"data {report.source}: none of its {report.rows} rows can be used\n{report}")
        plain, total = counts["plain"], counts["rendered"]
        formatted = "as plain text" if plain else "with the tokenizer's chat template"
        if 0 < plain < total:
            formatted = f"as plain text: {plain} of {total} rows; the others with the tokenizer's chat template"
        report.notes.append(f"formatted {formatted}")
        unused = found.unused(self._survey) + [found.tools] * (bool(found.tools) and plain == total)
        if unused:
            report.notes.append(f"columns not used: {', '.join(unused)}")
        report.notes += [f"{note}: {count}" for note, count in self._notes.items()]
        if found.style == "common_beginning" and counts["empty prompt"]:
            report.notes.append(f"no common beginning, so an empty prompt: {counted(counts['empty prompt'], 'row')}")
        if repeated := counts["repeated"]:
            report.notes.append(f"prompt repeated at the beginning of each completion: {counted(repeated, 'row')}")
        if escaped := counts["escaped"]:
            report.notes.append(
                f"control tokens of the tokenizer spelt in {counted(escaped, 'row')}: read as ordinary text"
            )
        report.notes += self._omissions.notes()
        report.warnings += checks.missing_space(self._glued)
        report.warnings += checks.unknown_words(self._first, self._tokenizer)
        return report


def _repeats_prompt(example: Example) -> bool:
    """Every completion begins with the text of the prompt or of its last turn."""

    def text(content: Content, turn: int) -> str:
        return (content if isinstance(content, str) else content[turn]["content"]).strip()

    prompt = text(example.prompt, -1) if example.prompt else ""
    completions = [text(content, 0) for content in example.completions if content]
    return bool(prompt and completions) and all(completion.startswith(prompt) for completion in completions)

"""Load rated responses: with a label, with a score, or ranked."""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from jaxrlhf.config import Data
from jaxrlhf.data import formats
from jaxrlhf.data.datasets import PairRow, SFTRow, Split, pair_rows, train_validation_split
from jaxrlhf.data.examples import Example
from jaxrlhf.data.held_out import Lazy
from jaxrlhf.data.sources import Rows, survey
from jaxrlhf.data.tokenise import TokenisedExample
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import DataError


@dataclass(frozen=True, slots=True)
class LabelledRow(SFTRow):
    """A good or bad response. The loss mask covers the response and its end token; for plain text without a prompt,
    every token but the first."""

    label: bool


@dataclass(frozen=True, slots=True)
class ScoredRow(SFTRow):
    """A response and its score; the loss mask is as in `LabelledRow`."""

    score: float


@dataclass(frozen=True, slots=True)
class RankedRow:
    """Two or more responses to one prompt, best first."""

    responses: tuple[SFTRow, ...]


def label_rows(config: Data, tokenizer: Tokenizer) -> Split[LabelledRow]:
    """Load responses with a column `label`, `kto_tag` or `tag` (`labels.by_label`); of preference pairs, the chosen
    responses as good ones and the rejected responses as bad ones.
    Raises ConfigError, and DataError, also if the training rows are all good or all bad."""

    def can_read(task: formats.Task) -> bool:
        return all(formats.can_read(survey(source)[0], task, source) for source in config.sources)

    if not can_read("labels") and can_read("pairs"):
        return _labels_of_pairs(config, tokenizer)

    def make_row(tokens: TokenisedExample, example: Example, rows: Rows, i: int) -> LabelledRow:
        return LabelledRow(*tokens.sequence(0), bool(example.scores[0]))

    split = train_validation_split(config, tokenizer, "labels", make_row, variant="")
    good = sum(row.label for row in split.train)
    counts = f"{good} good and {len(split.train) - good} bad responses to train on"
    if good in (0, len(split.train)):
        raise DataError(f"data {config.name}: {counts}; training on labels needs both\n{split.report}")
    split.report.notes.append(counts)
    return split


def _labels_of_pairs(config: Data, tokenizer: Tokenizer) -> Split[LabelledRow]:
    """All chosen responses, then all rejected ones, of each data set. Raises DataError and ConfigError."""

    def labelled(pairs: Sequence[PairRow], sizes: Sequence[int]) -> Sequence[LabelledRow]:
        chosen = np.repeat(np.tile([True, False], len(sizes)), np.repeat(sizes, 2))
        parts = np.split(np.arange(len(pairs)), np.cumsum(sizes)[:-1])
        numbers = np.concatenate([np.tile(part, 2) for part in parts])

        def row(i: int) -> LabelledRow:
            pair = pairs[numbers[i]]
            response = pair.chosen if chosen[i] else pair.rejected
            return LabelledRow(response.tokens, response.loss_mask, bool(chosen[i]))

        return Lazy(len(numbers), row)

    split = pair_rows(config, tokenizer)
    parts = tuple(replace(part, rows=2 * part.rows, draws=2 * part.draws) for part in split.parts)
    train, held_out = labelled(split.train, split.sizes), labelled(split.validation, [len(split.validation)])
    split.report.notes.append(f"{len(train)} responses to train on: chosen ones are good, rejected ones are bad")
    return Split(train, held_out, split.report, parts)


def score_rows(config: Data, tokenizer: Tokenizer) -> Split[ScoredRow]:
    """Load responses with scores: a finite number in the column `score`, or several in a row (formats.LAYOUTS).
    Raises ConfigError, and DataError, also if all scores of the training rows are the same."""

    def make_row(tokens: TokenisedExample, example: Example, rows: Rows, i: int) -> ScoredRow:
        return ScoredRow(*tokens.sequence(0), example.scores[0])

    split = train_validation_split(config, tokenizer, "scores", make_row, variant="")
    scores = np.array([row.score for row in split.train])
    if np.ptp(scores) == 0:
        raise DataError(
            f"data {config.name}: all {len(scores)} scores to train on are {scores[0]:g}; training needs scores that "
            f"differ\n{split.report}"
        )
    split.report.notes.append(f"scores to train on: {scores.min():g} to {scores.max():g}, mean {scores.mean():g}")
    return split


def ranking_rows(config: Data, tokenizer: Tokenizer) -> Split[RankedRow]:
    """Load ranked responses, best first (formats.LAYOUTS). Raises DataError and ConfigError."""

    def make_row(tokens: TokenisedExample, example: Example, rows: Rows, i: int) -> RankedRow:
        return RankedRow(tuple(SFTRow(*tokens.sequence(k)) for k in range(len(tokens.completions))))

    split = train_validation_split(config, tokenizer, "rankings", make_row, variant="")
    counts = [len(row.responses) for row in split.train]
    most = f" to {max(counts)}" if max(counts) > min(counts) else ""
    split.report.notes.append(f"responses per ranking: {min(counts)}{most}")
    return split

"""Tokenised responses with what people say of them: a label, a score, or their order."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from jaxrlhf.config import Data
from jaxrlhf.data import labels
from jaxrlhf.data.datasets import SFTRow, Split, pair_rows, train_validation_split
from jaxrlhf.data.formats import Example
from jaxrlhf.data.sources import Rows
from jaxrlhf.data.tokenise import Tokens
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import DataError


@dataclass(frozen=True, slots=True)
class LabelledRow(SFTRow):
    """A response that is good or is not. The loss mask covers the response, from its first token to its end token; of
    plain text without a prompt, everything but the first token."""

    label: bool


@dataclass(frozen=True, slots=True)
class ScoredRow(SFTRow):
    """A response and its score; the loss mask as in `LabelledRow`."""

    score: float


@dataclass(frozen=True, slots=True)
class RankedRow:
    """Two or more responses to one prompt, best first: the same prompt tokens, then a response with its end token."""

    responses: tuple[SFTRow, ...]


def label_rows(config: Data, tokenizer: Tokenizer) -> Split[LabelledRow]:
    """Responses with a column `label` (`judgements.label`). Raises DataError, also where one of the two labels is
    missing among the rows to train on, and ConfigError."""

    def row(tokens: Tokens, example: Example, rows: Rows, i: int) -> LabelledRow:
        return LabelledRow(*tokens.sequence(0), labels.label(rows.rows[i], f"data {rows.places[i]}"))

    split = train_validation_split(config, tokenizer, "labels", row)
    good = sum(row.label for row in split.train)
    counts = f"{good} good and {len(split.train) - good} bad responses to train on"
    if good in (0, len(split.train)):
        raise DataError(f"data {config.path}: {counts}; learning from labels needs both\n{split.report}")
    split.report.notes.append(counts)
    return split


def labels_of_pairs(config: Data, tokenizer: Tokenizer) -> Split[LabelledRow]:
    """Both responses of every preference pair: first all chosen ones, as good, then all rejected ones, as bad. Raises
    DataError and ConfigError."""

    split = pair_rows(config, tokenizer)
    train, validation = (
        [LabelledRow(text.tokens, text.loss_mask, good) for texts, good in (
            ([pair.chosen for pair in part], True), ([pair.rejected for pair in part], False)) for text in texts]
        for part in (split.train, split.validation)
    )  # fmt: skip
    split.report.notes.append(f"{len(train)} responses to train on: of each pair the chosen as good, the other as bad")
    return Split(train, validation, split.report)


def score_rows(config: Data, tokenizer: Tokenizer) -> Split[ScoredRow]:
    """Responses with a column `score`, a finite number. Raises DataError, also where all scores to train on are the
    same, and ConfigError."""

    def row(tokens: Tokens, example: Example, rows: Rows, i: int) -> ScoredRow:
        return ScoredRow(*tokens.sequence(0), labels.number(rows.rows[i], "score", f"data {rows.places[i]}"))

    split = train_validation_split(config, tokenizer, "scores", row)
    scores = np.array([row.score for row in split.train])
    if np.ptp(scores) == 0:
        raise DataError(
            f"data {config.path}: all {len(scores)} scores to train on are {scores[0]:g}; there is nothing to learn "
            f"from them\n{split.report}"
        )
    split.report.notes.append(f"scores to train on: {scores.min():g} to {scores.max():g}, mean {scores.mean():g}")
    return split


def ranking_rows(config: Data, tokenizer: Tokenizer) -> Split[RankedRow]:
    """Ranked responses to a prompt, best first (`judgements.ranked`). Raises DataError and ConfigError."""

    def row(tokens: Tokens, example: Example, rows: Rows, i: int) -> RankedRow:
        return RankedRow(tuple(SFTRow(*tokens.sequence(k)) for k in range(len(tokens.answers))))

    split = train_validation_split(config, tokenizer, "rankings", row)
    split.report.notes.append(f"responses in a ranking: {_range([len(row.responses) for row in split.train])}")
    return split


def _range(counts: Sequence[int]) -> str:
    return f"{min(counts)}" if min(counts) == max(counts) else f"{min(counts)} to {max(counts)}"

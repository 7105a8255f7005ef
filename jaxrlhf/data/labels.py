"""Parse the columns that rate responses: label, score, margin, tie, ranks and the verdicts of public data sets. Errors
name the row and the column."""

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from jaxrlhf.data.file_readers import Row
from jaxrlhf.errors import DataError

_FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
_LABELS: dict[str, bool] = dict.fromkeys(("1", "1.0", "true", "good", "chosen"), True)
_LABELS |= dict.fromkeys(("0", "0.0", "false", "bad", "rejected"), False)
_TIES: dict[str, bool] = dict.fromkeys(("1", "1.0", "true", "tie", "tied"), True)
_TIES |= dict.fromkeys(("0", "0.0", "false", "chosen"), False)
_WINNERS = {"model_a": (1.0, 0.0), "model_b": (0.0, 1.0)}
_WINNERS |= dict.fromkeys(("tie", "tie (bothbad)", "both_bad"), (0.0, 0.0))

Scores = list[float | None]
"""One number for each response of a row, higher is better; None for a response that was not judged."""


@dataclass(frozen=True)
class Evidence:
    """The responses of a row and the values that rate them.

    columns: the verdict columns of its layout.    responses: as stored.    score: `data.score`.
    """

    columns: Row
    responses: Sequence[Any]
    score: str
    where: str


Judge = Callable[[Evidence], Scores]


def in_order(evidence: Evidence) -> Scores:
    """The responses are stored best first."""
    return [float(i) for i in range(len(evidence.responses), 0, -1)]


def unless_tied(evidence: Evidence) -> Scores:
    """The first of two responses is better, unless a column `tie`, `tied` or `label` says that neither is."""
    for column in evidence.columns:
        if evidence.columns[column] is not None:
            expected = "true or false, 1 or 0, tie or chosen"
            return [0.0, 0.0] if _parse_word(evidence.columns, column, evidence.where, _TIES, expected) else [1.0, 0.0]
    return [1.0, 0.0]


def by_label(evidence: Evidence) -> Scores:
    """The response is good (1) or bad (0)."""
    (column,) = evidence.columns
    expected = "true or false, 1 or 0, good or bad, chosen or rejected"
    return [float(_parse_word(evidence.columns, column, evidence.where, _LABELS, expected))]


def by_score(evidence: Evidence) -> Scores:
    """Each response has a column with its score."""
    return [parse_number(evidence.columns, column, evidence.where) for column in evidence.columns]


def by_rank(evidence: Evidence) -> Scores:
    """The responses have a list of `ranks` (1 is best, no two the same) or of `scores`; without, they are best first.
    A null score leaves a response unjudged."""
    for column, values in evidence.columns.items():
        if values is None and column != "scores":
            continue
        expected = f"expected a number for each of {len(evidence.responses)} responses"
        described = f"{evidence.where}: column {column!r} is {describe(values)}"
        if not isinstance(values, list) or len(values) != len(evidence.responses):
            raise DataError(f"{described}; {expected}")
        numbers = [None if v is None else parse_number({column: v}, column, evidence.where) for v in values]
        if column == "scores":
            return numbers
        if None in numbers:
            raise DataError(f"{described}; {expected}")
        if len(set(numbers)) < len(numbers):
            raise DataError(f"{described}; no two responses may have the same rank")
        return [-number for number in numbers if number is not None]
    return in_order(evidence)


def by_item_rank(evidence: Evidence) -> Scores:
    """Each response is an object with a `rank`; 1 is best."""
    return [_negated(_number_of(item, "rank", evidence.where)) for item in evidence.responses]


def by_rating(evidence: Evidence) -> Scores:
    """Each response is an object with ratings: `fine-grained_score`, the mean of all, or else `overall_score`; or that
    named by `data.score`, which may be one of its `annotations`."""
    keys = [evidence.score] if evidence.score else ["fine-grained_score", "overall_score"]
    return [_rating(item, keys, evidence.where) for item in evidence.responses]


def by_choice(evidence: Evidence) -> Scores:
    """A column has the number of the best response, from 0."""
    ((column, value),) = evidence.columns.items()
    if value is None:
        return [None] * len(evidence.responses)
    choice = parse_number(evidence.columns, column, evidence.where)
    if choice not in range(len(evidence.responses)):
        numbers = ", ".join(map(str, range(len(evidence.responses))))
        raise DataError(f"{evidence.where}: column {column!r} is {describe(value)}; expected one of {numbers}")
    return [float(i == choice) for i in range(len(evidence.responses))]


def by_winner(evidence: Evidence) -> Scores:
    """A column names the better model, or a tie."""
    ((column, value),) = evidence.columns.items()
    if value is not None and (not isinstance(value, str) or value not in _WINNERS):
        expected = f"expected one of {', '.join(_WINNERS)}"
        raise DataError(f"{evidence.where}: column {column!r} is {describe(value)}; {expected}")
    return [None, None] if value is None else list(_WINNERS[value])


def by_preference(second_is_better: Callable[[float], float], low: int, high: int) -> Judge:
    """A column has a number from `low` to `high`; `second_is_better(number)` is positive if the second response is
    better, 0 for a tie. Null and NaN are no judgement."""

    def judge(evidence: Evidence) -> Scores:
        ((column, value),) = evidence.columns.items()
        if value is None or str(value).lower() == "nan":
            return [None, None]
        number = parse_number(evidence.columns, column, evidence.where)
        if not low <= number <= high:
            raise DataError(f"{evidence.where}: column {column!r} is {number:g}; expected {low} to {high}")
        return [0.0, second_is_better(number)]

    return judge


def parse_number(row: Row, column: str, where: str) -> float:
    """Read a number, or text that spells one (as CSV does), that is finite in float32."""
    value = row.get(column)
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            number = float(value)
        except (ValueError, OverflowError):
            number = math.nan
        if abs(number) <= _FLOAT32_MAX:
            return number
    raise DataError(f"{where}: column {column!r} is {describe(value)}; expected a finite number")


def are_labels(values: Collection[Any], numbers: bool) -> bool:
    """Every value is a label or null; `numbers`: 1 and 0 count as labels."""
    words = [str(value).strip().lower() for value in values if value is not None]
    return bool(words) and all(word in _LABELS and (numbers or not word[0].isdigit()) for word in words)


def are_ties(values: Collection[Any]) -> bool:
    """Every value is one of the words tie, tied and chosen, or null."""
    words = [value for value in values if value is not None]
    return bool(words) and all(str(value).strip().lower() in ("tie", "tied", "chosen") for value in words)


def describe(value: Any) -> str:
    """Type and first characters of a value, for error messages."""
    text = str(value)[:40]
    return "null" if value is None else f"{type(value).__name__} {repr(text) if isinstance(value, str) else text}"


def _rating(item: Any, keys: Sequence[str], where: str) -> float | None:
    annotations = item.get("annotations") if isinstance(item, dict) else None
    for key in keys:
        rating = annotations.get(key) if isinstance(annotations, dict) else None
        source, name = (rating, "Rating") if isinstance(rating, dict) else (item, key)
        if isinstance(source, dict) and name in source:
            return None if source[name] == "N/A" else _number_of(source, name, where)
    raise DataError(
        f"{where}: a response has no score {' or '.join(map(repr, keys))}; name one of its keys in data.score"
    )


def _number_of(item: Any, key: str, where: str) -> float | None:
    if not isinstance(item, dict) or key not in item:
        raise DataError(f"{where}: a response is {describe(item)}; expected an object with {key!r}")
    return None if item[key] is None else parse_number(item, key, where)


def _negated(number: float | None) -> float | None:
    return None if number is None else -number


def _parse_word(row: Row, column: str, where: str, words: dict[str, bool], expected: str) -> bool:
    word = str(row.get(column)).strip().lower()
    if word not in words:
        raise DataError(f"{where}: column {column!r} is {describe(row.get(column))}; expected {expected}")
    return words[word]

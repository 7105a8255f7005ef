"""Parse the columns that rate completions: label, score, margin, tie and ranks. Errors name the row and the column."""

import math
from typing import Any

from jaxrlhf.data.file_readers import Row
from jaxrlhf.errors import DataError

_FLOAT32_MAX = (2 - 2.0**-23) * 2.0**127
_LABELS: dict[str, bool] = dict.fromkeys(("1", "1.0", "true", "good", "chosen"), True)
_LABELS |= dict.fromkeys(("0", "0.0", "false", "bad", "rejected"), False)
_TIES: dict[str, bool] = dict.fromkeys(("1", "1.0", "true", "tie", "tied"), True)
_TIES |= dict.fromkeys(("0", "0.0", "false", "chosen"), False)


def parse_label(row: Row, where: str) -> bool:
    """Read the column `label` of a good (true) or bad (false) response."""
    return _parse_word(row, "label", where, _LABELS, "true or false, 1 or 0, good or bad, chosen or rejected")


def is_tie(row: Row, where: str) -> bool:
    """Read whether a pair is a tie from `tie` or `tied`, or else `label`; false where all are missing or null."""
    column = next((name for name in ("tie", "tied", "label") if row.get(name) is not None), None)
    return column is not None and _parse_word(row, column, where, _TIES, "true or false, 1 or 0, tie or chosen")


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


def sort_by_rank(row: Row, where: str) -> list[Any]:
    """Read the list `responses`, best first: sorted by `ranks` (1 is best, no ties), or as it is without them."""
    responses, ranks = row.get("responses"), row.get("ranks")
    if not isinstance(responses, list):
        raise DataError(f"{where}: column 'responses' is {describe(responses)}; expected a list of responses")
    if ranks is None:
        return responses
    if not isinstance(ranks, list) or len(ranks) != len(responses):
        expected = f"expected a number for each of {len(responses)} responses"
        raise DataError(f"{where}: column 'ranks' is {describe(ranks)}; {expected}")
    values = [parse_number({"ranks": rank}, "ranks", where) for rank in ranks]
    if len(set(values)) < len(values):
        raise DataError(f"{where}: column 'ranks' is {describe(ranks)}; no two responses may have the same rank")
    return [responses[i] for i in sorted(range(len(values)), key=values.__getitem__)]


def describe(value: Any) -> str:
    """Type and first characters of a value, for error messages."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _parse_word(row: Row, column: str, where: str, words: dict[str, bool], expected: str) -> bool:
    word = str(row.get(column)).strip().lower()
    if word not in words:
        raise DataError(f"{where}: column {column!r} is {describe(row.get(column))}; expected {expected}")
    return words[word]

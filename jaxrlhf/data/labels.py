"""What is said of responses: a label, a score, an order, a tie, by how much one is better.

Errors name row and column.
"""

import math
from typing import Any

from jaxrlhf.data.sources import Row
from jaxrlhf.errors import DataError

_LARGEST = (2 - 2.0**-23) * 2.0**127  # of float32
_LABELS: dict[str, bool] = dict.fromkeys(("1", "1.0", "true", "good", "chosen"), True)
_LABELS |= dict.fromkeys(("0", "0.0", "false", "bad", "rejected"), False)
_TIES: dict[str, bool] = dict.fromkeys(("1", "1.0", "true", "tie", "tied"), True)
_TIES |= dict.fromkeys(("0", "0.0", "false", "chosen"), False)


def label(row: Row, where: str) -> bool:
    """Whether a response is good, by the column `label`: true or false, 1 or 0, good or bad, chosen or rejected."""
    return _word(row, "label", where, _LABELS, "true or false, 1 or 0, good or bad, chosen or rejected")


def tied(row: Row, where: str) -> bool:
    """Whether neither response of a pair is better, by `tie` or `tied` (true or false, 1 or 0), or by `label` (tie or
    chosen); false where a row has none of them, or null there."""
    column = next((name for name in ("tie", "tied", "label") if row.get(name) is not None), None)
    return column is not None and _word(row, column, where, _TIES, "true or false, 1 or 0, tie or chosen")


def number(row: Row, column: str, where: str) -> float:
    """A number that is finite in float32; text that spells one counts, as CSV has nothing else."""
    value = row.get(column)
    if isinstance(value, int | float | str) and not isinstance(value, bool):
        try:
            found = float(value)
        except (ValueError, OverflowError):
            found = math.nan
        if abs(found) <= _LARGEST:
            return found
    raise DataError(f"{where}: column {column!r} is {shown(value)}; a finite number was expected")


def ranked(row: Row, where: str) -> list[Any]:
    """The list `responses`, best first: as it stands, or in the order of `ranks` (1 is the best; none twice)."""
    responses, ranks = row.get("responses"), row.get("ranks")
    if not isinstance(responses, list):
        raise DataError(f"{where}: column 'responses' is {shown(responses)}; a list of responses was expected")
    if ranks is None:
        return responses
    if not isinstance(ranks, list) or len(ranks) != len(responses):
        raise DataError(f"{where}: column 'ranks' is {shown(ranks)}; a number for each of {len(responses)} responses "
                        "was expected")  # fmt: skip
    values = [number({"ranks": rank}, "ranks", where) for rank in ranks]
    if len(set(values)) < len(values):
        raise DataError(f"{where}: column 'ranks' is {shown(ranks)}; no two responses may have the same rank")
    return [responses[i] for i in sorted(range(len(values)), key=values.__getitem__)]


def shown(value: Any) -> str:
    """A value in a message: its type and the beginning of it."""
    return "null" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"


def _word(row: Row, column: str, where: str, words: dict[str, bool], expected: str) -> bool:
    value = row.get(column)
    found = words.get(str(value).strip().lower())
    if found is None:
        raise DataError(f"{where}: column {column!r} is {shown(value)}; {expected} was expected")
    return found

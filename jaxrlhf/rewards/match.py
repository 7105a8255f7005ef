"""Reward functions that compare the end of a completion with a column of the data: `jaxrlhf.rewards.match:NAME`."""

import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

_NUMBER = re.compile(
    r"(?<![\w)\].])(?P<sign>[-+\u2212]\s?)?[$€£]?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<part>\.\d+)?"
    r"(?P<power>e[-+]?\d{1,3}\b)?(?:\s?/\s?(?P<below>\d+)(?!\d|\.\d))?"
)
_LONGEST = 300  # digits of a number that anybody meant
_MARKS = ("####", r"\boxed{", "answer is", "answer:")


def exact_match(
    completions: Sequence[str], *, column: str = "answer", after: str = "", case: bool = False, **columns: Sequence[Any]
) -> list[float | None]:
    """1 where the completion is the text of `column`, else 0; None where the row has no such text.

    White space counts as one space, and none at the ends; capitals count if `case`. With `after`, only what follows the
    last occurrence of it is compared: `after: "Answer:"`.
    """
    scores: list[float | None] = []
    for text, expected in zip(completions, _column(column, columns), strict=True):
        said = text.rpartition(after)[2] if after else text
        same = _flat(said, case) == _flat(str(expected), case) and (not after or after in text)
        scores.append(None if expected is None else float(same))
    return scores


def numeric_match(
    completions: Sequence[str], *, column: str = "answer", tolerance: float = 0.0, **columns: Sequence[Any]
) -> list[float | None]:
    """1 where the completion's number is that of `column`, else 0; None where the row has no number.

    The number of a text is the first after its last `####` (as in GSM8K), `\\boxed{`, "answer is" or "answer:", failing
    that its last one. Read are 1,234.5, -3, 2/3, 1e3, $5, .5; a percent sign does not count. Compared exactly, as
    fractions, or with a `tolerance` (absolute).
    """
    scores: list[float | None] = []
    for text, expected in zip(completions, _column(column, columns), strict=True):
        right, said = number(str(expected)), number(text)
        if right is None:
            scores.append(None)
        else:
            scores.append(float(said is not None and abs(said - right) <= Fraction(tolerance)))
    return scores


def number(text: str) -> Fraction | None:
    """The number that a text comes to (see `numeric_match`), or None."""
    text = text.casefold()
    at = max((text.rfind(mark) + len(mark) for mark in _MARKS if mark in text), default=None)
    if at is not None and (found := _numbers(text[at:], first=True)):
        return found[0]
    found = _numbers(text)
    return found[-1] if found else None


def _numbers(text: str, *, first: bool = False) -> list[Fraction]:
    numbers = []
    for match in _NUMBER.finditer(text):
        whole, part, below = match["whole"], match["part"], match["below"]
        if not (whole or part) or len(match[0]) > _LONGEST:
            continue
        value = Fraction((whole or "0").replace(",", "") + (part or "") + (match["power"] or ""))
        if below is not None:
            if not int(below):
                continue
            value /= int(below)
        numbers.append(-value if (match["sign"] or "").strip() in ("-", "\u2212") else value)
        if first:
            break
    return numbers


def _flat(text: str, case: bool) -> str:
    flat = " ".join(text.split())
    return flat if case else flat.casefold()


def _column(name: str, columns: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    if name not in columns:
        there = ", ".join(sorted(set(columns) - {"prompts"}))
        raise ValueError(f"the data has no column '{name}'; it has {there or 'none'}. Name one in options.column")
    return columns[name]

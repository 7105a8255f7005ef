"""Reward functions that compare the end of a completion with a column of the data: `jaxrlhf.rewards.match:NAME`."""

import functools
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
_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_FRACTION = re.compile(r"(?<!\d)\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_IN_WORDS = re.compile(r"\\(?:text\w*|math\w+|mbox)\s*\{([^{}]*)\}")
_UNSEEN = re.compile(r"\\[!,]|\\(?:left|right|displaystyle)(?![a-z])|\\?[$%]")


def exact_match(
    completions: Sequence[str], *, column: str = "answer", after: str = "", case: bool = False, **columns: Sequence[Any]
) -> list[float | None]:
    """1 where the completion is the text of `column`, else 0; None where the row has no such text.

    White space counts as one space, and none at the ends; capitals count if `case`. With `after`, only what follows the
    last occurrence of it is compared: `after: "Answer:"`.
    """
    scores: list[float | None] = []
    for text, expected in zip(completions, column_of(column, columns), strict=True):
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
    for text, expected in zip(completions, column_of(column, columns), strict=True):
        right, said = number(str(expected)), number(text)
        if right is None:
            scores.append(None)
        else:
            scores.append(float(said is not None and abs(said - right) <= Fraction(tolerance)))
    return scores


def boxed(completions: Sequence[str], *, column: str = "answer", **columns: Sequence[Any]) -> list[float | None]:
    """1 where what stands in the completion's last `\\boxed{...}` is the answer in `column`, else 0; None where the row
    has no such text.

    The answer is what the column has in its own last box, failing that after its last `####`, failing that all of it.
    Where both are numbers they are compared as numbers, `\\frac{1}{2}` and 0.5 alike; else as texts, for which spacing,
    capitals, `$`, `%`, `\\text`, `\\left`, `\\right`, `\\dfrac` for `\\frac` and a full stop at the end do not matter.
    A box that is not closed is none.
    """
    scores: list[float | None] = []
    for text, expected in zip(completions, column_of(column, columns), strict=True):
        said = last_box(text)
        same = said is not None and expected is not None and _same(said, answer_in(str(expected)))
        scores.append(None if expected is None else float(same))
    return scores


def multiple_choice(
    completions: Sequence[str], *, column: str = "answer", letters: str = "ABCD", **columns: Sequence[Any]
) -> list[float | None]:
    """1 where the completion chooses the letter in `column`, else 0; None where the row has none of `letters`.

    Chosen is the letter after "answer is", "answer:", "correct option is", `####` or in a box; where there is none of
    these, the letter that begins a line as a label ("B.", "**B**", "B) Paris", "B" alone) or stands in brackets, (B).
    More than one such letter is no choice and scores 0. A column of whole numbers counts `letters` from 0, as in MMLU.
    """
    if not letters.isalpha() or len({*letters.upper()}) != len(letters) or len(letters) < 2:
        raise ValueError(f"letters is {letters!r}; two or more different letters are needed, such as ABCD")
    letters = letters.upper()
    scores: list[float | None] = []
    for text, expected in zip(completions, column_of(column, columns), strict=True):
        if isinstance(expected, int):
            right = letters[expected] if 0 <= expected < len(letters) else None
        else:
            right = _choice(str(expected), letters)
        scores.append(None if right is None else float(_choice(text, letters) == right))
    return scores


def column_of(name: str, columns: Mapping[str, Sequence[Any]]) -> Sequence[Any]:
    """The column that `options.column` names. Raises ValueError if the data has none of that name."""
    if name not in columns:
        there = ", ".join(sorted(set(columns) - {"prompts"}))
        raise ValueError(f"the data has no column '{name}'; it has {there or 'none'}. Name one in options.column")
    return columns[name]


def last_box(text: str) -> str | None:
    """What stands in the `\\boxed{...}` that begins last among those that are closed, or None."""
    found, open_at = (-1, -1), []
    for match in _BRACE.finditer(text):
        if match["box"] or match[0] == "{":
            open_at.append(match.end() if match["box"] else -1)
        elif match[0] == "}" and open_at:
            found = max(found, (open_at.pop(), match.start()))
    return text[slice(*found)] if found[0] >= 0 else None


def answer_in(text: str) -> str:
    """The answer in a column's text (see `boxed`)."""
    box = last_box(text)
    return text.rpartition("####")[2].strip() if box is None else box


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
        if (value := _value(match)) is not None:
            numbers.append(value)
            if first:
                break
    return numbers


def _value(match: re.Match[str]) -> Fraction | None:
    whole, part, below = match["whole"], match["part"], match["below"]
    if not (whole or part) or len(match[0]) > _LONGEST or (below is not None and not int(below)):
        return None
    value = Fraction((whole or "0").replace(",", "") + (part or "") + (match["power"] or "")) / int(below or 1)
    return -value if (match["sign"] or "").strip() in ("-", "\u2212") else value


def _same(said: str, right: str) -> bool:
    said, right = _bare(said), _bare(right)
    numbers = [_NUMBER.fullmatch(_FRACTION.sub(r"\1\2/\3\4", text)) for text in (said, right)]
    values = [_value(match) if match else None for match in numbers]
    return said == right if None in values else values[0] == values[1]


def _bare(text: str) -> str:
    """Without what makes no difference to an answer in LaTeX."""
    text = _UNSEEN.sub("", _IN_WORDS.sub(r"\1", text).replace("{,}", ","))
    text = re.sub(r"\\[ ;:]|~", " ", re.sub(r"\\[dt]frac", r"\\frac", text))
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", _flat(text, case=False)).removesuffix(".")


def _choice(text: str, letters: str) -> str | None:
    """The letter that a text chooses (see `multiple_choice`), or None."""
    text = re.sub(r"\\boxed\s*\{", "\nanswer: ", text)
    text = re.sub(r"\\(?:text|math)[a-z]*|[*_`${}\[\]]", "", text)
    named, labelled, also = _choices(letters)
    found = list(named.finditer(text)) or list(labelled.finditer(text))
    others = [match for choice in found if (match := also.match(text, choice.end()))]
    chosen = {group.upper() for match in found + others for group in match.groups() if group}
    return chosen.pop() if len(chosen) == 1 else None


@functools.cache
def _choices(letters: str) -> tuple[re.Pattern[str], ...]:
    """Patterns: an answer that is named, one that is labelled, and another letter beside either."""
    # "A" may be an article: a capital counts on its own, a small letter only before a stop or the end of the line
    letter = rf"[(\"']?((?-i:[{letters}])(?![\w'\u2019+-])|(?<!\w)[{letters}](?=\s*(?:[).,:;!?]|$)))"
    stop = r"(?=[ \t]*(?:[).:,]|$))"
    named = (
        r"(?:(?:\banswer|\bcorrect (?:option|choice|letter))[^.\n]{0,60}?(?:\bis|:|=|\bbe)[\s:]*"
        rf"(?:(?:option|choice|letter)\s*)?|####\s*){letter}"
    )
    labelled = rf"^[ \t]*(?:(?:option|choice|letter)\s*)?{letter}{stop}|(?<!not )(?<!n't )\(([{letters}])\)"
    also = (
        rf"\)?\s*(?:(?:,|/|&|or\b|and\b)\s*(?:option\s*)?{letter}|[).:,]*[ \t]*{letter}{stop})"
        rf"|[ \t]+(?-i:([{letters}]))(?![\w'\u2019])"
    )
    return tuple(re.compile(pattern, re.IGNORECASE | re.MULTILINE) for pattern in (named, labelled, also))


def _flat(text: str, case: bool) -> str:
    flat = " ".join(text.split())
    return flat if case else flat.casefold()

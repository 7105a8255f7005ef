"""Reward functions that compare the answer in a completion with a column of the data: `jaxrlhf.rewards.match:NAME`."""

import functools
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

_NUMBER = re.compile(
    r"(?<![\w)\].])(?P<sign>[-+\u2212]\s?)?[$€£]?(?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimals>\.\d+)?"
    r"(?P<exponent>e[-+]?\d{1,3}\b)?(?:\s?/\s?(?P<denominator>\d+)(?!\d|\.\d))?"
)
_MAX_DIGITS = 300
_ANSWER_MARKS = ("####", r"\boxed{", "answer is", "answer:")
_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_LATEX_FRACTION = re.compile(r"(?<!\d)\\[dt]?frac\s*(?:\{\s*(-?\d+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
_LATEX_TEXT = re.compile(r"\\(?:text\w*|math\w+|mbox)\s*\{([^{}]*)\}")
_LATEX_LAYOUT = re.compile(r"\\[!,]|\\(?:left|right|displaystyle)(?![a-z])|\\?[$%]")


def exact_match(
    completions: Sequence[str], *, column: str = "answer", after: str = "", case: bool = False, **columns: Sequence[Any]
) -> list[float | None]:
    """1 if the completion equals the text of `column`, else 0; None if the row has no such text.

    Runs of white space count as one space; case matters only if `case`. With `after`, only the text after its last
    occurrence is compared: `after: "Answer:"`.
    """

    def correct(completion: str, expected: Any) -> bool | None:
        if expected is None:
            return None
        answer = completion.rpartition(after)[2] if after else completion
        return after in completion and _normalise(answer, case) == _normalise(str(expected), case)

    return score_rows(completions, column, columns, correct)


def numeric_match(
    completions: Sequence[str], *, column: str = "answer", tolerance: float = 0.0, **columns: Sequence[Any]
) -> list[float | None]:
    """1 if the completion's number equals that of `column`, else 0; None if the row has no number.

    The number of a text is the first one after its last `####` (as in GSM8K), `\\boxed{`, "answer is" or "answer:", or
    else its last one. Accepted forms: 1,234.5, -3, 2/3, 1e3, $5, .5; a percent sign is ignored. Numbers are compared
    as exact fractions, or with an absolute `tolerance`.
    """

    def correct(completion: str, expected: Any) -> bool | None:
        target, value = number(str(expected)), number(completion)
        return None if target is None else value is not None and abs(value - target) <= Fraction(tolerance)

    return score_rows(completions, column, columns, correct)


def boxed(completions: Sequence[str], *, column: str = "answer", **columns: Sequence[Any]) -> list[float | None]:
    """1 if the completion's last `\\boxed{...}` holds the answer in `column`, else 0; None if the row has no such text.

    The column's answer is its own last box, or else the text after its last `####`, or else all of it. Two numbers are
    compared as numbers, so that `\\frac{1}{2}` equals 0.5; other answers as texts, ignoring spacing, case, `$`, `%`,
    `\\text`, `\\left`, `\\right`, `\\dfrac` instead of `\\frac`, and a final full stop. An unclosed box is ignored.
    """

    def correct(completion: str, expected: Any) -> bool | None:
        answer = last_box(completion)
        return None if expected is None else answer is not None and _equal(answer, answer_in(str(expected)))

    return score_rows(completions, column, columns, correct)


def multiple_choice(
    completions: Sequence[str], *, column: str = "answer", letters: str = "ABCD", **columns: Sequence[Any]
) -> list[float | None]:
    """1 if the completion chooses the letter in `column`, else 0; None if the row has none of `letters`.

    The choice is the letter after "answer is", "answer:", "correct option is", `####` or in a box; without any of
    these, the letter that labels a line ("B.", "**B**", "B) Paris", "B" alone) or stands in brackets, (B). More than
    one such letter scores 0. A column of integers indexes `letters` from 0, as in MMLU.
    """
    if not letters.isalpha() or len({*letters.upper()}) != len(letters) or len(letters) < 2:
        raise ValueError(f"letters is {letters!r}; two or more different letters are needed, such as ABCD")
    letters = letters.upper()

    def correct(completion: str, expected: Any) -> bool | None:
        if isinstance(expected, int):
            target = letters[expected] if 0 <= expected < len(letters) else None
        else:
            target = _choice(str(expected), letters)
        return None if target is None else _choice(completion, letters) == target

    return score_rows(completions, column, columns, correct)


def score_rows(
    completions: Sequence[str],
    column: str,
    columns: Mapping[str, Sequence[Any]],
    correct: Callable[[str, Any], bool | None],
) -> list[float | None]:
    """`correct(completion, column value)` of each row as 1, 0 or None. Raises ValueError if there is no such column."""
    if column not in columns:
        names = ", ".join(sorted(set(columns) - {"prompts"}))
        raise ValueError(f"the data has no column '{column}'; it has {names or 'none'}. Name one in options.column")
    results = [correct(*row) for row in zip(completions, columns[column], strict=True)]
    return [None if result is None else float(result) for result in results]


def last_box(text: str) -> str | None:
    """The content of the `\\boxed{...}` that begins last among those that are closed."""
    start, end = -1, -1
    open_boxes: list[int] = []  # start of the content, or -1 for another brace
    for match in _BRACE.finditer(text):
        if match["box"] or match[0] == "{":
            open_boxes.append(match.end() if match["box"] else -1)
        elif match[0] == "}" and open_boxes:
            start, end = max((start, end), (open_boxes.pop(), match.start()))
    return text[start:end] if start >= 0 else None


def answer_in(text: str) -> str:
    """The answer in a column's text (see `boxed`)."""
    box = last_box(text)
    return text.rpartition("####")[2].strip() if box is None else box


def number(text: str) -> Fraction | None:
    """The final number of a text (see `numeric_match`)."""
    text = text.casefold()
    answer_start = max(text.rfind(mark) + len(mark) if mark in text else 0 for mark in _ANSWER_MARKS)
    if answer_start and (value := next(_numbers(text[answer_start:]), None)) is not None:
        return value
    return (list(_numbers(text)) or [None])[-1]


def _numbers(text: str) -> Iterator[Fraction]:
    for match in _NUMBER.finditer(text):
        if (value := _value(match)) is not None:
            yield value


def _value(match: re.Match[str]) -> Fraction | None:
    whole, decimals, denominator = match["whole"], match["decimals"], match["denominator"]
    if not (whole or decimals) or len(match[0]) > _MAX_DIGITS or (denominator is not None and not int(denominator)):
        return None
    digits = (whole or "0").replace(",", "") + (decimals or "") + (match["exponent"] or "")
    value = Fraction(digits) / int(denominator or 1)
    return -value if (match["sign"] or "").strip() in ("-", "\u2212") else value


def _equal(answer: str, target: str) -> bool:
    answer, target = _strip_latex(answer), _strip_latex(target)
    matches = [_NUMBER.fullmatch(_LATEX_FRACTION.sub(r"\1\2/\3\4", text)) for text in (answer, target)]
    values = [_value(match) if match else None for match in matches]
    return answer == target if None in values else values[0] == values[1]


def _strip_latex(text: str) -> str:
    """Remove LaTeX commands, spacing, case and the final full stop, which do not change an answer."""
    text = _LATEX_LAYOUT.sub("", _LATEX_TEXT.sub(r"\1", text).replace("{,}", ","))
    text = re.sub(r"\\[ ;:]|~", " ", re.sub(r"\\[dt]frac", r"\\frac", text))
    return re.sub(r"(?<!\w)\s+|\s+(?!\w)", "", _normalise(text, case=False)).removesuffix(".")


def _choice(text: str, letters: str) -> str | None:
    """The only letter that a text chooses (see `multiple_choice`)."""
    text = re.sub(r"\\boxed\s*\{", "\nanswer: ", text)
    text = re.sub(r"\\(?:text|math)[a-z]*|[*_`${}\[\]]", "", text)
    stated, labelled, second = _choice_patterns(letters)
    choices = list(stated.finditer(text)) or list(labelled.finditer(text))
    choices += [match for choice in choices if (match := second.match(text, choice.end()))]
    chosen = {group.upper() for match in choices for group in match.groups() if group}
    return chosen.pop() if len(chosen) == 1 else None


@functools.cache
def _choice_patterns(letters: str) -> tuple[re.Pattern[str], ...]:
    """Patterns for a stated answer, a labelled one, and a second letter right after either."""
    # "A" may be an article: a capital counts on its own, a small letter only before a stop or the end of the line
    letter = rf"[(\"']?((?-i:[{letters}])(?![\w'\u2019+-])|(?<!\w)[{letters}](?=\s*(?:[).,:;!?]|$)))"
    stop = r"(?=[ \t]*(?:[).:,]|$))"
    stated = (
        r"(?:(?:\banswer|\bcorrect (?:option|choice|letter))[^.\n]{0,60}?(?:\bis|:|=|\bbe)[\s:]*"
        rf"(?:(?:option|choice|letter)\s*)?|####\s*){letter}"
    )
    labelled = rf"^[ \t]*(?:(?:option|choice|letter)\s*)?{letter}{stop}|(?<!not )(?<!n't )\(([{letters}])\)"
    second = (
        rf"\)?\s*(?:(?:,|/|&|or\b|and\b)\s*(?:option\s*)?{letter}|[).:,]*[ \t]*{letter}{stop})"
        rf"|[ \t]+(?-i:([{letters}]))(?![\w'\u2019])"
    )
    return tuple(re.compile(pattern, re.IGNORECASE | re.MULTILINE) for pattern in (stated, labelled, second))


def _normalise(text: str, case: bool) -> str:
    text = " ".join(text.split())
    return text if case else text.casefold()

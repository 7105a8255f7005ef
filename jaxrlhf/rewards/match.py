"""Reward functions that compare the answer in a completion with a column of the data: `jaxrlhf.rewards.match:NAME`."""

import functools
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from fractions import Fraction
from typing import Any

_NUMBER = re.compile(
    r"""\^\{?[-+\u2212]?\d+ |  # the exponent of what is not a number: in x^2
    (?<![\w)\].^])(?:(?P<sign>[-+\u2212\u2013])(?P<gap>[ ]?))?[$€£]?(?:(?P<mixed>\d+)[ ](?=\d+/\d))?
    (?P<whole>\d{1,3}(?:,\d{3})+(?!\d)|\d+)?(?P<decimals>\.\d+)?(?P<exponent>e[-+]?\d{1,3}\b)?
    (?: \s?(?:\*|x|\u00d7|\\times)\s?10\^\{?(?P<tens>-?\d{1,3})\b\}?
      | \^\{?(?P<power>-?\d{1,3})\b\}?
      | \s?/\s?(?P<denominator>\d+)(?!\d|\.\d) )?""",
    re.VERBOSE,
)
_BEFORE_SIGN = (*"=<>\u2248\u2264\u2265~({[:,*/#$", " is")  # in "= - 5"; elsewhere a dash before a space is no sign
_BEFORE_DASH = tuple("0123456789%\u00b0-")  # in "10 -15", "5%-10%" and "10--15" it is no sign either
_OPERATION = re.compile(
    r"\s*%?\s*(?:[a-z]+\s+){0,2}"
    r"(?:\*\*|[-+*/x\u2212\u00d7\u00b7\u00f7]|\\times|\\cdot|\\div|plus|minus|times|divided by|of)\s*[-($\\.\d]"
)
_CLAUSE_END = re.compile(r"\n|;|[.,](?:\s|$)|$")
_DIGIT_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|\\[,!]|[\u2009\u202f\xa0])(?=\d{3}(?!\d))")
_MAX_DIGITS = 300
_MAX_POWER_DIGITS = 3000
_ANSWER_MARKS = ("####", r"\boxed{", "answer is", "answer:")
_BRACE = re.compile(r"(?P<box>\\boxed\s*\{)|\\.|[{}]", re.DOTALL)
_LATEX_FRACTION = re.compile(r"(\d[ ]?)?\\[dt]?frac\s*(?:\{\s*([-+]?[\d.]+)\s*\}|(\d))\s*(?:\{\s*(\d+)\s*\}|(\d))")
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
    else its last one. Of a calculation, as in "the answer is 3 + 5 = 8", it is the result. Accepted forms: 1,234.5, -3,
    2/3, 2 1/2, 1e3, 3 x 10^5, 2^3, $5, .5, `\\frac{3}{4}`; a percent sign is ignored. The dash of a list ("- 42") or a
    range ("10 - 15") is not a sign. Numbers are compared as exact fractions, or with an absolute `tolerance`.
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
    text = _plain_fractions(_DIGIT_GROUPS.sub(lambda match: "," if match[0] == "{,}" else "", text.casefold()))
    answer_start = max(text.rfind(mark) + len(mark) if mark in text else 0 for mark in _ANSWER_MARKS)
    if answer_start and (first := next(_numbers(text, answer_start), None)) is not None:
        return _result(text, *first)
    *_, (_, value) = [(None, None), *_numbers(text)]
    return value


def _numbers(text: str, start: int = 0, end: int = sys.maxsize) -> Iterator[tuple[re.Match[str], Fraction]]:
    for match in _NUMBER.finditer(text, start, end):
        if (value := _value(match)) is not None:
            yield match, value


def _result(text: str, match: re.Match[str], value: Fraction) -> Fraction:
    """The result of the calculation that begins with a number, 8 in "3 + 5 = 8"; the number's `value` if none does."""
    if match["power"] or _OPERATION.match(text, match.end()):
        end = next(_CLAUSE_END.finditer(text, match.end())).start()
        equals = text.rfind("=", match.end(), end)
        if equals >= 0:
            return next((result for _, result in _numbers(text, equals, end)), value)
    return value


def _value(match: re.Match[str]) -> Fraction | None:
    whole, decimals, denominator = match["whole"], match["decimals"], int(match["denominator"] or 1)
    power, tens = int(match["power"] or 1), int(match["tens"] or 0)
    too_long = len(match[0]) > _MAX_DIGITS or len(whole or "") * abs(power) > _MAX_POWER_DIGITS
    if not (whole or decimals) or too_long or not denominator:
        return None
    digits = (whole or "0").replace(",", "") + (decimals or "") + (match["exponent"] or "")
    base = Fraction(digits)
    if not base and power < 0:
        return None
    value = base**power * Fraction(10) ** tens / denominator
    if match["mixed"] and value < 1:  # 2 1/2
        value += int(match["mixed"])
    return -value if _is_negative(match) else value


def _is_negative(match: re.Match[str]) -> bool:
    """True for a minus sign; false for the dash of a list or a range, and for subtraction."""
    if match["sign"] in (None, "+"):
        return False
    before = match.string[max(0, match.start() - 20) : match.start()].rstrip(" \t")
    return before.endswith(_BEFORE_SIGN) if match["gap"] else not before.endswith(_BEFORE_DASH)


def _plain_fractions(text: str) -> str:
    r"""Write \frac{1}{2} as 1/2, and 2\frac{1}{2} as 2 1/2."""

    def plain(match: re.Match[str]) -> str:
        whole, *parts = match.groups(default="")
        return f"{whole.strip()} " * bool(whole) + f"{parts[0]}{parts[1]}/{parts[2]}{parts[3]}"

    return _LATEX_FRACTION.sub(plain, text)


def _equal(answer: str, target: str) -> bool:
    answer, target = _strip_latex(answer), _strip_latex(target)
    matches = [_NUMBER.fullmatch(_plain_fractions(text)) for text in (answer, target)]
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

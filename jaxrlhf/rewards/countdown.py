"""Countdown: reach a target from given numbers by + - * /. Named in a config as `jaxrlhf.rewards.countdown:countdown`.

Problems come from `jaxrlhf.demo.arithmetic`, or any data with a target and a list of whole numbers in each row.
"""

import ast
import operator
import re
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

from jaxrlhf.errors import quoted
from jaxrlhf.rewards.match import last_box

_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.Div: operator.truediv}
_SPELLINGS = {"\u00d7": "*", "\u00b7": "*", "\u00f7": "/", "\u2212": "-", r"\times": "*", r"\cdot": "*", r"\div": "/"}
_MAX_CHARACTERS = 300  # of an expression, so that none is too deep for Python's parser


def countdown(completions: Sequence[str], *, target: Sequence[Any], nums: Sequence[Any]) -> list[float | None]:
    """1 if the completion's expression equals `target` and uses each number of `nums` at most once, else 0; None if
    the row has no target or numbers.

    The expression is read from the last `<answer>...</answer>`, or else the last `\\boxed{...}`, or else the last line
    (after "answer:" or "answer is", if present), up to the first equals sign. It may have whole numbers, + - * / and
    brackets, and is evaluated in fractions. The columns are named as in TinyZero's data
    (https://github.com/Jiayi-Pan/TinyZero).
    """
    scores: list[float | None] = []
    for completion, goal, numbers in zip(completions, target, nums, strict=True):
        if goal is None or numbers is None:
            scores.append(None)
            continue
        try:
            value, used = evaluate(_expression(completion))
        except (ValueError, ZeroDivisionError):
            scores.append(0.0)
        else:
            scores.append(float(value == Fraction(goal) and used <= Counter(map(int, numbers))))
    return scores


def evaluate(expression: str) -> tuple[Fraction, Counter[int]]:
    """(value, count of each number) of an expression of whole numbers, + - * / and brackets.

    Raises ValueError for any other text, ZeroDivisionError for a division by zero. Walks the syntax tree; nothing is
    executed.
    """
    expression = " ".join(expression.split())
    if not re.fullmatch(r"[0-9 ()+*/-]+", expression) or len(expression) > _MAX_CHARACTERS:
        raise ValueError(f"{quoted(expression)} is not arithmetic of whole numbers")
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{quoted(expression)} is not an expression: {error.msg}") from error
    used: Counter[int] = Counter()
    return _value(tree.body, used), used


def _value(node: ast.expr, used: Counter[int]) -> Fraction:
    match node:
        case ast.Constant(value=int(number)):
            used[number] += 1
            return Fraction(number)
        case ast.BinOp(left, op, right) if type(op) in _OPERATORS:
            return _OPERATORS[type(op)](_value(left, used), _value(right, used))
        case ast.UnaryOp(ast.USub(), operand):
            return -_value(operand, used)
    raise ValueError(f"{type(node).__name__} is not arithmetic")


def _expression(text: str) -> str:
    _, tag, expression = text.rpartition("</answer>")[0].rpartition("<answer>")
    if not tag and (box := last_box(text)) is not None:
        expression = box
    elif not tag:
        last_line = (text.strip().splitlines() or [""])[-1]
        expression = re.split(r"\banswer(?:\s+is|\s*:)", last_line, flags=re.IGNORECASE)[-1]
    for spelling, symbol in _SPELLINGS.items():
        expression = expression.replace(spelling, symbol)
    return expression.partition("=")[0].strip(" .:$*\n")

"""Countdown, reach a target from given numbers by + - * /: `jaxrlhf.rewards.countdown:countdown`.

Problems come from `jaxrlhf.demo.arithmetic`, or from any data with a target and a list of whole numbers in each row.
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
_LONGEST = 300  # characters of an expression, so that none is too deep for Python's parser


def countdown(completions: Sequence[str], *, target: Sequence[Any], nums: Sequence[Any]) -> list[float | None]:
    """1 where the completion's expression comes to `target` and uses each number of `nums` once at most, else 0; None
    where the row lacks either.

    The expression is what stands in the last `<answer>...</answer>`, failing that in the last `\\boxed{...}`, failing
    that on the last line, after "answer:" or "answer is" if it says so, and up to the first equals sign. It may have
    whole numbers, + - * / and brackets, and is worked out in fractions. The columns are named as in TinyZero's data
    (https://github.com/Jiayi-Pan/TinyZero).
    """
    scores: list[float | None] = []
    for text, goal, given in zip(completions, target, nums, strict=True):
        if goal is None or given is None:
            scores.append(None)
            continue
        try:
            value, used = evaluate(_expression(text))
        except (ValueError, ZeroDivisionError):
            scores.append(0.0)
        else:
            scores.append(float(value == Fraction(goal) and used <= Counter(map(int, given))))
    return scores


def evaluate(expression: str) -> tuple[Fraction, Counter[int]]:
    """What an expression of whole numbers, + - * / and brackets comes to, and how often it has each number.

    Raises ValueError for any other, ZeroDivisionError for a division by zero. Nothing is executed: the syntax tree is
    read node by node.
    """
    expression = " ".join(expression.split())
    if not re.fullmatch(r"[0-9 ()+*/-]+", expression) or len(expression) > _LONGEST:
        raise ValueError(f"{quoted(expression)} is no arithmetic of whole numbers")
    try:
        tree = ast.parse(expression, mode="eval")
    except SyntaxError as error:
        raise ValueError(f"{quoted(expression)} is no expression: {error.msg}") from error
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
    _, tag, tagged = text.rpartition("</answer>")[0].rpartition("<answer>")
    if tag:
        said = tagged
    elif (box := last_box(text)) is not None:
        said = box
    else:
        last = (text.strip().splitlines() or [""])[-1]
        said = re.split(r"\banswer(?:\s+is|\s*:)", last, flags=re.IGNORECASE)[-1]
    for spelling, symbol in _SPELLINGS.items():
        said = said.replace(spelling, symbol)
    return said.partition("=")[0].strip(" .:$*\n")

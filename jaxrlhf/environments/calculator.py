"""A calculator as a tool: the policy writes an expression, and its response goes on with the value."""

import ast
import json
import operator
import re
from collections.abc import Callable
from typing import Any

_CALL = re.compile(r"<(tool|tool_call)>(.*?)(?:</\1>|$)", re.DOTALL)
_LONGEST = 200  # characters of an expression
_LARGEST = 1e100
_BINARY: dict[type, Callable[[Any, Any], Any]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
    ast.FloorDiv: operator.floordiv,
    ast.Mod: operator.mod,
}
_UNARY: dict[type, Callable[[Any], Any]] = {ast.UAdd: operator.pos, ast.USub: operator.neg}


class Calculator:
    """Answers a call of the calculator with `<result>...</result>`; a turn without a call ends the episode.

    A call is `<tool>2 * (3 + 4)</tool>` or what chat templates write for tools, `<tool_call>{"name": "calculator",
    "arguments": {"expression": "2 * (3 + 4)"}}</tool_call>`; the closing tag may be missing, as it is where it is a
    stop string. The last call of a turn counts. The reward of a turn is 0, less `call_cost` for a call.

    Args:
        call_cost: subtracted from the reward for each call.
        before, after: text before and after a result.
    """

    def __init__(self, call_cost: float = 0.0, before: str = "<result>", after: str = "</result>") -> None:
        self._cost, self._before, self._after = call_cost, before, after

    def reset(self) -> None:
        return None

    def step(self, state: None, completion: str) -> tuple[str | None, float]:
        calls = _CALL.findall(completion)
        if not calls:
            return None, 0.0
        try:
            result = evaluate(_expression(*calls[-1]))
        except ValueError as error:
            result = f"error: {error}"
        return f"{self._before}{result}{self._after}", -self._cost


def _expression(tag: str, body: str) -> str:
    """The expression of a call. Raises ValueError."""
    if tag == "tool":
        return body
    try:
        call = json.loads(body)
        expression = call["arguments"]["expression"]
    except (ValueError, TypeError, KeyError, RecursionError):
        raise ValueError('expected {"name": "calculator", "arguments": {"expression": "..."}}') from None
    if call.get("name") != "calculator" or not isinstance(expression, str):
        raise ValueError("the only tool is calculator, and its argument expression is a text")
    return expression


def evaluate(expression: str) -> str:
    """The value of an arithmetic expression of numbers, + - * / // % and brackets, as text. Raises ValueError, with
    what is wrong, for anything else, and for numbers beyond 1e100."""
    if len(expression) > _LONGEST:
        raise ValueError(f"more than {_LONGEST} characters")
    if "\0" in expression:  # which Python versions refuse with different errors
        raise ValueError("not an arithmetic expression")
    try:
        tree = ast.parse(expression.strip(), mode="eval")
        value = _value(tree.body)
    except (SyntaxError, MemoryError, RecursionError):
        raise ValueError("not an arithmetic expression") from None
    except ZeroDivisionError:
        raise ValueError("division by zero") from None
    if isinstance(value, float) and value.is_integer() and abs(value) < 1e15:
        return str(int(value))
    return f"{value:.12g}" if isinstance(value, float) else str(value)


def _value(node: ast.AST) -> float:
    match node:
        case ast.Constant(value=int() | float() as value) if not isinstance(value, bool):
            pass
        case ast.BinOp(left, op, right) if type(op) in _BINARY:
            value = _BINARY[type(op)](_value(left), _value(right))
        case ast.UnaryOp(op, operand) if type(op) in _UNARY:
            value = _UNARY[type(op)](_value(operand))
        case _:
            raise ValueError("only numbers, + - * / // % and brackets")
    if not abs(value) <= _LARGEST:
        raise ValueError("a number is too large")
    return value

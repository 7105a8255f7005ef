"""What a component of the reward is asked about a batch, and what it may answer. Plain Python: workers import it."""

import math
import numbers
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrlhf.errors import RewardError, quoted


class Request(NamedTuple):
    """A batch of B completions to judge."""

    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    """Of the data set: a value per completion."""
    tokens: Sequence[Sequence[str]] | None = None
    """For rewards per token: the text of each of a response's tokens, the one that ended it included."""
    step: int | None = None

    def about(self, name: str) -> str:
        """The beginning of a message about the component `name`."""
        return f"reward {name}" + (f" (step {self.step})" if self.step is not None else "")

    @property
    def first(self) -> str:
        """The end of a message about the whole batch: where to begin looking."""
        return f"; first completion: {quoted(self.completions[0])}" if self.completions else ""


class Answer(NamedTuple):
    """What a component said: for each completion a float32, or a list of one per token, or None for no opinion."""

    values: Sequence[Any]
    failed: Sequence[int] = ()
    """Completions for which it said something that is no reward; their value is None."""
    problem: str = ""
    """What was wrong with the first of them."""


def check(answer: Any, request: Request, name: str) -> Answer:
    """The answer of a function or an endpoint, read. Raises RewardError unless there is one value for a completion."""
    values = _plain(answer)
    where, count = request.about(name), len(request.completions)
    if not isinstance(values, list | tuple):
        kind = "lists of numbers" if request.tokens is not None else "numbers"
        raise RewardError(
            f"{where} returned a {type(answer).__name__}; expected a list of {count} {kind}{request.first}"
        )
    if len(values) != count:
        raise RewardError(f"{where} returned {len(values)} values for {count} completions{request.first}")
    read: list[Any] = []
    failed: list[int] = []
    problem = ""
    for i, value in enumerate(values):
        try:
            read.append(None if value is None else _value(value, request, i))
        except ValueError as error:
            problem = problem or f"{where} returned {error}, for completion {i}: {quoted(request.completions[i])}"
            read.append(None)
            failed.append(i)
    return Answer(read, failed, problem)


def _value(value: Any, request: Request, i: int) -> float | list[float]:
    if request.tokens is None:
        return _number(value)
    numbers, count = _plain(value), len(request.tokens[i])
    if not isinstance(numbers, list | tuple):
        raise ValueError(f"{quoted(value)} ({type(value).__name__}), not a list of {count} numbers, one per token")
    if len(numbers) != count:
        raise ValueError(f"{len(numbers)} numbers for {count} tokens")
    return [_number(number) for number in numbers]


def _number(value: Any) -> float:
    """As a float32. Raises ValueError saying what `value` is instead."""
    number = value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else value
    if not isinstance(number, numbers.Real):
        raise ValueError(f"{quoted(number)} ({type(value).__name__}), not a number")
    try:
        rounded = struct.unpack("f", struct.pack("f", float(number)))[0]
    except OverflowError:
        rounded = math.inf
    if not math.isfinite(rounded):
        shown = number if isinstance(number, float) else f"a {type(number).__name__} of that size"
        raise ValueError(f"{shown}, not a finite float32")
    return rounded


def _plain(value: Any) -> Any:
    """Arrays as lists."""
    return value.tolist() if hasattr(value, "tolist") else value

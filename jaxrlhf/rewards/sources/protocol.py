"""Requests to reward sources and the scores they return. Plain Python: worker processes import this without numpy."""

import math
import numbers
import struct
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from jaxrlhf.errors import RewardError, counted, quoted


class ScoreRequest(NamedTuple):
    """A batch of B completions to score."""

    prompts: Sequence[str]
    completions: Sequence[str]
    columns: Mapping[str, Sequence[Any]]
    """Columns of the data set, one value per completion."""
    tokens: Sequence[Sequence[str]] | None = None
    """For per-token rewards: the text of each response token, including the end token."""
    step: int | None = None

    def rows(self, numbers: Sequence[int]) -> "ScoreRequest":
        """The request for these rows alone."""

        def pick(values: Sequence[Any]) -> list[Any]:
            return [values[i] for i in numbers]

        return self._replace(
            prompts=pick(self.prompts),
            completions=pick(self.completions),
            columns={name: pick(values) for name, values in self.columns.items()},
            tokens=None if self.tokens is None else pick(self.tokens),
        )

    def error_prefix(self, source: str) -> str:
        return f"reward {source}" + (f" (step {self.step})" if self.step is not None else "")

    @property
    def error_suffix(self) -> str:
        """The first completion, for errors that concern the whole batch."""
        return f"; first completion: {quoted(self.completions[0])}" if self.completions else ""


class SourceScores(NamedTuple):
    """Scores from one source: per completion a float32, a list with one float32 per token, or None (unscored)."""

    values: Sequence[Any]
    failed: Sequence[int] = ()
    """Indices of completions for which the source returned an invalid value; their value is None."""
    problem: str = ""
    """Error message for the first of them."""
    costs: Mapping[str, float] = {}
    """Costs of the scores (seconds, tokens, price), by name: sums over the batch."""


def parse_scores(returned: Any, request: ScoreRequest, source: str, place: str = "") -> SourceScores:
    """Validate what a function or an endpoint returned; `place` is where it is defined.

    Raises RewardError unless there is one value per completion.
    """
    values = _to_list(returned)
    prefix, count = request.error_prefix(source), len(request.completions)
    if not isinstance(values, list | tuple) or len(values) != count:
        what = counted(len(values), "value") if isinstance(values, list | tuple) else f"a {type(returned).__name__}"
        kind = "list of numbers" if request.tokens is not None else "number"
        raise RewardError(
            f"{prefix} returned {what} for {counted(count, 'completion')}{request.error_suffix}. It must return a list "
            f"with one {kind}, or None, per completion{f' (defined at {place})' if place else ''}"
        )
    parsed: list[Any] = []
    failed: list[int] = []
    problem = ""
    for i, value in enumerate(values):
        try:
            parsed.append(None if value is None else _parse_value(value, request, i))
        except ValueError as error:
            problem = problem or f"{prefix} returned {error}, for completion {i}: {quoted(request.completions[i])}"
            parsed.append(None)
            failed.append(i)
    return SourceScores(parsed, failed, problem)


def _parse_value(value: Any, request: ScoreRequest, i: int) -> float | list[float]:
    if request.tokens is None:
        return to_float32(value)
    token_scores, count = _to_list(value), len(request.tokens[i])
    if not isinstance(token_scores, list | tuple):
        raise ValueError(f"{quoted(value)} ({type(value).__name__}), not a list of {count} numbers, one per token")
    if len(token_scores) != count:
        raise ValueError(f"{len(token_scores)} numbers for {count} tokens")
    return [to_float32(score) for score in token_scores]


def to_float32(value: Any) -> float:
    """Round to float32. Raises ValueError, describing the value, for anything but a finite number."""
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


def _to_list(value: Any) -> Any:
    return value.tolist() if hasattr(value, "tolist") else value

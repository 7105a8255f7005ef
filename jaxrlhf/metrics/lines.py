"""Lines of metrics.jsonl and samples.jsonl, JSON objects with a step: written, and read back from any file."""

import bisect
import json
import math
import re
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.errors import DataError, first_line, quoted
from jaxrlhf.files import kind_of
from jaxrlhf.metrics.keys import EPOCHS, JUDGE, METRICS, REWARDS

NON_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
"""Numbers that JSON does not have, by the text that stands for them."""
LARGEST = 2**63
"""Bound of whole numbers, which later become floats."""


def written(record: Mapping[str, Any]) -> str:
    """The line of a record, with texts in the place of non-finite numbers."""
    return json.dumps(_finite(dict(record)), ensure_ascii=False, allow_nan=False) + "\n"


def is_metric(key: str) -> bool:
    """Return True if a key is that of a metric, whose value is a number."""
    return key in METRICS or key.startswith((REWARDS, JUDGE, EPOCHS))


def number(value: Any) -> float | int:
    """Convert a Python, NumPy or JAX scalar to a Python number, exactly (float32 as float64)."""
    value = value.item() if hasattr(value, "item") else value
    return value if isinstance(value, int) and not isinstance(value, bool) else float(value)


def read_records(path: Path | str) -> list[dict[str, Any]]:
    """Read the records of a metrics.jsonl or the rows of a samples.jsonl, except an incomplete last line.

    "NaN", "Infinity" and "-Infinity" under a metric's key become floats. Raises DataError if the file is missing or a
    line is not a JSON object with a step, or has something other than a number under a metric's key.
    """
    return list(iterate(path))


def iterate(path: Path | str) -> Iterator[dict[str, Any]]:
    """The records of `read_records`, one at a time."""
    path = Path(path)
    if kind := kind_of(path):
        raise DataError(f"{path}: is {kind}, not a file")
    if not path.exists():
        raise DataError(f"{path.parent} has no {path.name}: is it a run directory?")
    with path.open("rb") as file:
        for at, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                yield _record(line, f"{path}:{at}")


class Found(NamedTuple):
    """Lines of a log: the last step that was certainly logged (-1: none), the records that are not kept as they come
    later, and how many lines cannot be read, have a step that does not fit its place, or repeat earlier ones."""

    last: int
    later: list[dict[str, Any]]
    unreadable: int
    misplaced: int
    repeated: int


def up_to(path: Path, end: int, *, every: bool, of_end: int | None = None) -> tuple[list[bytes], Found]:
    """The lines of a log up to step `end` (-1: none), in the order of their steps, and what was found. With `every`
    there is one line for each step, otherwise there may be several, one after the other; of those of `end` the first
    `of_end` are kept (None: all).

    Of the lines as many steps as possible are kept that rise from line to line. The others repeat them, as a whole or
    up to the step where the log goes on, or are misplaced: digits of their step are wrong.
    """
    with path.open("rb") as file:
        lines = list(file)
    torn = lines.pop() if lines and not lines[-1].endswith(b"\n") else b""
    steps: list[int | None] = []
    records: dict[int, dict[str, Any]] = {}  # by line: those that may be later
    for at, line in enumerate(lines):
        record = _record_or_none(line)
        steps.append(record["step"] if record else None)
        if record and record["step"] >= end:
            records[at] = record
    chosen = _rising(steps)
    known = {steps[at] for at in chosen}
    kept: list[bytes] = []
    later: list[dict[str, Any]] = []
    last, unreadable, misplaced, repeated, number_of_end = -1, 0, 0, 0, 0
    again: list[int] = []  # known steps that are not kept, since the last chosen one

    def lost(line: bytes) -> bool:
        """True if an unreadable line seems to be of a step up to `end`: by what is left of it, or by its place."""
        begun = re.match(rb'{"step": (\d{1,15})[,}]', line)
        return int(begun[1]) <= end if begun else last < end

    for at, (line, step) in enumerate(zip(lines, steps, strict=True)):
        if step is None:
            unreadable += lost(line)
        elif at in chosen or (step == last and not every and not again):
            if again and again[-1] != last:
                misplaced += len(again) * (last < end)
            else:
                repeated += sum(one <= end for one in again)
            last, again = step, []
            number_of_end += step == end
            if step < end or (step == end and (of_end is None or number_of_end <= of_end)):
                kept.append(line)
            else:
                later.append(records[at])
        elif step in known:
            again.append(step)
        else:
            misplaced += last < end
    repeated += sum(one <= end for one in again)
    certain = _certain([step for at in sorted(chosen) if (step := steps[at]) is not None], end)
    return kept, Found(certain, later, unreadable + bool(torn and lost(torn)), misplaced, repeated)


def _rising(steps: Sequence[int | None]) -> set[int]:
    """Places of the longest run of steps that rise (patience sorting); of several, one with small steps, which come
    first."""
    smallest: list[int] = []  # the smallest step that can be last in a rising run of 1, 2, ... steps, and its place
    places: list[int] = []
    before: list[int] = []
    for at, step in enumerate(steps):
        length = -1 if step is None else bisect.bisect_left(smallest, step)
        before.append(places[length - 1] if length > 0 else -1)
        if step is None:
            continue
        if length == len(smallest):
            smallest.append(step)
            places.append(at)
        elif step < smallest[length]:  # of equal ones the first is kept
            smallest[length], places[length] = step, at
    chosen, at = set(), places[-1] if places else -1
    while at >= 0:
        chosen.add(at)
        at = before[at]
    return chosen


def _certain(steps: Iterable[int], end: int) -> int:
    """The last of the rising `steps` (-1: none) that lies at or before `end`, or follows it without a gap: the digits
    of one far beyond may be wrong."""
    last = -1
    for step in steps:
        if step > max(last, end) + 1:
            break
        last = step
    return last


def _record_or_none(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it cannot be read."""
    try:
        return _record(line, "")
    except DataError:
        return None


def _record(line: bytes, where: str) -> dict[str, Any]:
    """The record of a line in UTF-8, with or without its end or a byte order mark. Records share the strings of their
    keys: a long run has many. Raises DataError."""
    try:
        record = json.loads(line.decode("utf-8-sig"))  # of bytes it would guess the encoding, line by line
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({first_line(error)})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {quoted(record, 40)}")
    if type(record.get("step")) is not int or abs(record["step"]) >= LARGEST:
        raise DataError(f"{where}: its step is {quoted(record.get('step'), 40)}, not the number of a step")
    return {sys.intern(key): _value(key, value, where) for key, value in record.items()}


def _value(key: str, value: Any, where: str) -> Any:
    """The value under a key of a record. Raises DataError if it is a metric and not a number."""
    if type(value) is float or (type(value) is int and abs(value) < LARGEST) or not is_metric(key):
        return value
    if isinstance(value, str) and value in NON_FINITE:
        return NON_FINITE[value]
    raise DataError(f"{where}: {quoted(key, 40)} is {quoted(value, 40)}, not a number")


def _finite(value: Any) -> Any:
    """Replace non-finite floats, which JSON does not have, by strings."""
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value

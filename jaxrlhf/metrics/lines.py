"""Lines of metrics.jsonl and samples.jsonl, JSON objects with a step: written, and read back from any file."""

import json
import math
import re
import sys
from collections import Counter
from collections.abc import Mapping
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
    path, records = Path(path), []
    if kind := kind_of(path):
        raise DataError(f"{path}: is {kind}, not a file")
    if not path.exists():
        raise DataError(f"{path.parent} has no {path.name}: is it a run directory?")
    with path.open("rb") as file:
        for at, line in enumerate(file, 1):
            if line.endswith(b"\n"):
                records.append(_record(line, f"{path}:{at}"))
    return records


class Found(NamedTuple):
    """Lines of a log: the last step among them (-1: none), the records that are not kept as they come later, and how
    many lines cannot be read, have a step that does not lie between those of their neighbours, or repeat earlier
    ones."""

    last: int
    later: list[dict[str, Any]]
    unreadable: int
    misplaced: int
    repeated: int


def up_to(path: Path, end: int, *, every: bool, of_end: int | None = None) -> tuple[list[bytes], Found]:
    """The lines of a log up to step `end` (-1: none), in the order of their steps, and what was found. With `every`
    there is one line for each step, otherwise there may be several, one after the other; of those of `end` the first
    `of_end` are kept (None: all)."""
    kept: list[bytes] = []
    later: list[dict[str, Any]] = []
    last, done, unreadable, misplaced, repeated, number_of_end = -1, -1, 0, 0, 0, 0

    def lost(line: bytes) -> bool:
        """True if an unreadable line seems to be of a step up to `end`: by what is left of it, or by its place."""
        begun = re.match(rb'{"step": (\d{1,15})[,}]', line)
        return int(begun[1]) <= end if begun else last < end

    *lines, torn = path.read_bytes().split(b"\n")
    records = [_record_or_none(line) for line in lines]
    strange = _misplaced({at: record["step"] for at, record in enumerate(records) if record}, repeats=not every)
    for at, (line, record) in enumerate(zip(lines, records, strict=True)):
        if record is None:
            unreadable += lost(line)
            continue
        if at in strange:
            misplaced += last < end
            continue
        step = record["step"]
        if step < last or (step == last and every):
            done = last
        if step <= done:
            repeated += step <= end
            continue
        last = step
        number_of_end += step == end
        if step < end or (step == end and (of_end is None or number_of_end <= of_end)):
            kept.append(line + b"\n")
        else:
            later.append(record)
    return kept, Found(last, later, unreadable + bool(torn and lost(torn)), misplaced, repeated)


def _misplaced(steps: Mapping[int, int], *, repeats: bool) -> set[int]:
    """Places of the steps that do not lie between their neighbours, while these are in order: a digit of them is wrong.
    With `repeats` the neighbours may be equal, if no other step is the same."""
    numbers, found = list(steps.values()), set()
    times = Counter(numbers)
    for at, before, here, after in zip(steps, [0, *numbers], numbers, numbers[1:], strict=False):
        equal = repeats and before == after and times[here] == 1
        if not before <= here <= after and (before < after or equal):
            found.add(at)
    return found


def _record_or_none(line: bytes) -> dict[str, Any] | None:
    """The record of a line; None if it cannot be read."""
    try:
        return _record(line, "")
    except DataError:
        return None


def _record(line: bytes, where: str) -> dict[str, Any]:
    """The record of a line. Records share the strings of their keys: a long run has many. Raises DataError."""
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: not JSON ({first_line(error)})") from error
    if not isinstance(record, dict):
        raise DataError(f"{where}: expected an object, found {quoted(record, 40)}")
    if type(record.get("step")) is not int:
        raise DataError(f"{where}: its step is {quoted(record.get('step'), 40)}, not a whole number")
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

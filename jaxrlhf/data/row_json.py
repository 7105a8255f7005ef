"""Prepared rows as lines of JSON, and back: the values that a row of a data set may hold, and the classes of rows."""

import dataclasses
import datetime
import functools
import json
import uuid
from collections.abc import Callable
from decimal import Decimal
from typing import Any

from jaxrlhf.errors import DataError, StorageError

_TYPE = "\0type"  # no column has such a name

# Values that JSON does not have: {name: (type, to text, from text)}. A datetime is a date too, so it comes first.
_VALUES: dict[str, tuple[type, Callable[[Any], str], Callable[[str], Any]]] = {
    "datetime": (datetime.datetime, datetime.datetime.isoformat, datetime.datetime.fromisoformat),
    "date": (datetime.date, datetime.date.isoformat, datetime.date.fromisoformat),
    "time": (datetime.time, datetime.time.isoformat, datetime.time.fromisoformat),
    "timedelta": (datetime.timedelta, lambda x: f"{x // _MICROSECOND}", lambda text: int(text) * _MICROSECOND),
    "decimal": (Decimal, str, Decimal),
    "uuid": (uuid.UUID, str, uuid.UUID),
    "bytes": (bytes, bytes.hex, bytes.fromhex),
}
_MICROSECOND = datetime.timedelta(microseconds=1)


def encode(row: Any) -> bytes:
    """A row as a line of JSON. Raises DataError for a value of a type that JSON and this module do not have."""
    return json.dumps(row, default=_tagged, separators=(",", ":")).encode() + b"\n"


def decode(line: bytes) -> Any:
    """The row of `encode`. Raises StorageError for anything else."""
    try:
        return json.loads(line, object_hook=_untagged)
    except (ValueError, TypeError, ArithmeticError, RecursionError) as error:
        raise StorageError(f"a row of data.token_cache is damaged ({error}); remove the folder") from error


def _tagged(value: Any) -> dict[str, Any]:
    name = type(value).__name__
    if _classes().get(name) is type(value):
        found: dict[str, Any] = {_TYPE: name} | {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if "loss_mask" in found:
            found["loss_mask"] = "".join("01"[trained] for trained in found["loss_mask"])
        return found
    for kind, (cls, to_text, _) in _VALUES.items():
        if isinstance(value, cls):
            return {_TYPE: kind, "value": to_text(value)}
    raise DataError(f"a row holds a {name}, which data.token_cache cannot keep; leave data.token_cache out")


def _untagged(found: dict[str, Any]) -> Any:
    name = found.pop(_TYPE, None)
    if name is None:
        return found
    if name in _VALUES:
        return _VALUES[name][2](found["value"])
    if name not in _classes():
        raise StorageError(f"a row of data.token_cache holds a {name!r}; remove the folder")
    if "loss_mask" in found:
        found["loss_mask"] = [trained == "1" for trained in found["loss_mask"]]
    if "responses" in found:
        found["responses"] = tuple(found["responses"])
    return _classes()[name](**found)


@functools.cache
def _classes() -> dict[str, type]:
    from jaxrlhf.data import datasets, labelled  # they import this module

    rows = datasets.SFTRow, datasets.PairRow, datasets.PromptRow
    return {cls.__name__: cls for cls in (*rows, labelled.LabelledRow, labelled.ScoredRow, labelled.RankedRow)}

"""The record of a run, run.json, as it is read back: from any folder, and by any version of the package."""

import datetime
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.errors import DataError, StorageError
from jaxrlhf.files import read_json

_RUN = {"method": str, "starts": list}
_START: dict[str, type | tuple[type, ...]] = {
    "time": str,
    "end": str,
    "host": str,
    "processor": str,
    "process": int,
    "processes": int,
    "command": list,
    "directory": str,
    "versions": dict,
    "outcome": str,
    "error": str,
    "about": str,
    "step": int,
    "saved": str,
    "total_steps": int,
    "peak_memory": dict,
}
"""Types of the fields of a start, which all but `time` may be missing."""


def read_record(directory: Path) -> dict[str, Any]:
    """Read run.json: `method`, `starts`, of which there is at least one, and `time`. Raises StorageError if it
    cannot be read, or if a field is not of the type that the package writes."""
    file = directory / "run.json"
    try:
        record = read_json(file)
    except DataError as error:
        raise StorageError(f"{file} cannot be read: {str(error).removeprefix(f'{file}: ')}") from error
    if problem := _problem(record):
        raise StorageError(f"{file} cannot be read: {problem}")
    return record


def _problem(record: Mapping[str, Any]) -> str:
    """The reason why a record cannot be used, by its fields; "" if it can."""
    for name, kind in _RUN.items():
        if not isinstance(record.get(name), kind):
            return f"{name} is {_kind(record.get(name))}, not {_NAMES[kind]}"
    if not isinstance(record.get("versions", {}), dict):
        return f"versions is {_kind(record['versions'])}, not an object"
    times = record.get("time", {})
    if not isinstance(times, dict) or not all(type(seconds) in (int, float) for seconds in times.values()):
        return "time is not an object of numbers"
    if not record["starts"]:
        return "starts is empty"
    for number, start in enumerate(record["starts"]):
        if not isinstance(start, dict):
            return f"starts[{number}] is {_kind(start)}, not an object"
        for name, kind in _START.items():
            value = start.get(name)
            if name in start and (not isinstance(value, kind) or isinstance(value, bool)):
                return f"{name} of starts[{number}] is {_kind(value)}"
        if not all(isinstance(word, str) for word in start.get("command", ())):
            return f"command of starts[{number}] is not a list of texts"
        if not all(isinstance(size, int | float | None) for size in start.get("peak_memory", {}).values()):
            return f"peak_memory of starts[{number}] has something other than numbers"
        for name in ("time", "end"):
            try:
                datetime.datetime.fromisoformat(start.get(name, "2000-01-01"))
            except ValueError:
                return f"{name} of starts[{number}] is not a time"
    return ""


_NAMES = {str: "text", dict: "an object", list: "a list"}


def _kind(value: Any) -> str:
    return "missing" if value is None else _NAMES.get(type(value), f"a {type(value).__name__}")

"""The numbers of a log by metric: all of a long run in a small part of the memory of its records."""

import bisect
import functools
from array import array
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from jaxrlhf.metrics.lines import LARGEST, iterate


class Columns(Sequence[dict[str, Any]]):
    """Records with a step, of which the numbers are kept: of each metric an array of its values, and one of the records
    that have it.

    A record of 60 metrics takes 1 kB. As a dict it would take 5, in small pieces, not all of which Python returns to
    the system: the memory of a process that reads its log now and then would grow with the log.
    """

    def __init__(self, records: Iterable[Mapping[str, Any]] = ()) -> None:
        self.steps = array("q")
        self._columns: dict[str, tuple[array[int], array[Any]]] = {}
        for record in records:
            for key, value in record.items():
                if key != "step" and (type(value) is float or (type(value) is int and abs(value) < LARGEST)):
                    self._add(key, value)
            self.steps.append(record["step"])

    def _add(self, key: str, value: float | int) -> None:
        kind = "d" if type(value) is float else "q"
        at, values = self._columns.get(key) or self._columns.setdefault(key, (array("q"), array(kind)))
        if kind == "d" and values.typecode == "q":  # so far all were whole
            values = array("d", values)
            self._columns[key] = at, values
        at.append(len(self.steps))
        values.append(value)

    @property
    def metrics(self) -> list[str]:
        """Keys of the metrics, in the order of their first records."""
        return list(self._columns)

    def arrays(self, *keys: str) -> list[np.ndarray]:
        """The steps of the N records that have all `keys`, int64 [N], and for each key their values [N], int64 if all
        are whole, else float64."""
        if not self._columns.keys() >= set(keys):
            return [np.array([], np.int64), *(np.array([]) for _ in keys)]
        columns = [self._columns[key] for key in keys]
        shared = functools.reduce(np.intersect1d, [np.asarray(at) for at, _ in columns])
        found = [np.asarray(values)[np.searchsorted(at, shared)] for at, values in columns]
        return [np.asarray(self.steps)[shared], *found]

    def last_with(self, key: str) -> dict[str, Any]:
        """The last record that has a metric; empty if there is none."""
        return self[self._columns[key][0][-1]] if key in self._columns else {}

    def with_any(self, keys: Iterable[str]) -> list[int]:
        """The places of the records that have any of `keys`."""
        return sorted({at for key in keys if key in self._columns for at in self._columns[key][0]})

    def __len__(self) -> int:
        return len(self.steps)

    @overload
    def __getitem__(self, at: int) -> dict[str, Any]: ...
    @overload
    def __getitem__(self, at: slice) -> list[dict[str, Any]]: ...
    def __getitem__(self, at: int | slice) -> dict[str, Any] | list[dict[str, Any]]:
        if isinstance(at, slice):
            return [self[i] for i in range(*at.indices(len(self)))]
        place = range(len(self))[at]
        found: dict[str, Any] = {"step": self.steps[place]}
        for key, (places, values) in self._columns.items():
            i = bisect.bisect_left(places, place)
            if i < len(places) and places[i] == place:
                found[key] = values[i]
        return found


def read_columns(path: Path | str) -> Columns:
    """Read a metrics.jsonl, as `read_records` does, into columns."""
    return Columns(iterate(path))

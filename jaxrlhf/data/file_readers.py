"""Read JSON, JSONL (.gz), CSV and Parquet files row by row, with the location of every row.

The JSON and CSV readers name the file and line in errors and refuse what other readers repair silently: missing cells,
NaN, duplicate keys.
"""

import csv
import gzip
import itertools
import json
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.config import Data
from jaxrlhf.errors import DataError, quoted

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
UNPACKED = 10**9
"""Bytes that any .gz file may unpack to."""
MAX_DEPTH = 100
"""Levels of lists and objects in a row, or in a JSON file."""
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class SourceLocation(NamedTuple):
    """File and line of a row (JSONL, CSV), or its number in the file, from 1."""

    path: str
    number: int
    line: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.line else f"{self.path} row {self.number}"

    @property
    def short(self) -> str:
        """`line 12` or `row 12`."""
        return f"{'line' if self.line else 'row'} {self.number}"


LocatedRows = Iterator[tuple[SourceLocation, Row]]


def is_data_file(name: str) -> bool:
    """Check the suffix of a file name, without `.gz`."""
    return name.removesuffix(".gz").endswith(SUFFIXES)


def read_file(path: Path, config: Data) -> LocatedRows:
    """Yield the rows of a file. Raises DataError, also for one that exceeds the limits of `config`."""
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith((".jsonl", ".ndjson")):
            yield from _jsonl(path, config)
        elif name.endswith(".json"):
            yield from _json(path, config)
        elif name.endswith(".csv"):
            yield from _csv(path, config)
        elif path.name.endswith(".parquet"):
            yield from _parquet(path)
        else:
            raise DataError(
                f"data {path}: unknown kind of file; supported are {', '.join(SUFFIXES)}, and text files also as .gz"
            )
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data {path}: cannot be read ({error})") from error


def _lines(path: Path, config: Data, *, limited: bool = True) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, text) of a UTF-8 file that may be compressed, without a byte order mark. Lines may be
    of any length if not `limited`."""
    compressed, unpacked = path.suffix == ".gz", 0
    most = max(UNPACKED, path.stat().st_size * config.max_gz_ratio)
    longest = min(config.max_line_mb * 10**6 if limited else sys.maxsize, sys.maxsize - 1)
    with gzip.open(path) if compressed else path.open("rb") as file:
        for number in itertools.count(1):
            line = file.readline(min(longest, int(most) - unpacked if compressed else longest) + 1)
            unpacked += len(line)
            if compressed and unpacked > most:
                raise DataError(
                    f"data {path}:{number}: the file unpacks to more than {config.max_gz_ratio:g} times its size; if "
                    "that is right, raise data.max_gz_ratio"
                )
            if len(line) > longest:
                raise DataError(
                    f"data {path}:{number}: this line is longer than {config.max_line_mb} MB; if that is right, raise "
                    "data.max_line_mb"
                )
            if not line:
                return
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"data {path}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1})"
                ) from error
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _jsonl(path: Path, config: Data) -> LocatedRows:
    for number, line in _lines(path, config):
        if line.strip():
            location = SourceLocation(str(path), number, line=True)
            yield location, _object(_parse(line, str(location)), location)


def _json(path: Path, config: Data) -> LocatedRows:
    text = "".join(line for _, line in _lines(path, config, limited=False))
    if text.lstrip().startswith("{") and "\n{" in text.strip().replace("\r", ""):  # JSON lines with suffix .json
        yield from _jsonl(path, config)
        return
    if not text.strip():
        return
    rows = _parse(text, str(path))
    if not isinstance(rows, list):
        raise DataError(f"data {path}: expected a list of objects, not {_json_type(rows)}")
    for number, row in enumerate(rows, 1):
        location = SourceLocation(str(path), number, line=False)
        yield location, _object(row, location)


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text.rstrip(), object_pairs_hook=_without_duplicates, parse_constant=_refuse_constant)
        if text.count("[") + text.count("{") > MAX_DEPTH and _depth(value) > MAX_DEPTH:
            raise ValueError(f"its values are nested deeper than {MAX_DEPTH} levels")
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        line = error.doc.split("\n")[error.lineno - 1].rstrip()
        begin = max(0, error.colno - 61)
        shown = f"{'... ' * (begin > 0)}{line[begin : error.colno + 20]}{' ...' * (len(line) > error.colno + 20)}"
        raise DataError(f"data {where}: not JSON ({error.msg}, {at}): {quoted(shown, 120)}") from error
    except UnicodeEncodeError as error:
        raise DataError(f"data {where}: half of a surrogate pair, which is not valid text") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"data {where}: not JSON ({error})") from error
    return value


def _depth(value: Any) -> int:
    """Levels of lists and objects in a value."""
    levels, inside = 0, [value]
    while inside := [value for value in inside if isinstance(value, list | dict)]:
        levels += 1
        inside = [item for value in inside for item in (value.values() if isinstance(value, dict) else value)]
    return levels


def _without_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return value


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _object(value: Any, location: SourceLocation) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"data {location}: expected an object {{column: value}}, not {_json_type(value)}")
    return value


def _json_type(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(type(value), "a number")


def _csv(path: Path, config: Data) -> LocatedRows:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((text for _, text in _lines(path, config)), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError(f"data {path}: two columns of the header have the same name: {', '.join(names)}")
        for cells in reader:
            location = SourceLocation(str(path), reader.line_num, line=True)
            if cells and len(cells) != len(names):
                raise DataError(f"data {location}: {len(cells)} cells, but the header has {len(names)} columns")
            if cells:
                yield location, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"data {path}:{reader.line_num}: not CSV ({error})") from error


def _parquet(path: Path) -> LocatedRows:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for number, row in enumerate((row for batch in file.iter_batches() for row in batch.to_pylist()), 1):
                yield SourceLocation(str(path), number, line=False), row
    except pa.ArrowInvalid as error:
        raise DataError(f"data {path}: not a Parquet file ({error})") from error

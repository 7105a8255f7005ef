"""Rows of dictionaries from JSON, JSONL (.gz), CSV and Parquet files, folders, `datasets` folders and the hub.

JSON and CSV go through readers of our own, because a message that names the file and the line is worth more than
speed here, and because what is silently repaired elsewhere (a missing column, NaN, a duplicate key) is refused.
"""

import csv
import gzip
import json
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

from jaxrlhf.config import Data
from jaxrlhf.errors import DataError, first_line

Row = dict[str, Any]
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".parquet")
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")
_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class SourceLocation(NamedTuple):
    """Where a row stands: a file and its line there (JSONL, CSV), or its place in the list, counted from 1."""

    path: str
    number: int
    line: bool

    def __str__(self) -> str:
        return f"{self.path}:{self.number}" if self.line else f"{self.path} row {self.number}"

    @property
    def short(self) -> str:
        """`line 12` or `row 12`."""
        return f"{'line' if self.line else 'row'} {self.number}"


@dataclass(frozen=True)
class Rows:
    """Rows as read, columns renamed, and where each one stands."""

    source: str
    rows: list[Row]
    places: list[SourceLocation]

    @property
    def columns(self) -> list[str]:
        """Names of the columns of all rows, in the order of their first appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))


def read(config: Data, path: str | None = None) -> Rows:
    """All rows (at most `max_rows`) of `path`, by default `config.path`, with `config.columns` renamed.

    Raises DataError naming the file and line for whatever cannot be read as it stands, and for an empty source.
    """
    source = path or config.path
    if not source:
        raise DataError("data.path is not set; give a JSON, JSONL, CSV or Parquet file, a folder or a hub id")
    pairs = list(islice(_open(source, config), config.max_rows))
    if not pairs:
        raise DataError(f"data {source}: there are no rows in it")
    rows = Rows(source, [row for _, row in pairs], [place for place, _ in pairs])
    return _renamed(rows, config.columns) if config.columns else rows


def _renamed(rows: Rows, columns: dict[str, str]) -> Rows:
    names = rows.columns
    for ours, theirs in columns.items():
        if theirs not in names:
            raise DataError(
                f"data {rows.source}: data.columns maps {ours!r} to a column {theirs!r} that the file does not have; "
                f"it has {', '.join(names)}"
            )
        if ours != theirs and ours in names and ours not in columns.values():
            raise DataError(
                f"data {rows.source}: data.columns would rename {theirs!r} to {ours!r}, which the file already has; "
                "rename that one too"
            )
    new = {theirs: ours for ours, theirs in columns.items()}
    return Rows(rows.source, [{new.get(k, k): v for k, v in row.items()} for row in rows.rows], rows.places)


def _open(source: str, config: Data) -> Iterator[tuple[SourceLocation, Row]]:
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            yield from _saved_dataset(path, config)
        else:
            for file in _files_of_split(path, config.split):
                yield from _file(file)
    elif path.exists():
        yield from _file(path)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not path.name.removesuffix(".gz").endswith(SUFFIXES):
        yield from _hub(source, config)
    else:
        raise DataError(f"data {source}: no such file or folder")


def _file(path: Path) -> Iterator[tuple[SourceLocation, Row]]:
    name = path.name.removesuffix(".gz")
    try:
        if name.endswith((".jsonl", ".ndjson")):
            yield from _jsonl(path)
        elif name.endswith(".json"):
            yield from _json(path)
        elif name.endswith(".csv"):
            yield from _csv(path)
        elif path.name.endswith(".parquet"):
            yield from _parquet(path)
        else:
            raise DataError(
                f"data {path}: unknown kind of file; known are {', '.join(SUFFIXES)}, the text ones also .gz"
            )
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"data {path}: cannot be read ({error})") from error


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """(line number from 1, text without a byte order mark) of a UTF-8 file that may be compressed."""
    with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as file:
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8")
            except UnicodeDecodeError as error:
                raise DataError(
                    f"data {path}:{number}: not UTF-8 ({error.reason} at byte {error.start + 1})"
                ) from error
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def _jsonl(path: Path) -> Iterator[tuple[SourceLocation, Row]]:
    for number, line in _lines(path):
        if line.strip():
            place = SourceLocation(str(path), number, line=True)
            yield place, _object(_parse(line, str(place)), place)


def _json(path: Path) -> Iterator[tuple[SourceLocation, Row]]:
    text = "".join(line for _, line in _lines(path))
    if text.lstrip().startswith("{") and "\n{" in text.strip().replace("\r", ""):  # JSON lines by another name
        yield from _jsonl(path)
        return
    if not text.strip():
        return
    rows = _parse(text, str(path))
    if not isinstance(rows, list):
        raise DataError(f"data {path}: a list of objects was expected, not {_kind(rows)}")
    for number, row in enumerate(rows, 1):
        place = SourceLocation(str(path), number, line=False)
        yield place, _object(row, place)


def _parse(text: str, where: str) -> Any:
    try:
        value = json.loads(text.rstrip(), object_pairs_hook=_unique, parse_constant=_no_constant)
        if _SURROGATE.search(text):
            json.dumps(value, ensure_ascii=False).encode("utf-8")
    except json.JSONDecodeError as error:
        at = f"column {error.colno}" if error.lineno == 1 else f"line {error.lineno} column {error.colno}"
        raise DataError(f"data {where}: not JSON ({error.msg}, {at})") from error
    except UnicodeEncodeError as error:
        raise DataError(f"data {where}: half of a surrogate pair, which is not text") from error
    except (ValueError, RecursionError) as error:
        raise DataError(f"data {where}: not JSON ({error})") from error
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"duplicate key {next(name for name in names if names.count(name) > 1)!r}")
    return value


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is not a JSON number")


def _object(value: Any, place: SourceLocation) -> Row:
    if not isinstance(value, dict):
        raise DataError(f"data {place}: an object {{column: value}} was expected, not {_kind(value)}")
    return value


def _kind(value: Any) -> str:
    return {dict: "an object", list: "a list", str: "text", type(None): "null"}.get(type(value), "a number")


def _csv(path: Path) -> Iterator[tuple[SourceLocation, Row]]:
    csv.field_size_limit(2**31 - 1)
    reader = csv.reader((text for _, text in _lines(path)), strict=True)
    try:
        names = next(reader, [])
        if len(set(names)) < len(names):
            raise DataError(f"data {path}: two columns of the header have the same name: {', '.join(names)}")
        for cells in reader:
            place = SourceLocation(str(path), reader.line_num, line=True)
            if cells and len(cells) != len(names):
                raise DataError(f"data {place}: {len(cells)} cells, but the header has {len(names)} columns")
            if cells:
                yield place, dict(zip(names, cells, strict=True))
    except csv.Error as error:
        raise DataError(f"data {path}:{reader.line_num}: not CSV ({error})") from error


def _parquet(path: Path) -> Iterator[tuple[SourceLocation, Row]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            for number, row in enumerate((row for part in file.iter_batches() for row in part.to_pylist()), 1):
                yield SourceLocation(str(path), number, line=False), row
    except pa.ArrowInvalid as error:
        raise DataError(f"data {path}: not a Parquet file ({error})") from error


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Files of a plain folder with the word of the split in their path; all, if no file is named after any split."""
    files = sorted(f for f in folder.rglob("*") if f.is_file() and f.name.removesuffix(".gz").endswith(SUFFIXES))
    words = {file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    mine = [file for file in files if split.lower() in words[file]]
    others = sorted({word for file in files for word in words[file] if word in SPLITS})
    if not files:
        raise DataError(f"data {folder}: no data files in this folder ({', '.join(SUFFIXES)})")
    if not mine and others:
        raise DataError(f"data {folder}: no file is named after split {split!r}; there are {', '.join(others)}")
    return mine or files


def _saved_dataset(path: Path, config: Data) -> Iterator[tuple[SourceLocation, Row]]:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # the library raises what it likes
        raise DataError(f"data {path}: not a readable `datasets` folder ({first_line(error)})") from error
    if isinstance(data, datasets.DatasetDict):
        if config.split not in data:
            raise DataError(f"data {path}: no split {config.split!r}; there are {', '.join(map(str, data))}")
        data = data[config.split]
    yield from _numbered(str(path), data)


def _hub(source: str, config: Data) -> Iterator[tuple[SourceLocation, Row]]:
    import datasets

    try:
        data = datasets.load_dataset(source, config.subset or None, split=config.split, revision=config.revision)
    except Exception as error:  # network, name, split, script: all arrive as different classes
        raise DataError(
            f"data {source}: no such file or folder here, and it could not be loaded from the hub "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    yield from _numbered(source, data)


def _numbered(source: str, rows: Iterable[Any]) -> Iterator[tuple[SourceLocation, Row]]:
    for number, row in enumerate(rows, 1):
        yield SourceLocation(source, number, line=False), dict(row)

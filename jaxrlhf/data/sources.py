"""Read rows from a file, a folder, a `datasets` folder or the Hugging Face hub."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from jaxrlhf.config import Data
from jaxrlhf.data.file_readers import SUFFIXES, LocatedRows, Row, SourceLocation, is_data_file, read_file
from jaxrlhf.errors import DataError, first_line

SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


@dataclass(frozen=True)
class Rows:
    """Rows with their columns renamed, and the location of each."""

    source: str
    rows: list[Row]
    locations: list[SourceLocation]

    @property
    def columns(self) -> list[str]:
        """Column names of all rows, in order of first appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))


def read_rows(config: Data, path: str | None = None) -> Rows:
    """Read the rows (at most `max_rows`) of `path`, by default `config.path`, and rename `config.columns`.

    Raises DataError with file and line for anything unreadable, and for an empty source.
    """
    source = path or config.path
    if not source:
        raise DataError("data.path is not set; give a JSON, JSONL, CSV or Parquet file, a folder or a hub id")
    located = list(islice(_open(source, config), config.max_rows))
    if not located:
        raise DataError(f"data {source}: there are no rows in it")
    rows = Rows(source, [row for _, row in located], [location for location, _ in located])
    return _rename_columns(rows, config.columns) if config.columns else rows


def _rename_columns(rows: Rows, columns: dict[str, str]) -> Rows:
    names = rows.columns
    for known, in_file in columns.items():
        if in_file not in names:
            raise DataError(
                f"data {rows.source}: data.columns maps {known!r} to a column {in_file!r} that the file does not have; "
                f"it has {', '.join(names)}"
            )
        if known != in_file and known in names and known not in columns.values():
            raise DataError(
                f"data {rows.source}: data.columns would rename {in_file!r} to {known!r}, which the file already has; "
                f"also give the column {known!r} another name"
            )
    new = {in_file: known for known, in_file in columns.items()}
    renamed = [{new.get(name, name): value for name, value in row.items()} for row in rows.rows]
    return Rows(rows.source, renamed, rows.locations)


def _open(source: str, config: Data) -> LocatedRows:
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            yield from _saved_dataset(path, config)
        else:
            for file in _files_of_split(path, config.split):
                yield from read_file(file)
    elif path.exists():
        yield from read_file(path)
    elif re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) and not is_data_file(path.name):
        yield from _hub(source, config)
    else:
        raise DataError(f"data {source}: no such file or folder")


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Data files with the name of the split in their path; all files if none is named after any split."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and is_data_file(file.name))
    words = {file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    matching = [file for file in files if split.lower() in words[file]]
    splits = sorted({word for file in files for word in words[file] if word in SPLITS})
    if not files:
        raise DataError(f"data {folder}: no data files in this folder ({', '.join(SUFFIXES)})")
    if not matching and splits:
        raise DataError(f"data {folder}: no file is named after split {split!r}; there are {', '.join(splits)}")
    return matching or files


def _saved_dataset(path: Path, config: Data) -> LocatedRows:
    import datasets

    try:
        data = datasets.load_from_disk(str(path))
    except Exception as error:  # the library documents no error classes
        raise DataError(f"data {path}: not a readable `datasets` folder ({first_line(error)})") from error
    if isinstance(data, datasets.DatasetDict):
        if config.split not in data:
            raise DataError(f"data {path}: no split {config.split!r}; there are {', '.join(map(str, data))}")
        data = data[config.split]
    yield from _numbered(str(path), data)


def _hub(source: str, config: Data) -> LocatedRows:
    import datasets

    try:
        data = datasets.load_dataset(source, config.subset or None, split=config.split, revision=config.revision)
    except Exception as error:  # network, name, split and script errors are all of different classes
        raise DataError(
            f"data {source}: no such file or folder here, and it could not be loaded from the hub "
            f"({type(error).__name__}: {first_line(error)})"
        ) from error
    yield from _numbered(source, data)


def _numbered(source: str, rows: Iterable[Any]) -> LocatedRows:
    for number, row in enumerate(rows, 1):
        yield SourceLocation(source, number, line=False), dict(row)

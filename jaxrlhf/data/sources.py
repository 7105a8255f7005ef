"""Read rows from a file, a folder, a `datasets` folder or the Hugging Face hub."""

import dataclasses
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from jaxrlhf.config import Data
from jaxrlhf.config.spelling import did_you_mean_path
from jaxrlhf.data.file_readers import SUFFIXES, LocatedRows, Row, SourceLocation, is_data_file, read_file
from jaxrlhf.errors import DataError, first_line

_EMPTY: tuple[Any, ...] = (None, "", [], {})
_HELD_OUT = ("validation", "valid", "val", "test", "dev", "eval")  # in order of preference
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


@dataclass(frozen=True)
class Rows:
    """Rows with their columns renamed, and the location of each."""

    source: str
    rows: list[Row]
    locations: list[SourceLocation]

    @cached_property
    def columns(self) -> list[str]:
        """Column names of all rows, in order of first appearance."""
        return list(dict.fromkeys(column for row in self.rows for column in row))

    def values(self, column: str) -> list[Any]:
        """The values of a column that are neither null nor empty."""
        return [row[column] for row in self.rows if row.get(column) not in _EMPTY]

    def first(self, column: str) -> Any:
        """The first of `values`; None if there is none."""
        return self._firsts.get(column)

    @cached_property
    def _firsts(self) -> dict[str, Any]:
        return {
            name: next((row[name] for row in self.rows if row.get(name) not in _EMPTY), None) for name in self.columns
        }


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


def read_validation_rows(config: Data) -> Rows:
    """Read the held-out rows of `config.validation_path`, or another split of `config.path`.

    The split is `validation_split`; by default the first of validation, test and dev that the source has, and `split`
    if it has none of them. Raises DataError.
    """
    source = config.validation_path or config.path
    splits = _splits(source, config)
    split = config.validation_split or next((name for name in _HELD_OUT if name in splits), config.split)
    if config.validation_split and not splits:
        raise DataError(f"data.validation_split is {split!r}, and {source} has no splits; leave it out")
    rows = read_rows(dataclasses.replace(config, split=split), source)
    return dataclasses.replace(rows, source=f"{source}, split {split}") if splits else rows


def _splits(source: str, config: Data) -> list[str]:
    """Names of the splits of a source; [] for a file, or a folder whose files are not named after splits."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            return json.loads((path / "dataset_dict.json").read_text(encoding="utf-8"))["splits"]
        return [] if (path / "state.json").exists() else _splits_of_files(_data_files(path), path)[1]
    if path.exists() or not _is_hub_id(source):
        return []
    import datasets

    try:
        return list(map(str, datasets.get_dataset_split_names(source, config.subset or None, revision=config.revision)))
    except Exception as error:  # network, name and script errors are all of different classes
        raise DataError(
            f"data {source}: its splits cannot be listed ({type(error).__name__}: {first_line(error)})"
        ) from error


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
    elif _is_hub_id(source):
        yield from _hub(source, config)
    else:
        raise DataError(f"data {source}: no such file or folder{did_you_mean_path(path)}")


def _is_hub_id(source: str) -> bool:
    return re.fullmatch(r"[\w.-]+(/[\w.-]+)?", source) is not None and not is_data_file(source)


def _files_of_split(folder: Path, split: str) -> list[Path]:
    """Data files with the name of the split in their path; all files if none is named after any split."""
    files = _data_files(folder)
    words, splits = _splits_of_files(files, folder)
    matching = [file for file in files if split.lower() in words[file]]
    if not files:
        raise DataError(f"data {folder}: no data files in this folder ({', '.join(SUFFIXES)})")
    if not matching and splits:
        raise DataError(f"data {folder}: no file is named after split {split!r}; there are {', '.join(splits)}")
    return matching or files


def _data_files(folder: Path) -> list[Path]:
    return sorted(file for file in folder.rglob("*") if file.is_file() and is_data_file(file.name))


def _splits_of_files(files: list[Path], folder: Path) -> tuple[dict[Path, set[str]], list[str]]:
    """The words in the path of each file, and those that are names of splits."""
    words = {file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    return words, sorted({word for file in files for word in words[file] if word in SPLITS})


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
            f"({type(error).__name__}: {first_line(error)}){did_you_mean_path(Path(source).expanduser())}"
        ) from error
    yield from _numbered(source, data)


def _numbered(source: str, rows: Iterable[Any]) -> LocatedRows:
    for number, row in enumerate(rows, 1):
        yield SourceLocation(source, number, line=False), dict(row)

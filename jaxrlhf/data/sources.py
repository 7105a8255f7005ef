"""Read rows from a file, a folder, a `datasets` folder or the Hugging Face hub."""

import dataclasses
import hashlib
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

from jaxrlhf.config import Data
from jaxrlhf.config.spelling import did_you_mean_path
from jaxrlhf.data import offline
from jaxrlhf.data.file_readers import SUFFIXES, LocatedRows, Row, SourceLocation, is_data_file, read_file
from jaxrlhf.errors import DataError, first_line
from jaxrlhf.files import kind_of, read_json

_EMPTY: tuple[Any, ...] = (None, "", [], {})
_HELD_OUT = ("validation", "valid", "val", "test", "dev", "eval")  # in order of preference
SURVEYED = 2048
"""Rows that are in memory at once when a data set is read piece by piece."""
SPLITS = ("train", "validation", "valid", "val", "dev", "test", "eval")


@dataclass(frozen=True)
class Rows:
    """Rows with their columns renamed, and the location of each. `start` is the number of the first one in the data."""

    source: str
    rows: list[Row]
    locations: list[SourceLocation]
    start: int = 0

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


def read_rows(config: Data, *, label: str = "") -> Rows:
    """Read the rows (at most `max_rows`) of `config.path`, called `label` in messages, and rename `config.columns`.

    Raises DataError with file and line for anything unreadable, and for an empty source.
    """
    (rows,) = _chunks(config, label, None)
    return _rename_columns(rows, config.columns) if config.columns else rows


def survey(config: Data, *, label: str = "", size: int = SURVEYED) -> tuple[Rows, int]:
    """The first rows, and of the others those with a new column or the first value of one, enough to recognise the
    format; and the number of rows. Raises DataError as `read_rows`."""
    kept: list[tuple[SourceLocation, Row]] = []
    known: set[str] = set()
    count, source = 0, ""
    for rows in _chunks(config, label, size):
        source = rows.source
        for location, row in zip(rows.locations, rows.rows, strict=True):
            new = {name for name in row if row[name] not in _EMPTY or f"{name} " not in known} - known
            if len(kept) < size or new:
                kept.append((location, row))
                known |= {name for name in row if row[name] not in _EMPTY} | {f"{name} " for name in row}
        count += len(rows.rows)
    found = Rows(source, [row for _, row in kept], [location for location, _ in kept])
    return (_rename_columns(found, config.columns) if config.columns else found), count


def chunks(config: Data, *, label: str = "", size: int = SURVEYED) -> Iterator[Rows]:
    """The rows of `read_rows`, `size` at a time."""
    return (_renamed(rows, config.columns) for rows in _chunks(config, label, size))


def _chunks(config: Data, label: str, size: int | None) -> Iterator[Rows]:
    """At most `size` rows at a time (None: all) under their own names."""
    if not config.path:
        raise DataError("data.path is not set; give a JSON, JSONL, CSV or Parquet file, a folder or a hub id")
    found = islice(_open(config.path, config), config.max_rows)
    located = list(islice(found, size))
    if not located:
        raise DataError(f"data {config.path}: there are no rows in it")
    first = 0
    while located:
        yield Rows(label or config.path, [row for _, row in located], [location for location, _ in located], first)
        first += len(located)
        located = list(islice(found, size)) if size else []


def validation_source(config: Data) -> tuple[Data, str]:
    """The config of the held-out rows of `config.validation_path`, or of another split of `config.path`, and what they
    are called.

    The split is `validation_split`; by default the first of validation, test and dev that the source has, and `split`
    if it has none of them. Raises DataError.
    """
    source = config.validation_path or config.path
    splits = _splits(source, config)
    split = config.validation_split or next((name for name in _HELD_OUT if name in splits), config.split)
    if config.validation_split and not splits:
        raise DataError(f"data.validation_split is {split!r}, and {source} has no splits; leave it out")
    others = {"validation_path": "", "validation_split": "", "validation_fraction": 0.0}
    found = dataclasses.replace(config, path=source, split=split, **others)
    return found, f"{source}, split {split}" if splits else source


def content_digest(config: Data) -> str:
    """A hash of what `config.path` and `split` hold: of the bytes of files, of the fingerprint of a hub dataset. Raises
    DataError."""
    path, total = Path(config.path).expanduser(), hashlib.sha256()
    if not path.exists():
        total.update(str(getattr(_hub_dataset(config.path, config), "_fingerprint", "")).encode())
        return total.hexdigest()
    for file in _read_files(path, config):
        total.update(f"{file.relative_to(path)}\0{file.stat().st_size}\0".encode())
        try:
            with file.open("rb") as content:
                total.update(hashlib.file_digest(content, "sha256").digest())
        except OSError as error:
            raise DataError(f"data {file}: cannot be read ({error})") from error
    return total.hexdigest()


def file_states(config: Data) -> list[tuple[str, int, int]]:
    """(name, size, time of the last change) of the files that `config.path` and `split` name; [] for a hub dataset."""
    path = Path(config.path).expanduser()
    files = _read_files(path, config) if path.exists() else []
    return [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]


def _read_files(path: Path, config: Data) -> list[Path]:
    if not path.is_dir():
        return [path]
    if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        return sorted(file for file in path.rglob("*") if file.is_file())
    return _files_of_split(path, config.split)


def _splits(source: str, config: Data) -> list[str]:
    """Names of the splits of a source; [] for a file, or a folder whose files are not named after splits."""
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists():
            splits = read_json(path / "dataset_dict.json").get("splits")
            if not isinstance(splits, list):
                raise DataError(f"data {path}: its dataset_dict.json has no list of splits")
            return list(map(str, splits))
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
    return _renamed(rows, columns)


def _renamed(rows: Rows, columns: dict[str, str]) -> Rows:
    new = {in_file: known for known, in_file in columns.items()}
    renamed = [{new.get(name, name): value for name, value in row.items()} for row in rows.rows]
    return dataclasses.replace(rows, rows=renamed)


def _open(source: str, config: Data) -> LocatedRows:
    path = Path(source).expanduser()
    if path.is_dir():
        if (path / "dataset_dict.json").exists() or (path / "state.json").exists():
            yield from _saved_dataset(path, config)
        else:
            for file in _files_of_split(path, config.split):
                yield from read_file(file, config)
    elif path.is_file():
        yield from read_file(path, config)
    elif path.exists():
        raise DataError(f"data {source}: is {kind_of(path)}, not a file; write the rows to a file first")
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
    yield from _numbered(source, _hub_dataset(source, config))


def _hub_dataset(source: str, config: Data) -> Any:
    import datasets
    from datasets.config import HF_DATASETS_CACHE

    try:
        return datasets.load_dataset(source, config.subset or None, split=config.split, revision=config.revision)
    except Exception as error:  # network, name, split and script errors are all of different classes
        switches, cache = (*offline.SWITCHES, "HF_DATASETS_OFFLINE"), str(HF_DATASETS_CACHE)
        nearby = did_you_mean_path(Path(source).expanduser())
        if "OfflineModeIsEnabled" in str(error) and (reason := offline.refusal("data set", cache, switches)):
            raise DataError(f"data {source}: {reason}{nearby}") from error
        raise DataError(
            f"data {source}: no such file or folder here, and it could not be loaded from the hub "
            f"({type(error).__name__}: {first_line(error)}){nearby}"
        ) from error


def _numbered(source: str, rows: Iterable[Any]) -> LocatedRows:
    for number, row in enumerate(rows, 1):
        yield SourceLocation(source, number, line=False), dict(row)

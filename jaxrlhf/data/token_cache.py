"""Tokenised rows in a folder on disk, for data sets that do not fit in memory.

A data set is read twice, a few thousand rows at a time: once to recognise its format, once to tokenise it. Its rows are
written one after the other to a file, from which a row is read when it is needed. A folder is named by a hash of the
content of the data, the tokenizer and the options, so that the next run that needs the same rows finds them.
"""

import dataclasses
import hashlib
import json
import os
import shutil
import tempfile
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from jaxrlhf.config import Data
from jaxrlhf.config.sections import READING
from jaxrlhf.data import row_json, sources
from jaxrlhf.data.held_out import Lazy, Usable
from jaxrlhf.data.preparation import Preparation, Report
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import DataError, StorageError
from jaxrlhf.files import read_json

T = TypeVar("T")
FORMAT = 1  # of the files
_OF_ROWS = ("path", "validation_path", "validation_split", "validation_fraction", "max_line_mb", "max_gz_ratio")
"""Options of a source that do not say how a row is read."""
_OPTIONS = ("max_length", "max_prompt_length", "truncation")
_ARRAYS = "numbers", "prompts", "contents", "ends", "lengths"


def prepare(
    config: Data, label: str, tokenizer: Tokenizer, kind: str, begin: Callable[[sources.Rows], Preparation[T]]
) -> tuple[Usable[T], Report]:
    """The usable rows of a data set, from its folder in `config.token_cache`, which is written if it is not there.

    `kind` is what the rows depend on besides data, options and tokenizer; `begin(survey)` starts to prepare them.
    Raises DataError, also if the data change while they are read, and StorageError.
    """
    folder = Path(config.token_cache).expanduser()
    before = sources.file_states(config)
    options = {name: getattr(config, name) for name in (*READING, *_OPTIONS) if name not in _OF_ROWS}
    key = [FORMAT, sources.content_digest(config), tokenizer.digest, kind, label, options]
    place = folder / hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:32]
    if not place.is_dir():
        try:
            folder.mkdir(parents=True, exist_ok=True)
            part = Path(tempfile.mkdtemp(prefix=".part-", dir=folder))
            try:
                _write(part, config, label, begin)
                if sources.file_states(config) != before:
                    raise DataError(
                        f"data {config.path} changed while it was read, so its rows may be of two versions; run again "
                        "when it is complete"
                    )
                os.replace(part, place)
            finally:
                shutil.rmtree(part, ignore_errors=True)
        except OSError as error:
            if not place.is_dir():  # else another process has written it meanwhile
                raise StorageError(f"data.token_cache {folder} cannot be written: {error}") from error
    return _read(place)


def _write(part: Path, config: Data, label: str, begin: Callable[[sources.Rows], Preparation[T]]) -> None:
    survey, count = sources.survey(config, label=label)
    preparation = begin(survey)
    arrays = {"numbers": array("q"), "prompts": array("Q"), "contents": array("Q"), "ends": array("q")}
    first = end = 0
    with (part / "rows").open("wb") as file:
        for rows in sources.chunks(config, label=label):
            for item in preparation.add(rows):
                end += file.write(row_json.encode(item.row))
                for name, value in zip(arrays, (item.number, *item.digests, end), strict=True):
                    arrays[name].append(value)
            first += len(rows.rows)
    if first != count:
        raise DataError(f"data {config.path} changed while it was read: it had {count} rows, then {first}")
    report = preparation.finish()
    for name, values in (*arrays.items(), ("lengths", report.lengths)):
        np.save(part / f"{name}.npy", np.asarray(values))
    text = dataclasses.asdict(dataclasses.replace(report, lengths=[], parts=[]))
    (part / "report.json").write_text(json.dumps(text))


def _read(place: Path) -> tuple[Usable[Any], Report]:
    try:
        numbers, prompts, contents, ends, lengths = (np.load(place / f"{name}.npy", mmap_mode="r") for name in _ARRAYS)
        report = Report(**read_json(place / "report.json") | {"lengths": lengths})
        file = (place / "rows").open("rb")
    except (OSError, ValueError, TypeError) as error:
        raise StorageError(f"{place} cannot be read ({error}); remove it, and it is written again") from error

    def row(i: int) -> Any:
        start = int(ends[i - 1]) if i else 0
        return row_json.decode(os.pread(file.fileno(), int(ends[i]) - start, start))

    return Usable(Lazy(len(ends), row), numbers, prompts, contents), report

"""Files of answers that are not asked for twice: JSON lines with a key and an answer, added one by one."""

import contextlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxrlhf.errors import StorageError
from jaxrlhf.files import read_regular

LARGEST = 1 << 32  # bytes of a file of answers


def read(files: Iterable[Path]) -> dict[str, Any]:
    """The answers in files, by key; lines cut short by a crash are skipped. Raises StorageError."""
    answers = {}
    for file in files:
        try:
            lines = read_regular(file, LARGEST).splitlines() if file.exists() else []
        except OSError as error:
            raise StorageError(f"{file} cannot be read: {error.strerror or error}") from error
        for line in lines:
            with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
                row = json.loads(line)
                answers[row["key"]] = row["answer"]
    return answers


def append(file: Path, row: dict[str, Any]) -> None:
    """Append a line and fsync. If the last line was cut short by a crash, start a new one. Raises StorageError."""
    line = json.dumps(row).encode() + b"\n"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with open(file, "a+b", buffering=0, opener=lambda path, flags: os.open(path, flags, 0o600)) as out:
            if out.seek(0, os.SEEK_END) and (out.seek(-1, os.SEEK_END), out.read(1))[1] != b"\n":
                line = b"\n" + line
            out.write(line)
            os.fsync(out.fileno())
    except OSError as error:
        raise StorageError(f"{file} cannot be written: {error.strerror or error}") from error

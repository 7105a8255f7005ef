"""Atomic file writes."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxrlhf.errors import StorageError


def write_whole(path: Path, content: str | bytes) -> Path:
    """Write `content` (text as UTF-8) to `path` atomically, creating its folder if needed, and return `path`.

    An unpaired surrogate, which UTF-8 cannot encode, is written as \\udxxx, its spelling in JSON. Raises StorageError.
    """
    with atomic_open(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
    return path


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `path` when the block ends, and is removed if the block raises.

    A reader of `path` finds the old or the new content, never part of it, even after a crash. Raises StorageError.
    """
    temporary = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)

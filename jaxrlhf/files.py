"""Files that are written whole or not at all."""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from jaxrlhf.errors import StorageError


def write_whole(path: Path, content: str | bytes) -> Path:
    """Put `content` (text as UTF-8) into `path` in one step and return it; its folder is made if need be.

    Half of a surrogate pair, which UTF-8 refuses, becomes \\udxxx: that is how JSON spells it. Raises StorageError.
    """
    with whole(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
    return path


@contextlib.contextmanager
def whole(path: Path) -> Iterator[BinaryIO]:
    """A file that becomes `path` when the block ends, and nothing if it is left by an exception.

    Whoever reads `path`, also after a crash, finds the old content or the new, never a part. Raises StorageError.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)

"""Files that are written whole or not at all."""

import contextlib
import os
from pathlib import Path

from jaxrlhf.errors import StorageError


def write_whole(path: Path, content: str | bytes) -> Path:
    """Put `content` (text as UTF-8) into `path` in one step and return it; its folder is made if need be.

    Whoever reads `path`, also after a crash, finds the old content or the new, never a part. Half of a surrogate pair,
    which UTF-8 refuses, becomes \\udxxx: that is how JSON spells it. Raises StorageError.
    """
    part = path.with_name(f".{path.name}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with part.open("wb") as file:
            file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(part, path)
    except OSError as error:
        with contextlib.suppress(OSError):
            part.unlink(missing_ok=True)
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    return path

"""Atomic file writes, links that leave a folder, and JSON files that others have written."""

import contextlib
import errno
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any, AnyStr, BinaryIO

from jaxrlhf.errors import DataError, StorageError, first_line

MAX_NAME = 255  # bytes of a file name, in all common file systems
MAX_JSON = 25_000_000  # bytes; the header of 100,000 tensors takes about 15 MB


def path_problem(path: str) -> str:
    """The reason why no file system can hold `path`, to follow it in a message; "" if there is none."""
    if "\0" in path:
        return "holds a NUL character"
    try:
        longest = max(map(len, os.fsencode(path).split(os.sep.encode())))
        Path(path).expanduser()
    except UnicodeEncodeError:
        return "holds half of a surrogate pair, which is not valid text"
    except RuntimeError:
        return "begins with the home folder of a user that does not exist"
    return f"has a part of {longest:,} bytes, and file names have at most {MAX_NAME}" if longest > MAX_NAME else ""


def kind_of(path: Path) -> str:
    """The kind of a path that is no regular file ("a named pipe"), to which a link may lead; "" if there is nothing."""
    if not path.exists() or path.is_file():
        return ""
    if path.is_dir():
        return "a folder"
    return "a named pipe" if path.is_fifo() else "a socket" if path.is_socket() else "a device"


def missing_or_kind(path: Path) -> str:
    """The reason why a regular file cannot be read as one, to follow its name in a message; "" if it can."""
    if path.is_file():
        return ""
    kind = kind_of(path)
    return f"is {kind}, not a file" if kind else "there is no such file"


def write_whole(path: Path, content: str | bytes, *, private: bool = False) -> Path:
    """Write `content` (text as UTF-8) to `path` atomically, creating its folder if needed, and return `path`.

    A `private` file can be read and written by its owner alone. An unpaired surrogate, which UTF-8 cannot encode, is
    written as \\udxxx, its spelling in JSON. Raises StorageError.
    """
    with atomic_open(path) as file:
        if private:
            os.fchmod(file.fileno(), 0o600)
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "backslashreplace"))
    return path


def check_links(folder: Path, *, subfolders: bool = False) -> None:
    """Raise DataError for a link in `folder`, and in its subfolders if so asked, that leads out of it: a folder from
    elsewhere must not bring files of this machine into a model or its prompts.

    The links of a snapshot of the hub's cache may lead to the blobs beside it.
    """
    home = folder.resolve()
    homes = [home, *([home.parent.parent / "blobs"] if home.parent.name == "snapshots" else [])]
    for path in folder.rglob("*") if subfolders else folder.iterdir():
        if path.is_symlink():
            target = Path(os.path.realpath(path))
            if not any(target.is_relative_to(allowed) for allowed in homes):
                raise DataError(
                    f"{path}: a link to {target}, which is outside the folder, so it is not read; if you trust it, put "
                    "the file itself there"
                )


@contextlib.contextmanager
def writing(path: Path | str) -> Iterator[None]:
    """Block in which an OSError, which names no file if a write has failed, becomes a StorageError with `path`."""
    try:
        yield
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error


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


def read_regular(file: Path, most: int = MAX_JSON) -> bytes:
    """The content of a regular file of at most `most` bytes. Raises OSError, also for anything else: a named pipe would
    wait for a writer, and a device has no end."""
    if kind := kind_of(file):
        raise OSError(errno.EINVAL, f"is {kind}, not a file", str(file))
    if (size := file.stat().st_size) > most:
        raise OSError(errno.EFBIG, f"{size:,} bytes are more than the {most:,} allowed for this file", str(file))
    return file.read_bytes()


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object without duplicate keys from a regular file of at most MAX_JSON bytes. Raises DataError."""
    try:
        if problem := missing_or_kind(file):  # a named pipe would wait for a writer
            raise DataError(f"{file}: {problem}")
        if (size := file.stat().st_size) > MAX_JSON:
            raise DataError(f"{file}: {size:,} bytes is more than the {MAX_JSON:,} allowed for this file")
        text = file.read_bytes()
    except OSError as error:
        raise DataError(f"{file}: cannot be read ({error.strerror or error})") from error
    return parse_json(text, str(file))


def parse_json(text: str | bytes, where: str) -> dict[str, Any]:
    """Parse a JSON object without duplicate keys; `where` is its place in messages. Raises DataError."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        unique_pairs = dict(pairs)
        if len(unique_pairs) != len(pairs):
            duplicate, _ = Counter(key for key, _ in pairs).most_common(1)[0]
            raise DataError(f"{where}: key {duplicate!r} occurs more than once")
        return unique_pairs

    try:
        parsed = json.loads(text, object_pairs_hook=unique)
    except DataError:
        raise
    except (ValueError, RecursionError) as error:  # also: not UTF-8, huge numbers, deep nesting
        raise DataError(f"{where}: not valid JSON ({first_line(error)})") from error
    if not isinstance(parsed, dict):
        raise DataError(f"{where}: must be a JSON object, is a {type(parsed).__name__}")
    return parsed


def read_lines(file: IO[AnyStr], longest: int) -> Iterator[AnyStr]:
    """The lines of an open file. Raises DataError for one of more than `longest` characters (of a binary file: bytes),
    without reading the rest of it."""
    number = 0
    while line := file.readline(longest + 1):
        number += 1
        if len(line) > longest:
            raise DataError(
                f"line {number} is longer than {longest:,} {'bytes' if isinstance(line, bytes) else 'characters'}"
            )
        yield line

"""SHA256SUMS of an export: a hash of each of its files, in the format of `sha256sum -c`."""

import contextlib
import hashlib
import re
from pathlib import Path

from jaxrlhf.errors import DataError, StorageError, counted
from jaxrlhf.files import check_links, read_regular, write_whole

SUMS = "SHA256SUMS"
SENTENCE = f"{SUMS} has a hash of each of its files; jaxrlhf verify and sha256sum -c {SUMS} compare them."
"""Sentence of the model card of an export that has the list."""
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")


def write(folder: Path) -> None:
    """Write SHA256SUMS, with the path of each file in `folder` and its SHA-256."""
    lines = [f"{digest(folder / name)}  {name}\n" for name in _files(folder)]
    write_whole(folder / SUMS, "".join(lines))


def check(folder: Path) -> str:
    """Compare the files of an export with its SHA256SUMS; returns a sentence on what was compared.

    Raises StorageError that lists the files that are missing, differ or are not in the list; also for a link that leads
    out of the folder, or if there is no list and the model card says that there was one. DataError if there is none,
    and no sign of one: a folder of an earlier version, or of another program.
    """
    file = folder / SUMS
    try:
        check_links(folder, subfolders=True)
    except DataError as error:
        raise StorageError(str(error)) from error
    try:
        text = read_regular(file).decode("utf-8")
        lines = [_LINE.fullmatch(line) for line in text.splitlines()]
    except FileNotFoundError as error:
        if _had_sums(folder):
            raise StorageError(f"{folder} has no {SUMS}, which was written with it: the file was removed") from error
        raise DataError(
            f"{folder} has no {SUMS} to compare with: an earlier version or another program wrote it"
        ) from error
    except (OSError, UnicodeDecodeError) as error:
        raise StorageError(f"{file} cannot be read ({error})") from error
    expected = {match[2]: match[1] for match in lines if match}
    present = {name: folder / name for name in _files(folder)}
    problems = [f"{SUMS} itself is damaged"] if len(expected) < len(lines) or not lines else []
    problems += [f"{name} is missing" for name in expected if name not in present]
    problems += [f"{name} is not in {SUMS}" for name in present if name not in expected]
    problems += [
        f"{name} differs from what was written"
        for name, path in present.items()
        if name in expected and digest(path) != expected[name]
    ]
    if problems:
        raise StorageError(f"{folder}: {'; '.join(problems)}")
    return f"{counted(len(expected), 'file')} as they were written"


def _had_sums(folder: Path) -> bool:
    with contextlib.suppress(OSError):
        return SENTENCE in read_regular(folder / "README.md").decode("utf-8", "replace")
    return False


def digest(path: Path) -> str:
    """The SHA-256 of a file, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(folder: Path) -> list[str]:
    """Paths of the regular files in a folder, relative to it, but for SHA256SUMS."""
    found = (path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
    return sorted(name for name in found if name != SUMS)

"""Log of scored completions on disk, from which an interrupted selection resumes."""

import contextlib
import fcntl
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from jaxrlhf.errors import StorageError

CODE = "reward's code"


class Log:
    """JSON lines: first the settings, then the completions of each prompt, in order; `count` prompts so far."""

    def __init__(self, path: Path, file: BinaryIO) -> None:
        self.path, self.count, self._file = path, 0, file

    def append(self, groups: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Append the completions of the next prompts; they are on disk when this returns."""
        self._file.writelines(_line(group) for group in groups)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.count += len(groups)

    def read(self) -> Iterator[list[dict[str, Any]]]:
        """Yield the completions of each prompt."""
        self._file.seek(0)
        next(self._file)
        for number, line in enumerate(self._file, 2):
            try:
                yield json.loads(line)
            except (ValueError, RecursionError) as error:
                raise StorageError(f"{self.path}:{number} cannot be read ({error}); --fresh starts over") from error

    def remove(self) -> None:
        """Delete the file."""
        self.path.unlink(missing_ok=True)

    def resume(self, settings: dict[str, Any], *, fresh: bool) -> None:
        """Check the header, count the complete lines and cut off the rest; start a new log if there is no header."""
        self._file.seek(0)
        header = b"" if fresh else self._file.readline()
        size = len(header) if header.endswith(b"\n") else 0
        if size:
            self._check_settings(header, settings)
            for line in self._file:
                if line.endswith(b"\n"):
                    size, self.count = size + len(line), self.count + 1
        self._file.truncate(size)
        if not size:
            self._file.write(_line(settings))

    def _check_settings(self, header: bytes, settings: dict[str, Any]) -> None:
        try:
            logged, current = dict(json.loads(header)), json.loads(_line(settings))
        except (ValueError, TypeError, RecursionError):
            raise StorageError(f"{self.path} is not a log of scored completions; move it away") from None
        code, logged_code = current.pop(CODE), logged.pop(CODE, {})
        changed = [name for name in {**logged, **current} if logged.get(name) != current.get(name)]
        if changed:
            raise StorageError(
                f"{self.path} holds completions made with another {', '.join(changed)}; restore the old value, give "
                "another --out, or --fresh to start over"
            )
        for file in (file for file, content in code.items() if logged_code.get(file) != content):
            warnings.warn(
                f"{file} has changed since {self.path} was started: its scores are kept; --fresh starts over",
                stacklevel=2,
            )


def settings_in(path: Path) -> dict[str, Any]:
    """The settings that a log was started with; empty if there is none."""
    try:
        with path.open("rb") as file:
            header = json.loads(file.readline())
    except (OSError, ValueError, RecursionError):
        return {}
    return header if isinstance(header, dict) else {}


@contextlib.contextmanager
def open_log(path: Path, settings: dict[str, Any], code: dict[str, str], *, fresh: bool) -> Iterator[Log]:
    """Open the log at `path` to resume from it, without an incomplete last line; `fresh` starts over.

    `settings` is everything that determines completions and scores, `code` the hash of each file of the reward's code.
    If the block raises, the log is kept, unless it is empty. Raises StorageError if another process writes to `path`,
    or if the log was started with other settings. Other code is only a warning, because a reward function that failed
    has to be fixed.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open("a+b")
    except OSError as error:
        raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"another process writes to {path}; wait for it, or give another --out") from None
        log = Log(path, file)
        log.resume(settings | {CODE: code}, fresh=fresh)
        try:
            yield log
        except BaseException:
            if log.count:
                print(
                    f"{log.count} prompts are scored in {path}; run the same command again to resume", file=sys.stderr
                )
            else:
                log.remove()
            raise


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"

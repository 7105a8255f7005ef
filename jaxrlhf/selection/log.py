"""What a selection has scored so far, on disk: an interrupted one goes on behind the last prompt that is there."""

import fcntl
import json
import os
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from jaxrlhf.errors import StorageError

CODE = "reward's code"


class Log:
    """JSON lines: first `settings` and `code` (a hash by file), all that decides what completions and scores are, then
    a list for each prompt in order. A context manager; `count` prompts are there.

    A last line that was not written to its end is dropped, and with `fresh` everything. Raises StorageError where
    another process writes to `path`, or where it was begun with other settings. Other code is only said: a function
    that failed has to be mended.
    """

    def __init__(self, path: Path, settings: dict[str, Any], code: dict[str, str], *, fresh: bool) -> None:
        self.path, self.count = path, 0
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = path.open("a+b")
        except OSError as error:
            raise StorageError(f"{path} cannot be written: {error.strerror or error}") from error
        try:
            self._lock()
            self._go_on(settings | {CODE: code}, fresh)
        except BaseException:
            self._file.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        self._file.close()
        if kind is not None and self.count:
            print(f"{self.count} prompts are scored in {self.path}; the same command goes on there", file=sys.stderr)
        elif kind is not None:
            self.remove()

    def append(self, groups: Sequence[Sequence[dict[str, Any]]]) -> None:
        """Keep the completions of the next prompts; they are on disk when this returns."""
        self._file.writelines(_line(group) for group in groups)
        self._file.flush()
        os.fsync(self._file.fileno())
        self.count += len(groups)

    def read(self) -> Iterator[list[dict[str, Any]]]:
        """The completions of each prompt, one prompt at a time."""
        self._file.seek(0)
        next(self._file)
        for number, line in enumerate(self._file, 2):
            try:
                yield json.loads(line)
            except ValueError as error:
                raise StorageError(f"{self.path}:{number} cannot be read ({error}); --fresh begins anew") from error

    def remove(self) -> None:
        """Delete the file: what it was for is done."""
        self.path.unlink(missing_ok=True)

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError(f"another process writes to {self.path}; wait for it, or give another --out") from None

    def _go_on(self, settings: dict[str, Any], fresh: bool) -> None:
        self._file.seek(0)
        head = b"" if fresh else self._file.readline()
        whole = len(head) if head.endswith(b"\n") else 0
        if whole:
            self._compare(head, settings)
            for line in self._file:
                if line.endswith(b"\n"):
                    whole, self.count = whole + len(line), self.count + 1
        self._file.truncate(whole)
        if not whole:
            self._file.write(_line(settings))

    def _compare(self, head: bytes, settings: dict[str, Any]) -> None:
        try:
            before, now = dict(json.loads(head)), json.loads(_line(settings))
        except (ValueError, TypeError):
            raise StorageError(f"{self.path} is no list of scored completions; move it away") from None
        code, was = now.pop(CODE), before.pop(CODE, {})
        differing = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        if differing:
            raise StorageError(
                f"{self.path} holds completions made with another {', '.join(differing)}; go back to that, give "
                "another --out, or --fresh to begin anew"
            )
        for file in (file for file, content in code.items() if was.get(file) != content):
            warnings.warn(
                f"{file} has changed since {self.path} was begun: scores that are there stay; --fresh begins anew",
                stacklevel=2,
            )


def _line(value: Any) -> bytes:
    return json.dumps(value, ensure_ascii=False).encode("utf-8") + b"\n"

"""Run directories: an exclusive lock, a record of every start, and a safe resume.

with open_run(config, "ppo", fresh=False) as run:
    ...                      # run.directory, run.resumed, run.notes
    if run.stopping:         # SIGTERM or Ctrl-C: save, then raise Preempted
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import json
import os
import platform
import socket
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, TextIO, TypeVar

import yaml

from jaxrlhf import checkpoint, distributed, memory, runtime, sharding, stopping
from jaxrlhf.config import replace, text, yaml12
from jaxrlhf.config.reader import read_config
from jaxrlhf.errors import Preempted, StorageError, first_line
from jaxrlhf.files import write_whole
from jaxrlhf.runs import entries
from jaxrlhf.runs.record import read_record
from jaxrlhf.runs.resume import check_resume, flatten, versions
from jaxrlhf.secrets import redact, redact_command

T = TypeVar("T")
opened: Path | None = None
"""Directory of the run that this process opened last."""


@dataclasses.dataclass
class Run:
    """An open run directory."""

    directory: Path
    resumed: bool
    """The directory has checkpoints to resume from."""
    notes: tuple[str, ...]
    """Messages for the user about this resume."""
    content: dict[str, Any]
    """Content of run.json."""
    _saved: bool = False  # run.json says that there is a checkpoint

    @property
    def stopping(self) -> bool:
        """A signal asked the run to stop: save at the next step boundary and raise Preempted."""
        return stopping.requested()

    @stopping.setter
    def stopping(self, made: bool) -> None:
        stopping.request(made)

    def record(self, **facts: Any) -> None:
        """Add facts about this start to run.json. Raises StorageError."""
        self.content["starts"][-1] |= facts
        if distributed.is_primary():
            write_whole(self.directory / "run.json", json.dumps(self.content, indent=1) + "\n", private=True)

    def record_saved(self) -> None:
        """Record in this start when its first checkpoint was seen, if there is one by now: `entries.check` relies on
        it. A failure to write it is left to the next call."""
        if self._saved or not distributed.is_primary() or not checkpoint.exists(self.directory / "checkpoints"):
            return
        with contextlib.suppress(OSError):
            self.record(saved=self.content["starts"][-1].get("saved", _now()))
            self._saved = True


@contextlib.contextmanager
def open_run(config: Any, method: str, fresh: bool) -> Iterator[Run]:
    """Lock `config.run_dir` and start or resume a run of the command `method` in it.

    Writes config.yaml (every option, resolved) and run.json (versions, config hash, command, host, processor, mesh, all
    starts, each with its peak memory in bytes when it ends).
    With `fresh` an existing run is first renamed to `<name>.old-<n>`. While the run is open, the first SIGTERM or
    SIGINT sets `run.stopping`; the second ends the process at once.

    Raises:
        StorageError: the directory cannot be used, is in use, or holds a run that `config` cannot resume.
    """
    global opened
    directory = Path(config.run_dir).resolve()
    with contextlib.ExitStack() as held:

        def lock_and_write() -> list[Any]:
            if fresh:
                with _lock(directory):
                    _move_aside(directory)
            held.enter_context(_lock(directory))
            entries.check(directory)
            entries.remove_unfinished(directory)
            resumed = checkpoint.exists(directory / "checkpoints")
            previous, notes = check_resume(directory, config, method) if resumed else ({}, ())
            content = _record(previous, config, method)
            content_of_config = f"# jaxrlhf {method}, every option resolved\n" + text.dump(config)
            write_whole(directory / "config.yaml", content_of_config, private=True)
            Run(directory, resumed, notes, content).record()
            return [resumed, notes, content]

        resumed, notes, content = distributed.on_primary(lock_and_write)
        run = Run(directory, resumed, tuple(notes), content)
        _check_shared(directory, content)
        opened = directory
        outcome = {"outcome": "done"}
        memory.reset_peak_on_host()
        try:
            with stopping.handling():
                yield run
        except BaseException as error:
            if isinstance(error, Preempted):
                outcome = {"outcome": "preempted"}
            else:
                outcome = {"outcome": type(error).__name__, "error": redact(first_line(error))}
            raise
        finally:
            peak = {"host": memory.peak_on_host(), "device": memory.peak_on_devices()}
            with contextlib.suppress(OSError):  # a full disk must not hide the original error
                run.record(end=_now(), **outcome, peak_memory=peak)


def check_processes(config: Any) -> None:
    """Raise ConfigError, in every process of a run on several, if they differ in code or config. A trainer calls it
    first."""
    if distributed.count() > 1:
        distributed.require_same_code()
        distributed.require_agreement("config", flatten(yaml.safe_load(text.dump(config))))


def with_template_date(config: T, fresh: bool) -> T:
    """The config with a `tokenizer.template_date`: its own, else that of the run it resumes, else today's.

    A trainer calls it before it loads anything; `open_run` then keeps the date in config.yaml.
    """
    settings: Any = config
    if settings.tokenizer.template_date:
        return config
    directory = Path(settings.run_dir)

    def find() -> str:
        date = ""
        if not fresh and checkpoint.exists(directory / "checkpoints"):
            with contextlib.suppress(ValueError, KeyError, TypeError, yaml.YAMLError):  # named by check_resume
                stored = yaml12.load(read_config(directory / "config.yaml"))
                date = str(stored["tokenizer"]["template_date"])
        return date or str(datetime.date.today())

    return replace(config, **{"tokenizer.template_date": distributed.on_primary(find)})


def check_run_directory(config: Any, method: str, fresh: bool) -> None:
    """Raise what `open_run` would, before anything is loaded; does not change the directory."""
    directory, config = Path(config.run_dir).resolve(), with_template_date(config, fresh)

    def check() -> None:
        if directory.is_dir() and not fresh:
            with _lock(directory):
                entries.check(directory)
                if checkpoint.exists(directory / "checkpoints"):
                    check_resume(directory, config, method)

    distributed.on_primary(check)


def _check_shared(directory: Path, content: dict[str, Any]) -> None:
    """Raise StorageError, in every process, if one does not see the run.json that process 0 has written."""

    def check() -> None:
        with contextlib.suppress(OSError, ValueError):
            if json.loads((directory / "run.json").read_bytes())["starts"] == content["starts"]:
                return
        raise StorageError(
            f"run_dir {directory} on host {socket.gethostname()} is not the folder that process 0 writes to; the "
            "processes of a run need one folder that all of their hosts share (a network file system)"
        )

    if distributed.count() > 1:
        distributed.shared(check)


def method_and_last_start(directory: Path) -> tuple[str, dict[str, Any]]:
    """Method of a run, and the record of its last start.

    In the record, `outcome` is "done" if the run finished, and missing while it runs or if it was killed; `directory`
    is the working directory. Raises StorageError if run.json cannot be read.
    """
    record = read_record(directory)
    return record["method"], dict(record["starts"][-1])


def typed_command(start: Mapping[str, Any]) -> list[str]:
    """The words of the command of a start, as they can be typed: its program without the folder it is installed in."""
    program, *arguments = redact_command([str(word) for word in start.get("command") or [""]])
    if not program:
        return []
    name = Path(program).name
    ours = name in ("jaxrlhf", "jaxrlhf.exe") or Path(program).parts[-2:] == ("jaxrlhf", "__main__.py")
    return [*(["jaxrlhf"] if ours else ["python", name]), *arguments]


def is_open(directory: Path) -> bool:
    """Return True if a process has the run open. Does not change the directory."""
    try:
        with open(directory / entries.LOCK, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    return False


def _lock(directory: Path) -> TextIO:
    """Create a run directory if needed and lock it, until the file is closed or the process ends."""
    path = directory / entries.LOCK
    try:
        while True:
            directory.mkdir(parents=True, exist_ok=True)
            entries.check_kind(path, "file")
            file = open(path, "a+")  # noqa: SIM115 - closed by the caller
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                file.close()
                raise StorageError(
                    f"{directory} is in use by {owner}; wait for it, stop it, or choose another run_dir"
                ) from None
            if path.exists() and os.fstat(file.fileno()).st_ino == path.stat().st_ino:
                break
            file.close()  # the directory was moved aside between open and lock
    except StorageError:  # an OSError, too
        raise
    except OSError as error:
        raise StorageError(f"run_dir {directory} cannot be used: {error.strerror or error}") from error
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, process {os.getpid()}")
    file.flush()
    return file


def _move_aside(directory: Path) -> None:
    """Rename an existing run to `<name>.old-<n>`."""
    content = {p.name for p in directory.iterdir()} - {entries.LOCK}
    if not content:
        return
    if not content & {"run.json", "config.yaml"}:
        raise StorageError(
            f"{directory} is not a run directory (no run.json), so --fresh does not rename it; choose another run_dir"
        )
    number = 1
    while (target := directory.with_name(f"{directory.name}.old-{number}")).exists():
        number += 1
    directory.rename(target)


def _record(previous: dict[str, Any], config: Any, method: str) -> dict[str, Any]:
    """Content of run.json: that of the `previous` start, if any, with this one appended."""
    settings = yaml.safe_load(text.dump(config))
    start = {
        "time": _now(),
        "host": socket.gethostname(),
        "processor": str(runtime.processor()),
        "process": os.getpid(),
        "command": redact_command(sys.argv),
        "directory": os.getcwd(),
        "processes": distributed.count(),
        "config_sha256": hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest(),
        "versions": versions(),
    }
    return {
        "method": method,
        "versions": previous.get("versions") or start["versions"],
        "platform": platform.platform(),
        "mesh": dict(sharding.make_mesh(config.mesh).shape),
        "starts": [*previous.get("starts", []), start],
        "time": previous.get("time", {}),
    }


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")

"""A run directory: one owner at a time, a record of what ran, and a resume that cannot mix two configs.

with open_run(config, "ppo", fresh=False) as run:
    ...                      # run.directory, run.resumed, run.notes
    if run.stopping:         # SIGTERM or Ctrl-C: save, then raise Preempted
"""

import contextlib
import dataclasses
import datetime
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import yaml

from jaxrlhf import checkpoint
from jaxrlhf.config import text
from jaxrlhf.errors import Preempted, StorageError, first_line
from jaxrlhf.files import write_whole

PACKAGES = ("jaxrlhf", "jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "transformers", "tokenizers")
FREE = (
    "run_dir", "logging.", "checkpoint.", "alarms.", "validation.eval_steps", "validation.patience",
    "optim.offload", "reference.offload", "dpo.reference_folder",
)  # fmt: skip
"""Keys that may change between start and resume without a trace in the result."""
MENDING = (".timeout", ".on_error", ".error_value")
"""Keys of a reward's component that may be changed once it has failed: the failure is not part of what was learnt."""
ROUNDING = (
    "mesh.", "micro_batch_size", "eval_batch_size", "local_rollout_forward_batch_size",
    "remat", "model.attention", "rollout.slots",
)  # fmt: skip
"""Keys that change the order of sums: the result stays the same to rounding, no longer bit for bit."""
LENGTH = (
    "train.num_train_epochs",
    "train.max_steps",
    "ppo.total_episodes",
    "ppo.num_train_epochs",
    "grpo.total_episodes",
    "grpo.num_train_epochs",
)
"""Keys that only say when to stop, as long as the learning rate does not depend on the last step."""


@dataclasses.dataclass
class Run:
    """An open run directory."""

    directory: Path
    resumed: bool
    """Training left checkpoints here, which must be used."""
    notes: tuple[str, ...]
    """What a person should know about this resume."""
    stopping: bool = False
    """Somebody asked the run to stop: save at the next boundary and raise Preempted."""


@contextlib.contextmanager
def open_run(config: Any, method: str, fresh: bool) -> Iterator[Run]:
    """Lock and prepare `config.run_dir` for a run of `method`, a command's name; resume what is there.

    Writes config.yaml (everything, resolved) and run.json (versions, hash of the config, command, host, mesh, starts).
    With `fresh` an existing run is moved aside to `<name>.old-<n>`. Until it closes, SIGTERM and SIGINT set
    `run.stopping`; the second signal ends the process at once.

    Raises:
        StorageError: the directory cannot be used, is in use, or holds a run that this config does not continue.
    """
    directory = Path(config.run_dir).resolve()
    lock = _lock(directory)
    try:
        if fresh and _move_aside(directory):
            lock.close()
            lock = _lock(directory)
        resumed = checkpoint.exists(directory / "checkpoints")
        settings = yaml.safe_load(text.dump(config))
        record, notes = _continue(directory, config, settings, method) if resumed else ({}, ())
        record = _record(record, config, settings, method)
        write_whole(directory / "config.yaml", f"# jaxrlhf {method}, every option resolved\n" + text.dump(config))
        write_whole(directory / "run.json", json.dumps(record, indent=1) + "\n")
        run = Run(directory, resumed, notes)
        outcome = "done"
        try:
            with _signals(run):
                yield run
        except BaseException as error:
            outcome = "preempted" if isinstance(error, Preempted) else type(error).__name__
            raise
        finally:
            record["starts"][-1] |= {"end": _now(), "outcome": outcome}
            with contextlib.suppress(OSError):  # a full disk must not hide what happened
                write_whole(directory / "run.json", json.dumps(record, indent=1) + "\n")
    finally:
        lock.close()


def check(config: Any, method: str, fresh: bool) -> None:
    """Raise what `open_run` would, before anything has been loaded; leaves the directory as it is."""
    directory = Path(config.run_dir).resolve()
    if directory.is_dir() and not fresh:
        with _lock(directory):
            if checkpoint.exists(directory / "checkpoints"):
                _continue(directory, config, yaml.safe_load(text.dump(config)), method)


def what_ran(directory: Path) -> tuple[str, str]:
    """(method, outcome of the last start) of a run directory: "done" if it came to its end, "" while it runs or if it
    was killed. Raises StorageError if run.json cannot be read."""
    try:
        record = json.loads((directory / "run.json").read_bytes())
        return record["method"], record["starts"][-1].get("outcome", "")
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise StorageError(f"{directory / 'run.json'} cannot be read: {first_line(error)}") from error


def started_in(directory: Path) -> str:
    """The working directory of the last start of a run; "" where its record does not say."""
    record = json.loads((directory / "run.json").read_bytes())
    return record["starts"][-1].get("directory", "")


def _lock(directory: Path) -> TextIO:
    """The lock of a run directory, which is made if need be. The kernel releases it when the process ends, however."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        while True:
            file = open(directory / ".lock", "a+")  # noqa: SIM115 - closed by the caller; closing is unlocking
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                file.seek(0)
                owner = file.read().strip() or "another process"
                file.close()
                raise StorageError(
                    f"{directory} is in use by {owner}; wait for it, stop it, or choose another run_dir"
                ) from None
            current = directory / ".lock"
            if current.exists() and os.fstat(file.fileno()).st_ino == current.stat().st_ino:
                break
            file.close()  # somebody moved the directory aside between open and lock
            directory.mkdir(parents=True, exist_ok=True)
    except StorageError:
        raise
    except OSError as error:
        raise StorageError(f"run_dir {directory} cannot be used: {error.strerror or error}") from error
    file.truncate(0)
    file.write(f"host {socket.gethostname()}, process {os.getpid()}")
    file.flush()
    return file


def _move_aside(directory: Path) -> bool:
    """Rename an existing run to `<name>.old-<n>`; False where there is none yet."""
    content = {p.name for p in directory.iterdir()} - {".lock"}
    if not content:
        return False
    if not content & {"run.json", "config.yaml"}:
        raise StorageError(
            f"{directory} is not a run directory (no run.json) and --fresh leaves it alone; choose another run_dir"
        )
    number = 1
    while (target := directory.with_name(f"{directory.name}.old-{number}")).exists():
        number += 1
    directory.rename(target)
    return True


def _continue(
    directory: Path, config: Any, settings: dict[str, Any], method: str
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """The record of the run that is there, and notes; refuses a config that would change the mathematics."""
    try:
        record = json.loads((directory / "run.json").read_text())
        before = _flat(yaml.safe_load((directory / "config.yaml").read_text()))
        began, versions = record["method"], record["versions"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError, yaml.YAMLError) as error:
        raise StorageError(
            f"{directory} has checkpoints, but its run.json or config.yaml cannot be read ({error}), and without them "
            "nothing says what to continue; put the files back, or start over with --fresh"
        ) from error
    if began != method:
        raise StorageError(
            f"{directory} holds a run of '{began}' and not of '{method}'; choose another run_dir, or use --fresh"
        )
    now = _flat(settings)
    before = _flat(yaml.safe_load(text.dump(type(config)()))) | before  # keys that are younger than the run
    schedules = [(keys.get("optim.schedule"), keys.get("dpo.beta_schedule", "constant")) for keys in (before, now)]
    steady = schedules == [("constant", "constant")] * 2
    changed = [key for key in now | before if before.get(key, "(not set)") != now.get(key, "(not set)")]
    changed = [key for key in changed if not key.startswith(FREE) and not (steady and key in LENGTH)]
    changed = [key for key in changed if not (key.startswith("reward.components.") and key.endswith(MENDING))]
    rounding = [key for key in changed if key.startswith(ROUNDING) or key.endswith(ROUNDING)]
    refused = [_change(key, before, now) for key in changed if key not in rounding]
    if refused:
        raise StorageError(
            f"{directory} holds a run with another config:\n"
            + "\n".join(f"  {line}" for line in refused)
            + f"\nSet these back to go on (the old config is {directory / 'config.yaml'}), start over with --fresh "
            "(the old run is kept beside it), or choose another run_dir."
        )
    notes = [f"{_change(key, before, now)}: the same to rounding, not bit for bit" for key in rounding]
    notes += [
        f"{package} was {versions.get(package)} when this run began and is {version} now: not bit for bit"
        for package, version in _versions().items()
        if package != "jaxrlhf" and versions.get(package) != version
    ]
    return record, tuple(notes)


def _record(before: dict[str, Any], config: Any, settings: dict[str, Any], method: str) -> dict[str, Any]:
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()
    start = {
        "time": _now(),
        "host": socket.gethostname(),
        "process": os.getpid(),
        "command": sys.argv,
        "directory": os.getcwd(),
        "config_sha256": digest,
        "versions": _versions(),
    }
    return {
        "method": method,
        "versions": before.get("versions") or _versions(),
        "platform": platform.platform(),
        "mesh": dataclasses.asdict(config.mesh) if hasattr(config, "mesh") else None,
        "starts": [*before.get("starts", []), start],
    }


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            versions[package] = importlib.metadata.version(package)
    return versions


@contextlib.contextmanager
def _signals(run: Run) -> Iterator[None]:
    """The first SIGTERM or SIGINT asks the run to stop, the second ends it. Only the main thread can listen."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def ask(number: int, _frame: Any) -> None:
        if run.stopping:
            os._exit(128 + number)
        run.stopping = True
        # os.write, as a handler may interrupt a print
        os.write(2, b"\nstopping: the state is saved at the end of this step (once more to stop at once)\n")

    old = {number: signal.signal(number, ask) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in old.items():
            signal.signal(number, handler or signal.SIG_DFL)  # None: set by C code, which cannot be put back


def _flat(settings: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"optim": {"eps": 1}, "parts": [{"a": 2}]} -> {"optim.eps": 1, "parts": "a list of 1", "parts.0.a": 2}"""
    flat = {}
    for key, value in settings.items():
        if isinstance(value, list) and value and all(isinstance(item, dict) for item in value):
            flat[f"{prefix}{key}"] = f"a list of {len(value)}"
            value = {str(i): item for i, item in enumerate(value)}
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _change(key: str, before: dict[str, Any], now: dict[str, Any]) -> str:
    return f"{key}: {before.get(key, '(not set)')} -> {now.get(key, '(not set)')}"


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(timespec="seconds")

"""Checkpoints of a run: which to keep, how to handle failed saves, and which one to resume from.

storage.py writes and reads single checkpoints. A checkpoint that is damaged is renamed `corrupt-<step>-<time>`, and the
one before it is used. Only one run writes a directory, as it holds its lock (see runs). Each of its processes writes
the shards of its own devices; process 0 decides what depends on the content of the directory.
"""

import concurrent.futures
import contextlib
import logging
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax

from jaxrlhf import distributed, memory, sharding
from jaxrlhf.checkpoint import room, storage
from jaxrlhf.checkpoint.digest import leaves_by_name, total_bytes
from jaxrlhf.checkpoint.storage import TEMPORARY
from jaxrlhf.errors import DamagedCheckpoint, OutOfMemory, StorageError, is_shortage
from jaxrlhf.files import read_regular

State = TypeVar("State")
CORRUPT = "corrupt-"
MAX_FAILURES = 3
"""Consecutive failed saves after which a run stops."""

_log = logging.getLogger(__name__)


def exists(directory: Path | str) -> bool:
    """True if training has written to `directory`: a checkpoint, or one that was renamed as damaged."""
    directory = Path(directory)
    return directory.is_dir() and any(is_step(p.name) or p.name.startswith(CORRUPT) for p in directory.iterdir())


def is_step(name: str) -> bool:
    """True if this is the name of the folder of a checkpoint: the number of its step, as it is written."""
    return name.isascii() and name.isdecimal() and name == str(int(name))


def short_of_memory(state: Any) -> bool:
    """True if free host memory is less than the size of `state`, which a background save holds as a second copy, on any
    of the hosts, which hold equal parts of it.

    False where free memory is unknown (not Linux).
    """
    free, share = memory.free_on_host(), total_bytes(leaves_by_name(state)) / distributed.count()
    return any(distributed.gather(free is not None and free < share))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: folder of the checkpoints, created by the first save.
        keep: number of latest checkpoints to keep. While the next one is written there are keep + 1.
        synchronous: `save` returns once the checkpoint is on disk, instead of writing in the background.
        best: also keep the checkpoint with the least or the greatest metric, however old it is.
    """

    def __init__(
        self, directory: Path | str, keep: int, synchronous: bool, best: Literal["min", "max"] | None = None
    ) -> None:
        self.directory = Path(directory).resolve()
        self._keep = keep
        self._synchronous = synchronous
        self._best = best
        self._metrics: dict[int, float | None] = {}
        self._pending: tuple[int, Any] | None = None
        self._failures = 0
        self._last_failure = ""

    @property
    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        return distributed.on_primary(self._steps_here)

    @property
    def best_step(self) -> int | None:
        """Step with the best metric (the first of equals), or None if no checkpoint has one."""
        return distributed.on_primary(self._best_step_here)

    def save(self, step: int, state: Any, extra: dict, metric: float | None = None, block: bool = False) -> None:
        """Save `state` (a pytree of jax arrays) and `extra` (JSON: data position, seed, ...) as checkpoint `step`.

        The state may be donated once this returns. An existing checkpoint of the step is kept, and gets the `extra`,
        and the `metric` if it has none. After a failed save (e.g. a full disk) its partial files are removed and
        training continues with a warning, unless `block` is set.

        Raises:
            StorageError: the save failed and `block` is set, or it was the third failure in a row.
            OutOfMemory: the same, for lack of memory.
        """
        self.wait()
        if step in self.steps:
            distributed.on_primary(lambda: self._update(step, extra, metric))
        else:
            leaves = leaves_by_name(state)
            record = storage.make_record(step, leaves, extra, metric)
            try:
                distributed.on_primary(lambda: self._prepare(total_bytes(leaves)))
                response = self._start_writing(leaves, record)
            except Exception as error:
                self._on_failure(step, error)
            else:
                self._pending = step, response
                if block or self._synchronous:
                    self.wait()
        if block and step not in self.steps:
            raise self._failure("run the same command again")

    def wait(self) -> None:
        """Wait for the background save, if any, and delete checkpoints that are no longer kept.

        Raises:
            StorageError: that save failed, and so did the two before it.
            OutOfMemory: the same, for lack of memory.
        """
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None

        def finish() -> None:
            try:
                distributed.wait_together(response.result)
            except Exception as error:
                raise StorageError(storage.reason(error)) from error

        try:
            distributed.shared(finish)
        except StorageError as error:
            self._on_failure(step, error)
        else:
            self._failures = 0
            if distributed.is_primary():
                self._prune()

    def shortage(self, state: Any, number: int) -> str:
        """The warning that the disk has no room for `number` checkpoints of `state`, those that are there included; ""
        if it has."""
        return room.shortage(self.directory, total_bytes(leaves_by_name(state)), number, len(self._steps_here()))

    def close(self) -> None:
        """`wait`; on several processes this one alone, which may have left the others."""
        if distributed.count() == 1:
            self.wait()
        elif self._pending is not None:
            (_, response), self._pending = self._pending, None
            with contextlib.suppress(Exception):  # the run ends with another error
                response.result()
        if self._last_failure and distributed.is_primary():
            self.remove_unfinished()  # the other threads of a save that failed may have written on

    def restore(self, template: State) -> tuple[int, State, dict] | None:
        """Restore the newest intact checkpoint: (step, state, extra), or None if there has never been one.

        `template` has the structure, shapes, dtypes and shardings of the state (arrays or ShapeDtypeStructs); the mesh
        may differ from the one that saved. Damaged checkpoints are renamed and logged.

        Raises:
            StorageError: every checkpoint is damaged, or the checkpoint belongs to another model or optimizer.
        """
        self.wait()
        for step in reversed(self.steps):
            try:
                state, extra = storage.read_checkpoint(self.directory, step, template)
            except DamagedCheckpoint as error:
                self._rename_damaged(step, str(error))
            else:
                return step, state, extra
        distributed.on_primary(self._refuse_if_damaged)
        return None

    def _refuse_if_damaged(self) -> None:
        damaged = [p for p in self.directory.glob(f"{CORRUPT}*") if p.is_dir()] if self.directory.is_dir() else []
        if damaged:
            raise StorageError(
                f"no checkpoint in {self.directory} can be used; nothing was deleted:\n"
                + "\n".join(f"  {p.name}: {_recorded_reason(p)}" for p in sorted(damaged))
                + "\nPut a good copy of a checkpoint back under its step number, or start over with --fresh."
            )

    def restore_step(self, step: int | Literal["best"], template: State) -> tuple[int, State, dict]:
        """Restore a checkpoint by step, or the best one: (step, state, extra). Safe while the run is training, as
        nothing is renamed.

        Raises:
            StorageError: it does not exist, is damaged, or belongs to another model or optimizer.
        """
        self.wait()
        with self._reading(step) as found:
            return found, *storage.read_checkpoint(self.directory, found, template)

    def restore_params(self, step: int | Literal["best"], mesh: jax.sharding.Mesh) -> tuple[int, dict[str, Any], dict]:
        """Restore only the `params` of a TrainState, sharded over `mesh`: (step, params by role, extra).

        Raises as `restore_step` does.
        """
        with self._reading(step) as found:
            shapes = storage.stored_shapes(self.directory, found, "params")
            template = sharding.with_shardings(shapes, sharding.shardings(shapes, mesh))
            state, extra = storage.read_checkpoint(self.directory, found, template, partial=True)
            return found, state["params"], extra

    def verify(self, step: int) -> str:
        """Read a checkpoint and compare it with its digests; returns a sentence on what was compared. Changes nothing.

        Raises StorageError if it is damaged or cannot be read.
        """
        with self._reading(step) as found:
            return storage.verify(self.directory, found)

    @contextlib.contextmanager
    def _reading(self, step: int | Literal["best"]) -> Iterator[int]:
        """The step to read; a DamagedCheckpoint becomes a StorageError."""
        found = self.best_step if step == "best" else step
        if found not in self.steps:
            raise StorageError(f"{self.directory} has no checkpoint '{step}'; it has: {self.steps or 'none'}")
        try:
            yield found
        except DamagedCheckpoint as error:
            raise StorageError(f"checkpoint {found} in {self.directory} is damaged: {error}") from error

    def _steps_here(self) -> list[int]:
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if is_step(p.name) and p.is_dir())

    def _best_step_here(self) -> int | None:
        sign = -1.0 if self._best == "min" else 1.0
        scored = [(step, sign * m) for step in self._steps_here() if (m := self._metric(step)) is not None and m == m]
        return max(scored, key=lambda pair: pair[1])[0] if scored and self._best else None

    def _metric(self, step: int) -> float | None:
        if step not in self._metrics:
            try:
                self._metrics[step] = storage.read_record(self.directory, step)["metric"]
            except (DamagedCheckpoint, StorageError):
                self._metrics[step] = None
        return self._metrics[step]

    def _update(self, step: int, extra: dict, metric: float | None) -> None:
        try:
            self._metrics[step] = storage.update_record(self.directory, step, extra, metric)
        except (DamagedCheckpoint, StorageError) as error:
            _log.warning("checkpoint %d keeps the record that it has: %s", step, error)

    def _prepare(self, size: int) -> None:
        """Make room for a checkpoint of `size` bytes. Raises StorageError."""
        self.remove_unfinished()
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            free = room.free(self.directory)
        except OSError as error:
            raise StorageError(storage.reason(error)) from error
        needed = room.needed(size)
        if free < needed:
            raise StorageError(f"it needs up to {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free")

    def _start_writing(self, leaves: dict[str, jax.Array], record: dict[str, Any]) -> Any:
        """Start to write a checkpoint. With several processes an error is raised by the response, in `wait`, where the
        others learn of it."""
        try:
            return storage.write_checkpoint(self.directory, leaves, record)
        except Exception as error:
            if distributed.count() == 1:
                raise
            response: concurrent.futures.Future[None] = concurrent.futures.Future()
            response.set_exception(error)
            return response

    def _on_failure(self, step: int, error: Exception) -> None:
        """Remove partial files and warn, or stop the run after MAX_FAILURES."""
        storage.release_threads()
        if distributed.is_primary():
            self.remove_unfinished()
        self._failures += 1
        self._last_failure = f"checkpoint {step} was not saved in {self.directory}: {storage.reason(error)}"
        if self._failures >= MAX_FAILURES:
            self._last_failure += f"; the last {self._failures} saves failed"
            resumed = f"the same command resumes from step {max(self.steps, default=0)}"
            raise self._failure(resumed) from error
        _log.warning("%s. Training continues (failure %d of %d)", self._last_failure, self._failures, MAX_FAILURES)

    def _failure(self, then: str) -> StorageError | OutOfMemory:
        """The error that ends a run after failed saves, with the remedy and what to do `then`."""
        if is_shortage(StorageError(self._last_failure)):
            return OutOfMemory(f"{self._last_failure}. Use less memory (`jaxrlhf plan` shows how); then {then}")
        return StorageError(f"{self._last_failure}. Free disk space or choose another run_dir; then {then}")

    def remove_unfinished(self) -> None:
        """Remove the folders of saves and deletions, and the files of records, that a killed process has left. Only for
        the run itself, as a reader must not disturb a run that is saving."""
        for path in self.directory.glob(f"*{TEMPORARY}"):
            shutil.rmtree(path, ignore_errors=True)
        for path in self.directory.glob(f"*/{Path(storage.RECORD).parent}/.*.part"):
            path.unlink(missing_ok=True)

    def _prune(self) -> None:
        steps = self._steps_here()
        kept = {*steps[-self._keep :], self._best_step_here()}
        for step in steps:
            if step not in kept:
                # renamed first, as a half-deleted checkpoint must not look like a complete one
                doomed = self.directory / f"{step}{TEMPORARY}"
                os.rename(self.directory / str(step), doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _rename_damaged(self, step: int, reason: str) -> None:
        if not distributed.is_primary():
            return
        target = self.directory / f"{CORRUPT}{step}-{time.strftime('%Y%m%dT%H%M%S')}"
        _log.warning("checkpoint %d is damaged: %s. Renamed to %s", step, reason, target.name)
        os.rename(self.directory / str(step), target)
        self._metrics.pop(step, None)
        with contextlib.suppress(OSError):
            (target / "reason.txt").write_text(reason + "\n")


def _recorded_reason(path: Path) -> str:
    try:
        return read_regular(path / "reason.txt").decode("utf-8", "replace").strip()
    except OSError:
        return "damaged"

"""The checkpoints of a run: which are kept, what happens when one fails, and which one training goes on from.

storage.py writes and reads a single checkpoint. One that cannot be read, or is not what was saved, is set aside as
`corrupt-<step>-<time>` and the one before it is used. One process writes a directory; the lock of the run (runs.py)
sees to that.
"""

import contextlib
import logging
import os
import shutil
import time
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax

from jaxrlhf import memory, sharding
from jaxrlhf.checkpoint import storage
from jaxrlhf.checkpoint.digest import leaves_by_name, size
from jaxrlhf.checkpoint.storage import TEMPORARY, Damaged
from jaxrlhf.errors import StorageError

State = TypeVar("State")
CORRUPT = "corrupt-"
FAILURES = 3
"""Failed saves in a row after which a run stops."""

_log = logging.getLogger(__name__)


def exists(directory: Path | str) -> bool:
    """Whether training left anything in `directory`: a checkpoint, or one that was set aside as damaged."""
    directory = Path(directory)
    return directory.is_dir() and any(p.name.isdigit() or p.name.startswith(CORRUPT) for p in directory.iterdir())


def short_of_memory(state: Any) -> bool:
    """Whether free host memory is less than the bytes of `state`: then a save in the background is not affordable.

    While a background save runs, the state it writes stays in memory beside the one that training goes on with. Where
    free memory is not known (not Linux) the answer is False.
    """
    free = memory.free_on_host()
    return free is not None and free < size(leaves_by_name(state))


class Checkpoints:
    """The checkpoints of one run.

    Args:
        directory: where they lie; made by the first save.
        keep: how many of the latest stay. While one more is written there are keep + 1.
        synchronous: `save` returns when the checkpoint is on disk, instead of leaving that to the background.
        best: whether the checkpoint with the least or the greatest metric stays as well, however old it is.
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
        self._problem = ""
        self._cleaned = False

    @property
    def steps(self) -> list[int]:
        """Steps with a committed checkpoint, ascending."""
        if not self.directory.is_dir():
            return []
        return sorted(int(p.name) for p in self.directory.iterdir() if p.name.isdigit() and p.is_dir())

    @property
    def best_step(self) -> int | None:
        """The step with the best metric (the first of equals), or None where no checkpoint has one."""
        sign = -1.0 if self._best == "min" else 1.0
        scored = [(step, sign * m) for step in self.steps if (m := self._metric(step)) is not None and m == m]
        return max(scored, key=lambda pair: pair[1])[0] if scored and self._best else None

    def save(self, step: int, state: Any, extra: dict, metric: float | None = None, block: bool = False) -> None:
        """Commit `state` (a pytree of jax arrays) and `extra` (JSON: data position, seed, ...) as checkpoint `step`.

        The state may be donated as soon as this returns. A step that is already there is left as it is, so evaluate
        before saving when `metric` is wanted. A save that fails (a full disk) gives back what it took, warns, and
        training goes on; with `block` the caller relies on it, so it raises.

        Raises:
            StorageError: the save failed and `block` is set, or it was the third in a row that failed.
        """
        self.wait()
        if step not in self.steps:
            self._clean()
            leaves = leaves_by_name(state)
            record = storage.describe(step, leaves, extra, metric)
            try:
                self._check_room(size(leaves))
                response = storage.write(self.directory, leaves, record)
            except Exception as error:
                self._failed(step, error)
            else:
                self._pending = step, response
                if block or self._synchronous:
                    self.wait()
        if block and step not in self.steps:
            raise StorageError(
                f"{self._problem}; make room or choose another run_dir, then start the same command again"
            )

    def wait(self) -> None:
        """Until the save in the background, if any, has ended. Then remove what is no longer kept.

        Raises:
            StorageError: that save failed, and so did the two before it.
        """
        if self._pending is None:
            return
        (step, response), self._pending = self._pending, None
        try:
            response.result()
        except Exception as error:
            self._failed(step, error)
        else:
            self._failures = 0
            self._prune()

    def close(self) -> None:
        """Finish what is being written."""
        self.wait()

    def restore(self, template: State) -> tuple[int, State, dict] | None:
        """The newest checkpoint that is whole: (step, state, extra). None where nothing was ever saved.

        `template` has the structure, shapes, dtypes and shardings of the state to build (arrays or ShapeDtypeStructs);
        the mesh may differ from the one that saved. Damaged checkpoints are renamed, and reported in the log.

        Raises:
            StorageError: every checkpoint is damaged, or the checkpoint is of another model or optimizer.
        """
        self.wait()
        for step in reversed(self.steps):
            try:
                state, extra = storage.read(self.directory, step, template)
            except Damaged as error:
                self._set_aside(step, str(error))
            else:
                return step, state, extra
        damaged = [p for p in self.directory.glob(f"{CORRUPT}*") if p.is_dir()] if self.directory.is_dir() else []
        if damaged:
            raise StorageError(
                f"no checkpoint in {self.directory} can be used; nothing was deleted:\n"
                + "\n".join(f"  {p.name}: {_reason(p)}" for p in sorted(damaged))
                + "\nPut a good copy of a checkpoint back under its step number, or start over with --fresh."
            )
        return None

    def restore_step(self, step: int | Literal["best"], template: State) -> tuple[int, State, dict]:
        """One checkpoint by its step, or the best: (step, state, extra). Nothing is renamed, so a live run is safe.

        Raises:
            StorageError: it is not there, is damaged, or is of another model or optimizer.
        """
        self.wait()
        found = self._found(step)
        try:
            return found, *storage.read(self.directory, found, template)
        except Damaged as error:
            raise StorageError(f"checkpoint {found} in {self.directory} is damaged: {error}") from error

    def restore_params(self, step: int | Literal["best"], mesh: jax.sharding.Mesh) -> tuple[int, dict[str, Any], dict]:
        """(step, what trained by role, extra) of a checkpoint of a TrainState, whatever else it has, placed on `mesh`.

        Raises as `restore_step` does.
        """
        found = self._found(step)
        try:
            shapes = storage.outline(self.directory, found, "params")
            places = sharding.shardings(shapes, mesh)
            placed = jax.tree.map(lambda x, at: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=at), shapes, places)
            state, extra = storage.read(self.directory, found, placed, part=True)
        except Damaged as error:
            raise StorageError(f"checkpoint {found} in {self.directory} is damaged: {error}") from error
        return found, state["params"], extra

    def _found(self, step: int | Literal["best"]) -> int:
        found = self.best_step if step == "best" else step
        if found not in self.steps:
            raise StorageError(f"{self.directory} has no checkpoint '{step}'; it has: {self.steps or 'none'}")
        return found

    def _metric(self, step: int) -> float | None:
        if step not in self._metrics:
            try:
                self._metrics[step] = storage.record(self.directory, step)["metric"]
            except (Damaged, StorageError):
                self._metrics[step] = None
        return self._metrics[step]

    def _check_room(self, content: int) -> None:
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        needed = content + content // 20 + 2**20  # orbax compresses, but weights and moments hardly shrink
        if free < needed:
            raise OSError(f"it needs up to {needed / 1e6:.0f} MB and the disk has {free / 1e6:.0f} MB free")

    def _failed(self, step: int, error: Exception) -> None:
        """Give the disk back, warn, and stop the run where this goes on."""
        self._clean(again=True)
        self._failures += 1
        self._problem = f"checkpoint {step} was not saved in {self.directory}: {storage.reason(error)}"
        if self._failures >= FAILURES:
            raise StorageError(
                f"{self._problem}; the last {self._failures} saves failed. "
                f"Make room or choose another run_dir; the same command goes on from step {max(self.steps, default=0)}"
            ) from error
        _log.warning("%s. Training goes on (%d of %d failures)", self._problem, self._failures, FAILURES)

    def _clean(self, again: bool = False) -> None:
        """Remove temporary folders. Only who writes does this: a reader must not disturb a run that is saving."""
        if again or not self._cleaned:
            for path in self.directory.glob(f"*{TEMPORARY}"):
                shutil.rmtree(path, ignore_errors=True)
        self._cleaned = True

    def _prune(self) -> None:
        kept = {*self.steps[-self._keep :], self.best_step}
        for step in self.steps:
            if step not in kept:
                # a half-deleted checkpoint must not look like a whole one
                doomed = self.directory / f"{step}{TEMPORARY}"
                os.rename(self.directory / str(step), doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _set_aside(self, step: int, reason: str) -> None:
        target = self.directory / f"{CORRUPT}{step}-{time.strftime('%Y%m%dT%H%M%S')}"
        _log.warning("checkpoint %d is damaged: %s. Set aside as %s", step, reason, target.name)
        os.rename(self.directory / str(step), target)
        self._metrics.pop(step, None)
        with contextlib.suppress(OSError):
            (target / "reason.txt").write_text(reason + "\n")


def _reason(path: Path) -> str:
    try:
        return (path / "reason.txt").read_text().strip()
    except OSError:
        return "damaged"

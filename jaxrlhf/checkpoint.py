"""Checkpoints: the whole state in one atomic commit, checked when it is read back. The only door to orbax.

A checkpoint is a folder named after its step. Orbax writes it under a temporary name and renames it, so a killed
process leaves either a whole checkpoint or a temporary folder that nobody reads. Orbax does not checksum array data, so
beside the arrays lies a JSON record with a digest of every leaf, sealed by a SHA-256 of the record itself. A checkpoint
that fails either check is set aside as `corrupt-<step>-<time>` and the one before it is used.

Leaves are stored flat, named by their path ("params.policy.layers.mlp.up.kernel"), so that a checkpoint depends on
neither container classes nor shardings. One process writes a directory; the lock of the run (runs.py) sees to that.
"""

import contextlib
import json
import logging
import os
import shutil
import sys
import time
import warnings
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeVar

import jax
import jax.numpy as jnp

from jaxrlhf.digest import check_fit, digests, leaves_by_name, name, sealed, size, some
from jaxrlhf.errors import StorageError

State = TypeVar("State")
FORMAT = 1
TEMPORARY = ".orbax-checkpoint-tmp"
CORRUPT = "corrupt-"
FAILURES = 3
"""Failed saves in a row after which a run stops."""

_log = logging.getLogger(__name__)


class _Damaged(Exception):
    """A checkpoint that cannot be read or is not what was written."""


def exists(directory: Path | str) -> bool:
    """Whether training left anything in `directory`: a checkpoint, or one that was set aside as damaged."""
    directory = Path(directory)
    return directory.is_dir() and any(p.name.isdigit() or p.name.startswith(CORRUPT) for p in directory.iterdir())


def short_of_memory(state: Any) -> bool:
    """Whether free host memory is less than the bytes of `state`: then a save in the background is not affordable.

    While a background save runs, the state it writes stays in memory beside the one that training goes on with. Where
    free memory is not known (not Linux) the answer is False.
    """
    free = []
    with contextlib.suppress(OSError, IndexError, ValueError):
        lines = Path("/proc/meminfo").read_text().splitlines()
        free += [int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:")]
    with contextlib.suppress(OSError, ValueError):  # a container's own limit; the file says "max" when there is none
        group = Path("/sys/fs/cgroup")
        free += [int((group / "memory.max").read_text()) - int((group / "memory.current").read_text())]
    return bool(free) and min(free) < size(leaves_by_name(state))


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
            record = {"format": FORMAT, "step": step, "metric": metric, "extra": extra, "leaves": digests(leaves)}
            try:
                self._check_room(size(leaves))
                ocp, context = _orbax()
                with context:
                    path = self.directory / str(step)
                    response = ocp.save_checkpointables_async(path, {"state": leaves, "record": sealed(record)})
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
                state, extra = self._load(step, template)
            except _Damaged as error:
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
        found = self.best_step if step == "best" else step
        if found not in self.steps:
            raise StorageError(f"{self.directory} has no checkpoint '{step}'; it has: {self.steps or 'none'}")
        try:
            return found, *self._load(found, template)
        except _Damaged as error:
            raise StorageError(f"checkpoint {found} in {self.directory} is damaged: {error}") from error

    def _load(self, step: int, template: State) -> tuple[State, dict]:
        record = self._record(step)
        wanted = leaves_by_name(template)
        check_fit(f"checkpoint {step} in {self.directory}", record["leaves"], wanted)
        abstract = {path: _abstract(leaf) for path, leaf in wanted.items()}
        ocp, context = _orbax()
        try:
            with context:
                loaded = ocp.load_checkpointables(self.directory / str(step), {"state": abstract})["state"]
        except Exception as error:
            if _is_shortage(error):
                raise
            raise _Damaged(f"orbax cannot read it ({_first_line(error)})") from error
        wrong = [path for path, digest in digests(loaded).items() if record["leaves"][path] != digest]
        if wrong:
            raise _Damaged(f"the bits of {some(wrong)} are not those that were saved")
        leaves, structure = jax.tree_util.tree_flatten_with_path(template)
        full = [loaded[name(path)] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves]
        return jax.tree.unflatten(structure, full), record["extra"]

    def _record(self, step: int) -> dict[str, Any]:
        try:
            record = json.loads((self.directory / str(step) / "record" / "data.json").read_bytes())
            intact = record["seal"] == sealed(record)["seal"]
        except PermissionError as error:
            raise StorageError(f"checkpoint {step} in {self.directory} may not be read: {error}") from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise _Damaged(f"its record cannot be read ({_first_line(error)})") from error
        if not intact or record["step"] != step:
            raise _Damaged("its record was changed" if not intact else f"it is the checkpoint of step {record['step']}")
        if record["format"] != FORMAT:
            raise StorageError(
                f"checkpoint {step} in {self.directory} has format {record['format']} and this jaxrlhf reads {FORMAT}; "
                "use the version that wrote it (run.json names it)"
            )
        return record

    def _metric(self, step: int) -> float | None:
        if step not in self._metrics:
            try:
                self._metrics[step] = self._record(step)["metric"]
            except (_Damaged, StorageError):
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
        self._problem = f"checkpoint {step} was not saved in {self.directory}: {_first_line(error)}"
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
                doomed = (
                    self.directory / f"{step}{TEMPORARY}"
                )  # a half-deleted checkpoint must not look like a whole one
                os.rename(self.directory / str(step), doomed)
                shutil.rmtree(doomed, ignore_errors=True)

    def _set_aside(self, step: int, reason: str) -> None:
        target = self.directory / f"{CORRUPT}{step}-{time.strftime('%Y%m%dT%H%M%S')}"
        _log.warning("checkpoint %d is damaged: %s. Set aside as %s", step, reason, target.name)
        os.rename(self.directory / str(step), target)
        self._metrics.pop(step, None)
        with contextlib.suppress(OSError):
            (target / "reason.txt").write_text(reason + "\n")


@cache
def _orbax() -> tuple[Any, Any]:
    """Orbax's v1 API and the context our calls run in: JSON is plain JSON, arrays are arrays, and the log is silent."""
    from absl import logging as absl_logging
    from orbax.checkpoint import v1 as ocp

    absl_logging.set_verbosity(absl_logging.FATAL)
    # A failed read or write reaches us as an exception. Its sister tasks then report themselves once more, to the log
    # of asyncio, as warnings or, when their event loop is gone, as exceptions that nobody can catch.
    warnings.filterwarnings("ignore", "coroutine 'Store", RuntimeWarning)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    hook, echoes = sys.unraisablehook, ("Event loop is closed", "Encountered error while reading array")
    sys.unraisablehook = lambda it: None if str(it.exc_value).startswith(echoes) else hook(it)
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return ocp, context


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharding.shard_shape(leaf.shape)  # a mesh that does not divide the shape is no fault of the checkpoint: raise here
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _root(error: BaseException) -> BaseException:
    """What went wrong first: orbax wraps the cause in errors about its own handlers."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return error


def _is_shortage(error: Exception) -> bool:
    """Errors that say nothing about the checkpoint: memory, permissions, open files."""
    cause = _root(error)
    words = ("RESOURCE_EXHAUSTED", "PERMISSION_DENIED", "Permission denied", "Too many open files")
    return isinstance(cause, MemoryError | PermissionError) or any(word in str(cause) for word in words)


def _reason(path: Path) -> str:
    try:
        return (path / "reason.txt").read_text().strip()
    except OSError:
        return "damaged"


def _first_line(error: Exception) -> str:
    cause = _root(error)
    text = str(cause).strip(" \n\"'") or type(cause).__name__
    line = text.splitlines()[0]
    return line if len(line) <= 240 else f"{line[:100]} ... {line[-140:]}"

"""Writing and reading one checkpoint with Orbax, verified when it is read. The only module that imports orbax.

A checkpoint is a folder named after its step. Orbax writes it under a temporary name and renames it, so a killed
process leaves a complete checkpoint or a temporary folder that is never read. Orbax does not checksum array data;
therefore a JSON record with a digest of every leaf is stored beside the arrays, with a SHA-256 of the record itself.

Leaves are stored flat under their path ("params.policy.layers.mlp.up.kernel"), so that a checkpoint depends on neither
container classes nor shardings.
"""

import concurrent.futures.thread
import functools
import json
import logging
import sys
import threading
import warnings
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxrlhf import distributed, errors
from jaxrlhf.checkpoint.digest import check_leaves, digests, first_few, leaves_by_name, path_name, shape_of, with_seal
from jaxrlhf.errors import DamagedCheckpoint, StorageError, first_line, quoted
from jaxrlhf.files import read_regular, write_whole
from jaxrlhf.types import set_leaf

State = TypeVar("State")
FORMAT = 1
RECORD = "record/data.json"
TEMPORARY = ".orbax-checkpoint-tmp"
"""Suffix of folders that are being written or deleted."""


def make_record(step: int, leaves: dict[str, jax.Array], extra: dict, metric: float | None) -> dict[str, Any]:
    """Sealed record of a checkpoint, with a digest of every leaf. `extra` must be JSON."""
    return with_seal({"format": FORMAT, "step": step, "metric": metric, "extra": extra, "leaves": digests(leaves)})


def write_checkpoint(directory: Path, leaves: dict[str, jax.Array], record: dict[str, Any]) -> Any:
    """Start writing a checkpoint in the background. `.result()` of the return value waits, and raises if it failed.

    Of a write that fails Orbax leaves threads which wait for each other for ten minutes. They are daemons, for which a
    process does not wait when it ends, because the thread that starts them is one.
    """
    ocp, context = _orbax()
    started: concurrent.futures.Future[Any] = concurrent.futures.Future()

    def start() -> None:
        try:
            with context:
                path = directory / str(record["step"])
                started.set_result(ocp.save_checkpointables_async(path, {"state": leaves, "record": record}))
        except BaseException as error:
            started.set_exception(error)

    try:
        threading.Thread(target=start, daemon=True).start()
    except RuntimeError as error:  # there can be no more threads
        started.set_exception(error)
    distributed.wait_together(started.result)
    return started.result()


def release_threads() -> None:
    """After a write that failed: let this process end without the threads of Orbax that wait for another process."""
    queues: Any = getattr(concurrent.futures.thread, "_threads_queues", {})  # Python joins these threads, daemons too
    for thread in list(queues):
        if thread.daemon:
            queues.pop(thread, None)


def read_checkpoint(directory: Path, step: int, template: State, partial: bool = False) -> tuple[State, dict]:
    """Read (state, extra) of a checkpoint, with the structure, shapes and shardings of `template`.

    With `partial`, leaves that the template lacks are skipped. Each process reads the shards of its own devices.

    Raises:
        DamagedCheckpoint: it cannot be read or differs from what was written.
        StorageError: it belongs to another model or optimizer, or has the format of another version.
    """
    record = distributed.on_primary(lambda: read_record(directory, step))
    expected = leaves_by_name(template)
    stored = {name: digest for name, digest in record["leaves"].items() if name in expected or not partial}
    check_leaves(f"checkpoint {step} in {directory}", stored, expected)
    abstract = {name: _abstract(leaf) for name, leaf in expected.items()}
    ocp, context = _orbax()
    context = ocp.Context(context)
    context.pytree.loading.partial_load = partial
    loaded: dict[str, jax.Array] = {}

    def load() -> None:
        try:
            with context:
                loaded.update(ocp.load_checkpointables(directory / str(step), {"state": abstract})["state"])
        except Exception as error:
            if _is_shortage(error):
                raise
            raise DamagedCheckpoint(f"orbax cannot read it ({reason(error)})") from error

    distributed.shared(load)
    wrong = [name for name, digest in digests(loaded).items() if record["leaves"][name] != digest]
    if wrong:
        raise DamagedCheckpoint(f"the data of {first_few(wrong)} does not match the recorded digest")
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    full = [loaded[path_name(path)] if leaf.size else _empty(leaf) for path, leaf in leaves]
    return jax.tree.unflatten(structure, full), record["extra"]


def _empty(leaf: Any) -> jax.Array:
    return jnp.zeros(leaf.shape, leaf.dtype, device=leaf.sharding)


def stored_shapes(directory: Path, step: int, branch: str) -> dict[str, Any]:
    """Nested dicts of ShapeDtypeStructs of the leaves under "<branch>.", with `branch` as the first key.

    Raises as `read_checkpoint` does.
    """
    tree: dict[str, Any] = {}
    for name, digest in distributed.on_primary(lambda: read_record(directory, step))["leaves"].items():
        if name.startswith(f"{branch}."):
            set_leaf(tree, tuple(name.split(".")), shape_of(digest))
    return tree


def verify(directory: Path, step: int) -> str:
    """Read a checkpoint of any model and compare every array with its digest. Returns a sentence on what was compared.

    Raises as `read_checkpoint` does.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    template: dict[str, Any] = {}
    for name, digest in read_record(directory, step)["leaves"].items():
        stored = shape_of(digest)
        set_leaf(template, tuple(name.split(".")), jax.ShapeDtypeStruct(stored.shape, stored.dtype, sharding=device))
    state, _ = read_checkpoint(directory, step, template)
    leaves = jax.tree.leaves(state)
    return f"{len(leaves)} arrays, {sum(leaf.nbytes for leaf in leaves):,} bytes, as they were written"


def read_record(directory: Path, step: int) -> dict[str, Any]:
    """Read the record of a checkpoint: `metric`, `extra`, and `leaves` (digests). Raises as `read_checkpoint` does."""
    try:
        record = json.loads(read_regular(directory / str(step) / RECORD))
        intact = record["seal"] == with_seal(record)["seal"]
        written, version = record["step"], record["format"]
    except PermissionError as error:
        raise StorageError(f"checkpoint {step} in {directory} may not be read: {error}") from error
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DamagedCheckpoint(f"its record cannot be read ({reason(error)})") from error
    if not intact:
        raise DamagedCheckpoint("its record was changed")
    if written != step:
        raise DamagedCheckpoint(f"it is the checkpoint of step {quoted(written)}")
    if version != FORMAT:
        raise StorageError(
            f"checkpoint {step} in {directory} has format {quoted(version)}, but this version of jaxrlhf reads format "
            f"{FORMAT}; use the version that wrote it (see run.json)"
        )
    try:  # a seal keeps accidents out, not forgers
        leaves: dict[str, Any] = {}
        for name, digest in record["leaves"].items():
            typed_key = ":key<" in digest  # no dtype of NumPy
            set_leaf(leaves, tuple(name.split(".")), None if typed_key else shape_of(digest))
        if not isinstance(record["metric"], float | int | None) or not isinstance(record["extra"], dict):
            raise TypeError("metric and extra must be a number and an object")
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise DamagedCheckpoint(f"its record does not describe a checkpoint ({reason(error)})") from error
    return record


def update_record(directory: Path, step: int, extra: dict, metric: float | None) -> float | None:
    """Write `extra`, and `metric` if it has none, into the record of a checkpoint, in one atomic replacement; returns
    its metric. Raises as `read_record` does, and StorageError if it cannot be written."""
    old = read_record(directory, step)
    new = with_seal(old | {"extra": extra, "metric": metric if old["metric"] is None else old["metric"]})
    if new != old:
        write_whole(directory / str(step) / RECORD, json.dumps(new))
    return new["metric"]


def reason(error: BaseException) -> str:
    """Root cause of an error, in one line, without the dot at its end."""
    return first_line(_root(error)).removesuffix(".")


@functools.cache
def _orbax() -> tuple[Any, Any]:
    """Orbax's v1 API and the context for our calls: records are plain JSON, and Orbax does not log."""
    from absl import logging as absl_logging
    from orbax.checkpoint import v1 as ocp

    absl_logging.set_verbosity(absl_logging.FATAL)
    # We get a failed read or write as an exception. Orbax's parallel tasks report it again: in asyncio's log, as
    # warnings, or, if their event loop has been closed, as exceptions that cannot be caught.
    warnings.filterwarnings("ignore", "coroutine '(Store|Orbax|Json|_create_paths)", RuntimeWarning)
    logging.getLogger("asyncio").addFilter(lambda record: "orbax" not in record.getMessage())
    hook, ignored = sys.unraisablehook, ("Event loop is closed", "Encountered error while reading array")
    sys.unraisablehook = lambda args: None if str(args.exc_value).startswith(ignored) else hook(args)
    registry = ocp.handlers.local_registry()
    registry.add(ocp.handlers.JsonHandler, checkpointable_name="record")
    context = ocp.Context()
    context.checkpointables.registry = registry
    return ocp, context


def _abstract(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = leaf.sharding or jax.sharding.SingleDeviceSharding(jax.devices()[0])
    sharding.shard_shape(leaf.shape)  # raises here if the mesh does not divide the shape
    return jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding)


def _root(error: BaseException) -> BaseException:
    """Original cause: orbax wraps it in errors of its handlers."""
    while cause := error.__cause__ or (None if error.__suppress_context__ else error.__context__):
        error = cause
    return error


def _is_shortage(error: Exception) -> bool:
    """True for errors unrelated to the content of a checkpoint: memory, permissions, open files."""
    cause = _root(error)
    messages = ("PERMISSION_DENIED", "Permission denied", "Too many open files")
    if errors.is_shortage(cause) or isinstance(cause, PermissionError):
        return True
    return any(message in str(cause) for message in messages)

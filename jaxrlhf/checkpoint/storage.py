"""One checkpoint on disk, checked when it is read back. The only door to orbax.

A checkpoint is a folder named after its step. Orbax writes it under a temporary name and renames it, so a killed
process leaves either a whole checkpoint or a temporary folder that nobody reads. Orbax does not checksum array data, so
beside the arrays lies a JSON record with a digest of every leaf, sealed by a SHA-256 of the record itself.

Leaves are stored flat, named by their path ("params.policy.layers.mlp.up.kernel"), so that a checkpoint depends on
neither container classes nor shardings.
"""

import functools
import json
import logging
import sys
import warnings
from pathlib import Path
from typing import Any, TypeVar

import jax
import jax.numpy as jnp

from jaxrlhf.checkpoint.digest import check_fit, described, digests, leaves_by_name, name, sealed, some
from jaxrlhf.errors import StorageError, first_line

State = TypeVar("State")
FORMAT = 1
TEMPORARY = ".orbax-checkpoint-tmp"
"""How names of what is not yet, or no longer, a checkpoint end."""


class Damaged(Exception):
    """A checkpoint that cannot be read or is not what was written."""


def describe(step: int, leaves: dict[str, jax.Array], extra: dict, metric: float | None) -> dict[str, Any]:
    """The record of a checkpoint, with a digest of every leaf. `extra` must be JSON."""
    return sealed({"format": FORMAT, "step": step, "metric": metric, "extra": extra, "leaves": digests(leaves)})


def write(directory: Path, leaves: dict[str, jax.Array], record: dict[str, Any]) -> Any:
    """Begin to write a checkpoint; `.result()` of what is returned waits for its commit, or raises what went wrong."""
    ocp, context = _orbax()
    with context:
        path = directory / str(record["step"])
        return ocp.save_checkpointables_async(path, {"state": leaves, "record": record})


def read(directory: Path, step: int, template: State, part: bool = False) -> tuple[State, dict]:
    """(state, extra) of a checkpoint, shaped and placed as `template` says; with `part`, of the leaves it has alone.

    Raises:
        Damaged: it cannot be read or is not what was written.
        StorageError: it is of another model or optimizer, or of another version's format.
    """
    stored = record(directory, step)
    wanted = leaves_by_name(template)
    saved = {path: digest for path, digest in stored["leaves"].items() if path in wanted or not part}
    check_fit(f"checkpoint {step} in {directory}", saved, wanted)
    abstract = {path: _abstract(leaf) for path, leaf in wanted.items()}
    ocp, context = _orbax()
    context = ocp.Context(context)
    context.pytree.loading.partial_load = part
    try:
        with context:
            loaded = ocp.load_checkpointables(directory / str(step), {"state": abstract})["state"]
    except Exception as error:
        if _is_shortage(error):
            raise
        raise Damaged(f"orbax cannot read it ({reason(error)})") from error
    wrong = [path for path, digest in digests(loaded).items() if stored["leaves"][path] != digest]
    if wrong:
        raise Damaged(f"the bits of {some(wrong)} are not those that were saved")
    leaves, structure = jax.tree_util.tree_flatten_with_path(template)
    full = [loaded[name(path)] if leaf.size else jnp.zeros(leaf.shape, leaf.dtype) for path, leaf in leaves]
    return jax.tree.unflatten(structure, full), stored["extra"]


def outline(directory: Path, step: int, branch: str) -> dict[str, Any]:
    """What a checkpoint holds under "branch.": nested dicts of ShapeDtypeStructs. Raises as `read` does."""
    tree: dict[str, Any] = {}
    for path, digest in record(directory, step)["leaves"].items():
        if path.startswith(f"{branch}."):
            *parents, last = path.split(".")
            inner = functools.reduce(lambda found, key: found.setdefault(key, {}), parents, tree)
            inner[last] = described(digest)
    return tree


def record(directory: Path, step: int) -> dict[str, Any]:
    """What a checkpoint says about itself: `metric`, `extra`, and `leaves`, their digests. Raises as `read` does."""
    try:
        stored = json.loads((directory / str(step) / "record" / "data.json").read_bytes())
        intact = stored["seal"] == sealed(stored)["seal"]
    except PermissionError as error:
        raise StorageError(f"checkpoint {step} in {directory} may not be read: {error}") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise Damaged(f"its record cannot be read ({reason(error)})") from error
    if not intact or stored["step"] != step:
        raise Damaged("its record was changed" if not intact else f"it is the checkpoint of step {stored['step']}")
    if stored["format"] != FORMAT:
        raise StorageError(
            f"checkpoint {step} in {directory} has format {stored['format']} and this jaxrlhf reads {FORMAT}; "
            "use the version that wrote it (run.json names it)"
        )
    return stored


def reason(error: BaseException) -> str:
    """What went wrong, in a line."""
    return first_line(_root(error))


@functools.cache
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

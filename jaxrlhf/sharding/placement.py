"""Arrays put on the devices of a mesh, fetched from them, and moved between device and host memory."""

import math
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxrlhf.errors import ConfigError
from jaxrlhf.sharding.mesh import ROW_AXES
from jaxrlhf.sharding.rules import with_shardings

ROWS = P(ROW_AXES)
HOST = "pinned_host"  # memory kind for offloading: host memory that devices can access


def put_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Put arrays on the devices, their leading axis (rows) split over `replica`, `data` and `fsdp`."""
    return _put(tree, NamedSharding(mesh, ROWS))


def rows_shape(array: Any, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """ShapeDtypeStruct of the result of `put_rows` for this array."""
    return with_shardings(array, NamedSharding(mesh, ROWS))


def put_whole(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Put arrays on the devices, replicated."""
    return _put(tree, NamedSharding(mesh, P()))


def _put(tree: Any, to: NamedSharding) -> Any:
    """Arrays with this sharding; on a mesh that is not here, their shapes."""
    if next(iter(to.device_set)) in jax.devices():
        return place(tree, jax.tree.map(lambda _: to, tree))
    return jax.tree.map(lambda x: with_shardings(x, to), tree)


def place(tree: Any, shardings: Any) -> Any:
    """Put arrays on the devices of their shardings. On a mesh of several processes each has the whole array, or at
    least the rows of its own devices, and puts those; an array that is on the mesh already is resharded there."""

    def put(x: Any, to: jax.sharding.Sharding) -> Array:
        if to.is_fully_addressable:
            return jax.device_put(x, to)
        if isinstance(x, Array) and not x.is_fully_addressable:
            return x if x.sharding == to else _reshard(x, to)
        host = np.asarray(x)
        return jax.make_array_from_callback(host.shape, to, lambda index: host[index])

    return jax.tree.map(put, tree, shardings)


def fetch(tree: Any) -> Any:
    """NumPy arrays of a tree of arrays, whole in every process: a collective where processes have other rows."""

    def whole(x: Any) -> Any:
        if isinstance(x, Array) and not x.is_fully_addressable and not x.is_fully_replicated:
            return multihost_utils.process_allgather(x, tiled=True)
        return x

    return jax.device_get(jax.tree.map(whole, tree))


@partial(jax.jit, static_argnames="to")
def _reshard(x: Array, to: jax.sharding.Sharding) -> Array:
    return jax.lax.with_sharding_constraint(x, to)


def to_host(tree: Any) -> Any:
    """Move arrays to host memory, with the same sharding. Arrays that were on the devices are deleted.

    ShapeDtypeStructs (with shardings) become ShapeDtypeStructs in host memory.
    """
    moved = _with_memory_kind(tree, HOST)
    for old, new in zip(jax.tree.leaves(tree), jax.tree.leaves(moved), strict=True):
        if new is not old and isinstance(old, Array):
            old.delete()
    return moved


def to_device(tree: Any) -> Any:
    """Copy arrays to device memory, with the same sharding. Arrays that are there already are returned as they are.

    ShapeDtypeStructs (with shardings) become ShapeDtypeStructs in device memory.
    """
    return _with_memory_kind(tree, None)


def _with_memory_kind(tree: Any, kind: str | None) -> Any:
    """Move arrays to another memory; None: the default memory of their devices."""

    def move(x: Any) -> Any:
        goal = kind or _default_memory(x.sharding)
        if x.sharding.memory_kind == goal:
            return x
        target = x.sharding.with_memory_kind(goal)
        return jax.device_put(x, target) if isinstance(x, Array) else with_shardings(x, target)

    return jax.tree.map(move, tree)


def _default_memory(sharding: jax.sharding.Sharding) -> str:
    device = next(iter(sharding.device_set))
    return device.default_memory().kind if device in jax.devices() else "device"  # a topology of GPUs has none


def check_host_memory(mesh: jax.sharding.Mesh, what: str) -> None:
    """Raise ConfigError if the backend cannot offload arrays to host memory. `what` is the config key."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ConfigError(
            f"{what} is true, but jax's {device.platform} backend ({device.device_kind}) has no memory of kind {HOST}, "
            f"only {', '.join(kinds)}: it cannot offload to host memory. Set it to false; docs/memory.md lists other "
            "ways to save memory"
        )


def element_indices(shape: tuple[int, ...], first: ArrayLike = 0) -> Array:
    """Row-major index of every element, plus `first`, modulo 2^32: uint32 of `shape`, the same on any mesh.

    The sum starts with `first`, so that XLA does not hoist the whole array out of a loop in which `first` changes.
    """
    indices = jnp.full(shape, first, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        indices += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return indices

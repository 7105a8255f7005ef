"""Device mesh and sharding rules: one table from parameter path to PartitionSpec.

The mesh has three axes. Rows of a batch are split over `data` and `fsdp`; parameters over `fsdp` (each device keeps a
shard and gathers when needed) and `tensor` (each device computes its share of heads, mlp columns and vocabulary).
Gradients and Adam's moments are sharded like their parameters, because their paths end in the parameter's path.
"""

import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxrlhf import config
from jaxrlhf.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))
HOST = "pinned_host"  # memory kind for offloading: host memory that devices can access

# By the end of the path; a leading None is the stacked layer axis. A packed kernel (models/packed.py) is sharded like
# the kernel itself. Other arrays are replicated: norms, other biases, scalar heads, counters.
RULES: tuple[tuple[str, P], ...] = (
    (r"embed/embedding", P("tensor", "fsdp")),
    (r"positions/embedding", P(None, "fsdp")),
    (r"attention/[qkv]/(kernel|codes|scale|step)", P(None, "fsdp", "tensor")),
    (r"attention/[qkv]/bias", P(None, "tensor")),
    (r"attention/o/(kernel|codes|scale|step)", P(None, "tensor", "fsdp")),
    (r"mlp/(gate|up)/(kernel|codes|scale|step)", P(None, "fsdp", "tensor")),
    (r"mlp/(gate|up)/bias", P(None, "tensor")),
    (r"mlp/down/(kernel|codes|scale|step)", P(None, "tensor", "fsdp")),
    (r"lm_head/kernel", P("fsdp", "tensor")),
)


def make_mesh(shape: config.Mesh) -> jax.sharding.Mesh:
    """Create the mesh of a run from the first data * fsdp * tensor devices. `data: 0` uses all devices.

    Raises ConfigError if there are fewer devices, or if `data: 0` leaves a remainder.
    """
    devices = jax.devices()
    inner = shape.fsdp * shape.tensor
    data = shape.data or len(devices) // inner
    total = data * inner
    if not 0 < total <= len(devices) or (shape.data == 0 and total != len(devices)):
        raise ConfigError(
            f"mesh: data {shape.data} x fsdp {shape.fsdp} x tensor {shape.tensor} does not fit "
            f"{len(devices)} {devices[0].platform} device(s); to simulate more on a CPU, set "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N"
        )
    grid = np.asarray(devices[:total]).reshape(data, shape.fsdp, shape.tensor)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """PartitionSpec of one array. A dimension that the size of its mesh axis does not divide is replicated.

    Axes of size 1 and trailing Nones are left out, as in XLA's own output shardings: the shardings of an update's
    output and input must compare equal, or every function that takes the state compiles twice.
    """
    rule = next((spec for pattern, spec in RULES if re.search(f"(^|/){pattern}$", path)), P())
    if len(rule) > len(shape):
        return P()
    axes = [a if a and mesh.shape[a] > 1 and shape[d] % mesh.shape[a] == 0 else None for d, a in enumerate(rule)]
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


path_of = partial(jax.tree_util.keystr, simple=True, separator="/")
"""Format a pytree path as 'policy/layers/attention/q/kernel'."""


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """NamedShardings for a tree of arrays or ShapeDtypeStructs: params, optimizer state or a whole TrainState."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(mesh, spec(path_of(keys), leaf.shape, mesh)), tree
    )


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """ShapeDtypeStructs of the shapes and dtypes of one tree with the shardings of another."""
    return jax.tree.map(lambda x, to: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=to), shapes, shardings)


def constrain(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Constrain a state to the rule table, inside jit, so that an update returns the shardings it was given."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def element_indices(shape: tuple[int, ...], first: ArrayLike = 0) -> Array:
    """Row-major index of every element, plus `first`, modulo 2^32: uint32 of `shape`, the same on any mesh.

    The sum starts with `first`, so that XLA does not hoist the whole array out of a loop in which `first` changes.
    """
    indices = jnp.full(shape, first, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        indices += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return indices


def put_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Put arrays on the devices, their leading axis (rows) split over `data` and `fsdp`."""
    return jax.device_put(tree, NamedSharding(mesh, ROWS))


def rows_shape(array: Any, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """ShapeDtypeStruct of the result of `put_rows` for this array."""
    return with_shardings(array, NamedSharding(mesh, ROWS))


def put_whole(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Put arrays on the devices, replicated."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


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
    return _with_memory_kind(tree, jax.local_devices()[0].default_memory().kind)


def _with_memory_kind(tree: Any, kind: str) -> Any:
    def move(x: Any) -> Any:
        if x.sharding.memory_kind == kind:
            return x
        target = x.sharding.with_memory_kind(kind)
        return jax.device_put(x, target) if isinstance(x, Array) else with_shardings(x, target)

    return jax.tree.map(move, tree)


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


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of shards of a batch: data x fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(rows: int, mesh: jax.sharding.Mesh, what: str) -> None:
    """Raise ConfigError if the mesh cannot split a batch evenly. `what` is the config key to change."""
    shards = row_shards(mesh)
    if rows % shards:
        raise ConfigError(f"{what} ({rows}) must be a multiple of mesh.data x mesh.fsdp ({shards})")

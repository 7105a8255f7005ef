"""Where arrays live: one mesh, one table from parameter path to PartitionSpec.

The mesh has three axes. Rows of a batch are split over `data` and `fsdp`; parameters over `fsdp` (each device keeps a
slice and gathers when needed) and `tensor` (each device works on its share of heads, mlp columns and vocabulary).
Gradients and Adam's moments follow their parameters, because their paths end in the parameter's path.
"""

import math
import re
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
HOST = "pinned_host"  # memory of the host that devices copy to and from by themselves

# First match wins; a leading None is the stacked layer axis. What a packed kernel is made of (models/packed.py) lies as
# the kernel would.
RULES: tuple[tuple[str, P], ...] = (
    (r"(^|/)embed/embedding$", P("tensor", "fsdp")),
    (r"(^|/)positions/embedding$", P(None, "fsdp")),
    (r"(^|/)attention/[qkv]/(kernel|codes|scale|step)$", P(None, "fsdp", "tensor")),
    (r"(^|/)attention/[qkv]/bias$", P(None, "tensor")),
    (r"(^|/)attention/o/(kernel|codes|scale|step)$", P(None, "tensor", "fsdp")),
    (r"(^|/)mlp/(gate|up)/(kernel|codes|scale|step)$", P(None, "fsdp", "tensor")),
    (r"(^|/)mlp/(gate|up)/bias$", P(None, "tensor")),
    (r"(^|/)mlp/down/(kernel|codes|scale|step)$", P(None, "tensor", "fsdp")),
    (r"(^|/)lm_head/kernel$", P("fsdp", "tensor")),
    (r"", P()),  # norms, the remaining biases, scalar heads, counters: everywhere
)


def make_mesh(shape: config.Mesh) -> jax.sharding.Mesh:
    """The mesh of a run over the first data * fsdp * tensor devices.

    Raises ConfigError when there are fewer devices, or when `data: 0` leaves a remainder.
    """
    devices = jax.devices()
    inner = shape.fsdp * shape.tensor
    data = shape.data or len(devices) // inner
    total = data * inner
    if not 0 < total <= len(devices) or (shape.data == 0 and total != len(devices)):
        raise ConfigError(
            f"mesh: data {shape.data} x fsdp {shape.fsdp} x tensor {shape.tensor} does not fit "
            f"{len(devices)} {devices[0].platform} device(s); on a CPU more can be had with "
            "XLA_FLAGS=--xla_force_host_platform_device_count=N"
        )
    grid = np.asarray(devices[:total]).reshape(data, shape.fsdp, shape.tensor)
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def spec(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """The PartitionSpec of one array; a dimension that its axis does not divide is left whole.

    Axes of size 1 and trailing Nones are left out, as XLA does: an update's output must compare equal to its input, or
    everything that takes it compiles twice.
    """
    rule = next(spec for pattern, spec in RULES if re.search(pattern, path))
    if len(rule) > len(shape):
        return P()
    axes = [a if a and mesh.shape[a] > 1 and shape[d] % mesh.shape[a] == 0 else None for d, a in enumerate(rule)]
    while axes and axes[-1] is None:
        axes.pop()
    return P(*axes)


def path_of(keys: tuple[Any, ...]) -> str:
    """A pytree path as 'policy/layers/attention/q/kernel'."""
    return "/".join(str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in keys)


def shardings(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """A tree of NamedShardings for a tree of arrays or shape structs: params, optimizer state or a whole TrainState."""
    return jax.tree_util.tree_map_with_path(
        lambda keys, leaf: NamedSharding(mesh, spec(path_of(keys), leaf.shape, mesh)), tree
    )


def with_shardings(shapes: Any, places: Any) -> Any:
    """Shape structs with these shardings: what stands for arrays before there are any."""
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def constrain(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Inside jit: hold a state to the rule table, so that what an update returns lies where it was given."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def element_indices(shape: tuple[int, ...], first: ArrayLike = 0) -> Array:
    """The number of every element in row-major order, counted from `first` modulo 2^32: uint32 of `shape`, the same on
    any mesh. Made where it is used: it begins with `first`, and what depends on that is not moved out of a loop."""
    numbers = jnp.full(shape, first, jnp.uint32)
    for axis in range(len(shape)):
        stride = np.uint32(math.prod(shape[axis + 1 :]) % 2**32)
        numbers += jax.lax.broadcasted_iota(jnp.uint32, shape, axis) * stride
    return numbers


def put_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Host arrays with a leading row axis, split over the devices that share a batch."""
    return jax.device_put(tree, NamedSharding(mesh, ROWS))


def rows_shape(array: Any, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """What `put_rows` would give for an array like this one."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, ROWS))


def put_whole(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Host arrays, the same on every device."""
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


def abstract(tree: Any) -> Any:
    """ShapeDtypeStructs with the shapes, dtypes and shardings of the arrays of `tree`."""
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def check_host_memory(mesh: jax.sharding.Mesh, what: str) -> None:
    """Refuse to keep arrays in memory of the host where devices do not reach it; `what` is the config key."""
    device = mesh.devices.flat[0]
    kinds = [memory.kind for memory in device.addressable_memories()]
    if HOST not in kinds:
        raise ConfigError(
            f"{what} is true, but jax's {device.platform} backend ({device.device_kind}) has no memory of kind {HOST}, "
            f"only {', '.join(kinds)}: there is nowhere to keep it. Leave it false; docs/memory.md has what else "
            "saves memory"
        )


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """The number of shards that the rows of a batch are split into: data x fsdp."""
    return mesh.shape["data"] * mesh.shape["fsdp"]


def check_rows(rows: int, mesh: jax.sharding.Mesh, what: str) -> None:
    """Refuse a batch that the mesh cannot split evenly; `what` is the config key to change."""
    shares = row_shards(mesh)
    if rows % shares:
        raise ConfigError(f"{what} ({rows}) must be a multiple of mesh.data x mesh.fsdp ({shares})")

"""Device mesh and sharding rules: one table from parameter path to PartitionSpec.

The mesh has four axes. Rows of a batch are split over `replica`, `data` and `fsdp`; parameters over `fsdp` (each device
keeps a shard and gathers when needed) and `tensor` (each device computes its share of heads, mlp columns and
vocabulary). `replica` differs from `data` only in where its devices are: across hosts or slices of a TPU. Gradients and
Adam's moments are sharded like their parameters, because their paths end in the parameter's path.
"""

import contextlib
import math
import re
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.experimental import mesh_utils, multihost_utils
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from jaxrlhf import config
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig

AXES = ("replica", "data", "fsdp", "tensor")
ROW_AXES = ("replica", "data", "fsdp")
ROWS = P(ROW_AXES)
Platform = Literal["cpu", "gpu", "tpu"]
HOST = "pinned_host"  # memory kind for offloading: host memory that devices can access

BOTH = ("tensor", "fsdp")  # in this order, a gather over fsdp leaves the share of a tensor device

# By the end of the path; a leading None is the stacked layer axis. A packed kernel (models/packed.py) is sharded like
# the kernel itself. Of several specs the one with the most shards is used: a vocabulary is often indivisible. Other
# arrays are small and replicated: norms, other biases, linear scalar heads, counters.
RULES: tuple[tuple[str, tuple[P, ...]], ...] = (
    (r"lora/rows/embedding", (P(None, BOTH),)),
    (r"lora/rows/kernel", (P(BOTH),)),
    (r"embed/embedding", (P("tensor", "fsdp"), P(None, BOTH))),
    (r"positions/embedding", (P(None, BOTH),)),
    (r"attention/[qkv]/(kernel|codes|scale|step)", (P(None, "fsdp", "tensor"),)),
    (r"attention/[qkv]/bias", (P(None, "tensor"),)),
    (r"attention/o/(kernel|codes|scale|step)", (P(None, "tensor", "fsdp"),)),
    (r"delta/(qkv|z|beta|decay)/(kernel|codes|scale|step)", (P(None, "fsdp", "tensor"),)),
    (r"delta/conv/taps", (P(None, BOTH),)),
    (r"delta/o/(kernel|codes|scale|step)", (P(None, "tensor", "fsdp"),)),
    (r"mlp/(gate|up)/(kernel|codes|scale|step)", (P(None, "fsdp", "tensor"),)),
    (r"mlp/(gate|up)/bias", (P(None, "tensor"),)),
    (r"mlp/down/(kernel|codes|scale|step)", (P(None, "tensor", "fsdp"),)),
    (r"experts/router/kernel", (P(None, "fsdp"),)),
    (
        r"experts/(gate|up)/(kernel|codes|scale|step)",
        (P(None, "fsdp", None, "tensor"), P(None, None, "fsdp", "tensor")),
    ),
    (r"experts/down/(kernel|codes|scale|step)", (P(None, "fsdp", "tensor"), P(None, None, "tensor", "fsdp"))),
    (r"lora/layers/experts/(gate|up)/a", (P(None, BOTH), P(None, None, BOTH))),
    (r"lora/layers/experts/(gate|up)/b", (P(None, "fsdp", None, "tensor"), P(None, None, None, BOTH))),
    (r"lora/layers/experts/down/a", (P(None, "fsdp", "tensor"), P(None, None, BOTH))),
    (r"lora/layers/experts/down/b", (P(None, BOTH), P(None, None, None, BOTH))),
    (r"lora/layers/.*/a", (P(None, BOTH),)),
    (r"lora/layers/.*/b", (P(None, None, BOTH),)),
    (r"lora/layers/.*/magnitude", (P(None, BOTH),)),
    (r"lm_head/kernel", (P("fsdp", "tensor"), P(BOTH))),
    (r"score/dense_\d/kernel", (P(BOTH),)),
    (r"replay/.*", (P(None, ROW_AXES),)),
)


_devices: ContextVar[Sequence[Any] | None] = ContextVar("devices", default=None)
_memory: ContextVar[int | None] = ContextVar("memory", default=None)


@contextlib.contextmanager
def on_devices(devices: Sequence[Any], memory: int | None = None) -> Iterator[None]:
    """While the block runs, meshes are made of these devices in place of jax's own: those of a topology, for which
    programs are compiled and which need not exist. `memory` is the bytes that each has, if known."""
    tokens = _devices.set(devices), _memory.set(memory)
    try:
        yield
    finally:
        _devices.reset(tokens[0])
        _memory.reset(tokens[1])


def platform(mesh: jax.sharding.Mesh | None = None) -> Platform:
    """The platform of a mesh's devices; without a mesh that of jax's own."""
    name = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return name if name in ("cpu", "tpu") else "gpu"


def is_here(mesh: jax.sharding.Mesh) -> bool:
    """Return True for a mesh of jax's own devices, False for one of a topology, which can hold no arrays."""
    return mesh.devices.flat[0] in jax.devices()


def device_memory(mesh: jax.sharding.Mesh) -> int | None:
    """Bytes of memory of one device of the mesh, for a topology those that `on_devices` was given; None if not known,
    as on CPUs."""
    if not is_here(mesh):
        return _memory.get()
    return (mesh.local_devices[0].memory_stats() or {}).get("bytes_limit")


def mesh_sizes(shape: config.Mesh, devices: int) -> dict[str, int]:
    """The size of every axis of a mesh of at most this number of devices, that of -1 (or `data: 0`) inferred.

    Raises ConfigError if the mesh needs more devices, or if the other axes do not divide their number.
    """
    sizes = {axis: getattr(shape, axis) for axis in AXES}
    free = next((axis for axis, size in sizes.items() if size < 1), None)
    given = math.prod(size for axis, size in sizes.items() if axis != free)
    text = " x ".join(f"{axis} {size}" for axis, size in sizes.items())
    if free and devices % given:
        divisors = ", ".join(str(n) for n in range(1, devices + 1) if devices % n == 0)
        raise ConfigError(
            f"mesh: {text} does not fit {devices} devices: the axes beside {free} need {given}, which does not divide "
            f"them; use sizes with a product among {divisors}"
        )
    if not free and given > devices:
        raise ConfigError(
            f"mesh: {text} does not fit {devices} device{'s' * (devices > 1)}, it needs {given}; use smaller sizes, or "
            "-1 for one axis, which then takes the devices that the others leave"
        )
    return sizes | ({free: devices // given} if free else {})


def available() -> Sequence[Any]:
    """The devices that meshes are made of: jax's own, or those of `on_devices`."""
    return _devices.get() or jax.devices()


def make_mesh(shape: config.Mesh, devices: Sequence[Any] | None = None) -> jax.sharding.Mesh:
    """Create a mesh from the first of the devices (default: those `available`), as many as it needs. Raises ConfigError
    if it does not fit."""
    devices = available() if devices is None else devices
    try:
        sizes = mesh_sizes(shape, len(devices))
    except ConfigError as error:
        if devices[0].platform != "cpu":
            raise
        more = "to simulate more CPU devices, set XLA_FLAGS=--xla_force_host_platform_device_count=N"
        raise ConfigError(f"{error}; {more}") from None
    needed = math.prod(sizes.values())
    idle = {device.process_index for device in devices} - {device.process_index for device in devices[:needed]}
    if idle and _devices.get() is None:
        raise ConfigError(
            f"mesh: {' x '.join(f'{axis} {size}' for axis, size in sizes.items())} takes {needed} of the "
            f"{len(devices)} devices, and none of process {min(idle)}; a run on several processes uses devices of all "
            "of them: make the mesh larger (-1 for one axis takes them all), or start fewer processes"
        )
    grid = arrange(devices[:needed], tuple(sizes.values()), whole=needed == len(devices))
    return jax.sharding.Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def arrange(devices: Sequence[Any], sizes: tuple[int, ...], *, whole: bool = True) -> np.ndarray:
    """Devices as a grid of these sizes: outer axes across hosts and slices, inner ones along fast connections.

    CPUs and GPUs, which jax lists host by host, keep their order. TPUs are arranged along the torus of their slice,
    where they are all of it (`whole`), and slices along the outermost axes. Raises ConfigError if `tensor` would have
    to cross slices.
    """
    if devices[0].platform != "tpu" or not whole or not devices[0].coords:  # without: those of a planned target
        return np.asarray(devices).reshape(sizes)
    left = len({getattr(device, "slice_index", 0) for device in devices})  # that of one slice has none in a topology
    if left == 1:
        return mesh_utils.create_device_mesh(sizes, devices, allow_split_physical_axes=True)
    across = []
    for size in sizes[:-1]:
        across.append(math.gcd(size, left))
        left //= across[-1]
    if left > 1:
        slices = math.prod(across) * left
        raise ConfigError(
            f"mesh.tensor ({sizes[-1]}) would cross the {slices} TPU slices, whose connections are too slow for it; "
            f"set mesh.replica to {slices}"
        )
    across.append(1)
    within = [size // n for size, n in zip(sizes, across, strict=True)]
    return mesh_utils.create_hybrid_device_mesh(within, across, devices, allow_split_physical_axes=True)


def rule_of(path: str) -> tuple[str, tuple[P, ...]]:
    """The first rule that matches a path: its pattern and its specs; ("", ()) if there is none."""
    return next((rule for rule in RULES if re.search(f"(^|/){rule[0]}$", path)), ("", ()))


def spec(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """PartitionSpec of one array: that spec of its rule that makes the most shards, the first of equals.

    A dimension is not split over an axis whose size does not divide it. Axes of size 1 and trailing Nones are left out,
    as in XLA's own output shardings: the shardings of an update's output and input must compare equal, or every
    function that takes the state compiles twice.
    """
    found = [_divided(rule, shape, mesh) for rule in rule_of(path)[1] if len(rule) <= len(shape)]
    return max(found, key=lambda spec: math.prod(mesh.shape[axis] for axis in axes_of(spec)), default=P())


def axes_of(spec: P) -> list[str]:
    """The axes that a spec splits an array over."""
    return [axis for part in spec if part for axis in (part if isinstance(part, tuple) else (part,))]


def undivided(path: str, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> list[str]:
    """Dimensions that a rule would split and the mesh cannot: "dimension 1 (63) is not a multiple of tensor (4)"."""
    used = axes_of(spec(path, shape, mesh))
    return [
        f"dimension {dimension} ({size}) is not a multiple of {axis} ({mesh.shape[axis]})"
        for rule in rule_of(path)[1][:1]
        for dimension, (part, size) in enumerate(zip(rule, shape, strict=False))
        for axis in axes_of(P(part))
        if size > 1 and mesh.shape[axis] > 1 and axis not in used
    ]


def _divided(rule: P, shape: tuple[int, ...], mesh: jax.sharding.Mesh) -> P:
    """The spec without axes of size 1, and without those that do not divide their dimension."""
    parts = []
    for part, left in zip(rule, shape, strict=False):
        axes = []
        for axis in axes_of(P(part)):
            if mesh.shape[axis] > 1 and left % mesh.shape[axis] == 0:
                axes.append(axis)
                left //= mesh.shape[axis]
        parts.append(tuple(axes) if len(axes) > 1 else axes[0] if axes else None)
    while parts and parts[-1] is None:
        parts.pop()
    return P(*parts)


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


def row_shards(mesh: jax.sharding.Mesh) -> int:
    """Number of shards of a batch: replica x data x fsdp."""
    return math.prod(mesh.shape[axis] for axis in ROW_AXES)


def check_rows(rows: int, mesh: jax.sharding.Mesh, what: str) -> None:
    """Raise ConfigError if the mesh cannot split a batch evenly. `what` is the config key to change."""
    shards = row_shards(mesh)
    if rows % shards:
        raise ConfigError(f"{what} ({rows}) must be a multiple of mesh.replica x mesh.data x mesh.fsdp ({shards})")


def check_heads(model: ModelConfig, mesh: jax.sharding.Mesh, what: str) -> None:
    """Raise ConfigError if `tensor` cannot split the heads of a model, which `what` names."""
    tensor, heads = mesh.shape["tensor"], math.gcd(model.num_heads, model.num_kv_heads)
    if heads % tensor:
        sizes = ", ".join(str(n) for n in range(1, heads + 1) if heads % n == 0)
        raise ConfigError(
            f"mesh.tensor ({tensor}) must divide the {model.num_heads} attention heads and {model.num_kv_heads} "
            f"key-value heads of {what}: it can be {sizes}. More devices than that are for mesh.fsdp or mesh.data"
        )

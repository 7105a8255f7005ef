"""The device mesh: its axes, the devices that it is made of, and what it can divide."""

import contextlib
import math
import os
from collections.abc import Iterator, Sequence
from contextvars import ContextVar
from typing import Any, Literal

import jax
import numpy as np
from jax.experimental import mesh_utils
from jax.sharding import AxisType

from jaxrlhf import config
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig

AXES = ("replica", "data", "fsdp", "tensor")
ROW_AXES = ("replica", "data", "fsdp")
Platform = Literal["cpu", "gpu", "tpu"]

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
    name = (_own() if mesh is None else mesh.devices.flat)[0].platform
    return name if name in ("cpu", "tpu") else "gpu"


def is_here(mesh: jax.sharding.Mesh | None = None) -> bool:
    """Return True for a mesh of jax's own devices, False for one of a topology, which can hold no arrays. Without a
    mesh: for one that would be made now."""
    devices = _devices.get() if mesh is None else mesh.devices.flat
    return devices is None or devices[0] in jax.devices()


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
    """The devices that meshes are made of: jax's own, or those of `on_devices`.

    Raises ConfigError if jax has none of the platform that JAX_PLATFORMS asks for.
    """
    return _devices.get() or _own()


def _own() -> Sequence[Any]:
    try:
        return jax.devices()
    except (RuntimeError, AssertionError) as error:  # the latter where jax has no plugin for the platform
        asked, reason = os.environ.get("JAX_PLATFORMS") or "not set", str(error) or "jax has no plugin for it"
        raise ConfigError(
            f"jax finds no device (JAX_PLATFORMS is {asked}: {reason}). Unset it to use "
            'what is here; a GPU needs its driver and `pip install "jaxrlhf[cuda]"`, a TPU "jaxrlhf[tpu]"'
        ) from error


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

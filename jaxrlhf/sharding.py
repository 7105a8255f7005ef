"""Where arrays live: one mesh, one table from parameter path to PartitionSpec.

The mesh has three axes. Rows of a batch are split over `data` and `fsdp`; parameters over `fsdp` (each device keeps a
slice and gathers when needed) and `tensor` (each device works on its share of heads, mlp columns and vocabulary).
Gradients and Adam's moments follow their parameters, because their paths end in the parameter's path.
"""

import re
from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf import config
from jaxrlhf.errors import ConfigError

AXES = ("data", "fsdp", "tensor")
ROWS = P(("data", "fsdp"))

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


def constrain(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Inside jit: hold a state to the rule table, so that what an update returns lies where it was given."""
    return jax.lax.with_sharding_constraint(tree, shardings(tree, mesh))


def put_rows(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Host arrays with a leading row axis, split over the devices that share a batch."""
    return jax.device_put(tree, NamedSharding(mesh, ROWS))


def rows_shape(array: Any, mesh: jax.sharding.Mesh) -> jax.ShapeDtypeStruct:
    """What `put_rows` would give for an array like this one."""
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=NamedSharding(mesh, ROWS))


def put_whole(tree: Any, mesh: jax.sharding.Mesh) -> Any:
    """Host arrays, the same on every device."""
    return jax.device_put(tree, NamedSharding(mesh, P()))


def check_rows(rows: int, mesh: jax.sharding.Mesh, what: str) -> None:
    """Refuse a batch that the mesh cannot split evenly; `what` is the config key to change."""
    shares = mesh.shape["data"] * mesh.shape["fsdp"]
    if rows % shares:
        raise ConfigError(f"{what} ({rows}) must be a multiple of mesh.data x mesh.fsdp ({shares})")

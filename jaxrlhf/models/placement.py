"""Layout of activations over the mesh of a model.

Without constraints XLA's partitioner may gather the rows of a batch to keep a weight where it is. With them rows stay
split over all axes of the mesh but `tensor`, heads and vocabulary over `tensor`, and weights are gathered over `fsdp`.
"""

import math
from typing import Literal

import jax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrlhf.models.config import ModelConfig

Over = Literal["rows", "fsdp", "tensor", "both", "free"]


def row_axes(mesh: Mesh) -> tuple[str, ...]:
    """Axes of the mesh over which the rows of a batch are split."""
    return tuple(axis for axis in mesh.axis_names if axis != "tensor")


def place(x: Array, model: ModelConfig, *dimensions: Over | None) -> Array:
    """`x` constrained to the mesh of `model`: each dimension split over an axis, over `tensor` and `fsdp` ("both"),
    over all axes of rows, or whole (None).

    "free" dimensions, and those that their axes do not divide, are left to the compiler. Without a mesh `x` is returned
    as it is.
    """
    mesh = model.mesh
    if mesh is None:
        return x
    spec = []
    for over, size in zip(dimensions, x.shape, strict=True):
        named = {"rows": row_axes(mesh), "fsdp": ("fsdp",), "tensor": ("tensor",), "both": ("tensor", "fsdp")}
        axes = named.get(over or "", ())
        divides = size % math.prod(mesh.shape[axis] for axis in axes) == 0
        spec.append((axes or None) if divides and over != "free" else P.UNCONSTRAINED)
    return jax.lax.with_sharding_constraint(x, NamedSharding(mesh, P(*spec)))

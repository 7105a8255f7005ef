"""Shapes in place of arrays: what `jaxrlhf plan` compiles programs for."""

from collections.abc import Callable
from typing import Any

import jax

from jaxrlhf import sharding


def is_abstract(tree: Any) -> bool:
    """Return True if the leaves of a tree are shapes, not arrays."""
    return any(isinstance(leaf, jax.ShapeDtypeStruct) for leaf in jax.tree.leaves(tree))


def build(make: Callable[..., Any], mesh: jax.sharding.Mesh, *args: Any) -> Any:
    """`make(*args)`; where the arguments are shapes, the shapes of the result with their shardings."""
    return abstract_call(make, mesh, *args) if is_abstract(args) else make(*args)


def abstract_call(make: Callable[..., Any], mesh: jax.sharding.Mesh, *args: Any) -> Any:
    """The shapes and shardings of `make(*args)`, where `args` are arrays or shapes.

    Identity is kept as with arrays: a leaf that is returned twice is one object, and so is an argument that is
    returned.
    """
    leaves, tree = jax.tree.flatten(args)
    by_id = {id(leaf): leaf for leaf in leaves}
    known: dict[int, Any] = {}
    tracers: list[int] = []

    def traced(inputs: dict[int, Any]) -> Any:
        known.update({id(tracer): by_id[name] for name, tracer in inputs.items()})
        result = make(*jax.tree.unflatten(tree, [inputs[id(leaf)] for leaf in leaves]))
        tracers.extend(id(leaf) for leaf in jax.tree.leaves(result))
        return result

    shapes = jax.eval_shape(traced, by_id)
    placed, structure = jax.tree.flatten(sharding.with_shardings(shapes, sharding.shardings(shapes, mesh)))
    return jax.tree.unflatten(structure, [known.setdefault(t, x) for t, x in zip(tracers, placed, strict=True)])

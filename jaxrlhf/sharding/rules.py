"""The rules of sharding: one table from parameter path to PartitionSpec."""

import math
import re
from functools import partial
from typing import Any

import jax
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf.sharding.mesh import ROW_AXES

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

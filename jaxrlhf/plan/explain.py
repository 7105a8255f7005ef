"""`jaxrlhf plan --explain`: how the arrays of a run are split over the devices of its mesh, and by which rule."""

import contextlib
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import jax
from jax.sharding import PartitionSpec as P

from jaxrlhf import sharding
from jaxrlhf.plan import topology
from jaxrlhf.plan.programs import Trainer, abstract_trainer
from jaxrlhf.plan.targets import Target
from jaxrlhf.training.distill.trainer import DistillTrainer
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.setup import RunConfig


@dataclass(frozen=True)
class Group:
    """Arrays of one part of a run that have the same rule, shape and spec; those without a rule are one group."""

    paths: tuple[str, ...]
    shape: tuple[int, ...]
    rule: str
    spec: P
    total: int  # bytes of all arrays
    local: int  # of those, bytes on each device
    whole: tuple[str, ...]  # dimensions that an axis of the rule does not divide

    @property
    def pattern(self) -> str:
        """The paths as one, with alternatives in braces."""
        if len({path.count("/") for path in self.paths}) > 1:
            return f"{len(self.paths)} arrays"
        parts = [sorted(set(names)) for names in zip(*(path.split("/") for path in self.paths), strict=True)]
        return "/".join(names[0] if len(names) == 1 else "{" + ",".join(names) + "}" for names in parts)


def groups(tree: Any, mesh: jax.sharding.Mesh, prefix: str = "") -> list[Group]:
    """The groups of a tree of arrays or shapes at `prefix`, in the order of their first arrays."""
    found: dict[Any, list[tuple[str, Any]]] = {}
    for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
        path = prefix + sharding.path_of(keys)
        rule = sharding.rule_of(path)[0]
        found.setdefault((rule, leaf.shape if rule else ()), []).append((path, leaf))
    made = []
    for (rule, shape), arrays in found.items():
        spec = sharding.spec(arrays[0][0], shape, mesh)
        shards = math.prod(mesh.shape[axis] for axis in sharding.axes_of(spec))
        total = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for _, leaf in arrays)
        paths = tuple(path.removeprefix(prefix) for path, _ in arrays)
        whole = tuple(sharding.undivided(arrays[0][0], shape, mesh))
        made.append(Group(paths, shape, rule, spec, total, total // shards, whole))
    return made


def parts(trainer: Trainer) -> Iterator[tuple[str, str, Any]]:
    """(name, prefix of the paths, tree) of everything that a run keeps on the mesh, each array once."""
    seen: set[int] = set()

    def new(tree: Any) -> Any:
        leaves, structure = jax.tree.flatten(tree)
        kept = [None if id(leaf) in seen else leaf for leaf in leaves]
        seen.update(map(id, leaves))
        return jax.tree.unflatten(structure, kept)

    state = trainer.state.template
    for role in state.params:
        yield f"parameters of the {role}", "", new(state.params[role])
        yield f"optimizer state of the {role}", "", new(state.opt_state[role])
    for field in fields(state):
        if field.name in ("reference", "replay"):
            name = {"reference": "moving reference", "replay": "kept rollouts"}[field.name]
            yield name, f"{field.name}/", new(getattr(state, field.name))
    if isinstance(trainer, PPOTrainer | GRPOTrainer):
        for role, tree in trainer.frozen.items():
            yield f"frozen parameters of the {role}", "", new(tree)
        for name, model in trainer.scorer.models.items():
            yield f"reward model {name}", "", new(model.params)
    else:
        yield "frozen parameters", "", new(trainer.frozen)
    if isinstance(trainer, DistillTrainer):
        yield "teacher", "", new(trainer.teacher)


def text(trees: Iterable[tuple[str, str, Any]], mesh: jax.sharding.Mesh) -> str:
    """A table of the groups of every part, and what is left whole."""
    grid = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    rows: list[tuple[str, ...]] = [("array", "shape", "rule", "split over", "MB in all", "MB on each device")]
    lines, left = [], []
    for name, prefix, tree in trees:
        found = groups(tree, mesh, prefix)
        if not found:
            continue
        rows.append((name, "", "", "", *(_megabytes(sum(getattr(g, k) for g in found)) for k in ("total", "local"))))
        for group in found:
            shape = " x ".join(map(str, group.shape))
            sizes = _megabytes(group.total), _megabytes(group.local)
            rows.append((f"  {group.pattern}", shape, group.rule or "none", _spec(group.spec), *sizes))
            if not name.startswith("optimizer"):  # which is split like its parameters
                left += [f"{name}: {group.pattern}: {text}" for text in group.whole]
    widths = [max(len(row[i]) for row in rows) for i in range(6)]
    for row in rows:
        cells = [
            cell.rjust(width) if i > 3 else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        lines.append("  ".join(cells).rstrip())
    if left:
        lines += ["", "left whole:", *(f"  {line}" for line in left)]
    return "\n".join([f"mesh: {grid}. Arrays without a rule are copied to every device.", "", *lines])


def _spec(spec: P) -> str:
    parts = [" x ".join(part) if isinstance(part, tuple) else part or "-" for part in spec]
    return ", ".join(parts) or "whole"


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}" if size >= 5000 else "<0.01"


def explain(config: RunConfig, target: Target | None = None) -> str:
    """The table of a run, on the devices at hand or on those of a target. Nothing is loaded or compiled. Raises what
    the run's trainer raises."""
    devices = sharding.on_devices(topology.stand_ins(target)) if target else contextlib.nullcontext()
    with devices:
        trainer = abstract_trainer(config)
    return text(parts(trainer), trainer.mesh)

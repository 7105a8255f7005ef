"""Collectives of a program, and the devices that take part in one."""

import itertools
import math
import re
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from jaxrlhf.plan.hlo.text import Instruction, arrays

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")


class Collective(NamedTuple):
    """A collective, and the number of times it runs."""

    kind: str
    bytes: float
    """On one device, of the array that is whole: the result of an all-gather, the operand of the others."""
    group: tuple[int, ...]
    """Indices, in the mesh, of the devices of one group; the other groups are alike."""
    times: float


def starts_collective(one: Instruction) -> bool:
    """True in the fusion that starts a collective on a TPU."""
    return one.opcode == "custom-call" and 'custom_call_target="AsyncCollectiveStart"' in one.rest


def channel(one: Instruction) -> str | None:
    """The channel of a collective."""
    match = re.search(r"channel_id=(\d+)", one.rest)
    return match[1] if match else None


def collective(one: Instruction, kind: str, computation: str, devices: int, times: float) -> Collective:
    """The collective that an instruction of `computation` is or starts."""
    group = group_of(one.rest, devices)
    moved = arrays(one.shape)
    total = sum(array.bytes for array in moved)
    both = one.opcode.endswith("-start")  # whether the shape is that of operands and results
    if kind in ("all-gather", "reduce-scatter") and both:
        total *= len(group) / (len(group) + 1)
    elif kind == "reduce-scatter":
        total *= len(group)
    elif kind == "collective-permute" and both:
        total = moved[0].bytes
    if kind == "all-reduce" and "all-reduce-scatter" in computation:  # a fusion of it with the slice
        kind = "reduce-scatter"
    return Collective(kind, total, group, times)


def group_of(rest: str, devices: int) -> tuple[int, ...]:
    """The devices of the first of the groups of a collective, all devices if it names none."""
    pairs = re.search(r"source_target_pairs=\{\{(\d+),(\d+)\}", rest)
    if pairs:
        return int(pairs[1]), int(pairs[2])
    listed = re.search(r"replica_groups=\{\{([\d,]+)\}", rest)
    if listed:
        return tuple(map(int, listed[1].split(",")))
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest)
    if tiled:
        shape, sizes = (tuple(map(int, part.split(","))) for part in tiled.groups()[:2])
        order = map(int, tiled[3].split(",")) if tiled[3] else range(len(sizes))
        grid = np.arange(math.prod(sizes)).reshape(sizes).transpose(tuple(order))
        return tuple(grid.reshape(-1, shape[-1])[0].tolist())
    meshed = re.search(r"replica_groups=mesh\[([^\]]*)\](.*?) ?\{([^}]*)\}", rest)
    if meshed:
        return _mesh_group(*meshed.groups())
    return tuple(range(devices))


def _mesh_group(axes: str, device_ids: str, grouped: str) -> tuple[int, ...]:
    """The first group of devices along the named axes of a mesh, in the order of its axes; `'a':(2)4` is the part of
    size 4 of the axis a, after parts of size 2."""
    sizes = {name: int(size) for name, size in re.findall(r"'([^']*)'=(\d+)", axes)}
    grid = np.arange(math.prod(sizes.values()))
    order = re.search(r"\[([\d,]+)\](?:T\(([\d,]+)\))?", device_ids)
    if order:
        tiles = tuple(map(int, order[1].split(",")))
        axes_order = tuple(map(int, order[2].split(","))) if order[2] else tuple(range(len(tiles)))
        grid = grid.reshape(tiles).transpose(axes_order)
    grid = grid.reshape(tuple(sizes.values()))
    index: list[Iterator[int] | range] = []
    parts = {name: (before, size) for name, before, size in re.findall(r"'([^']*)'(?::\((\d+)\)(\d+))?", grouped)}
    for name, size in sizes.items():
        if name not in parts:
            index.append(range(1))
            continue
        before, part = parts[name]
        stride = size // (int(before) * int(part)) if part else 1
        index.append(range(0, (int(part) if part else size) * stride, stride))
    return tuple(int(grid[place]) for place in itertools.product(*index))

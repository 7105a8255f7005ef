"""Figures of a compiled program, read from its HLO: collectives, matrix products and, on a TPU, estimated cycles.

The HLO is that of one device after partitioning. What a loop repeats counts as often as it runs, which XLA's own cost
analysis does not do.
"""

import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from jaxrlhf.plan.costs import Product

COLLECTIVES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute", "collective-broadcast")
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}
DTYPES = {"bf16": "bfloat16", "f16": "float16", "f32": "float32", "f64": "float64", "s8": "int8", "u8": "uint8"}


class Array(NamedTuple):
    """Dtype (in XLA's spelling) and shape of an array."""

    dtype: str
    shape: tuple[int, ...]
    on_chip: bool = False
    """True in the memory of a TPU's core, which is faster than that of the device."""

    @property
    def bytes(self) -> float:
        bits = BITS.get(self.dtype) or int("".join(re.findall(r"(?<=[su])\d+|(?<=f)\d+", self.dtype)[:1]) or 0)
        return math.prod(self.shape) * bits / 8


class Collective(NamedTuple):
    """A collective, and the number of times it runs."""

    kind: str
    bytes: float
    """On one device, of the array that is whole: the result of an all-gather, the operand of the others."""
    group: tuple[int, ...]
    """Indices, in the mesh, of the devices of one group; the other groups are alike."""
    times: float


@dataclass
class Figures:
    """Work of one device in a run of the program."""

    collectives: list[Collective] = field(default_factory=list)
    products: list[Product] = field(default_factory=list)
    cycles: float = 0.0
    """Sum of the cycles that the TPU compiler estimates for its fusions; 0 where it estimates none."""

    @property
    def weight(self) -> float:
        """FLOPs, bytes and cycles together: of the branches of a conditional, the one with the most counts."""
        flops = sum(p.flops * p.times for p in self.products)
        return flops + sum(c.bytes * c.times for c in self.collectives) + self.cycles

    def repeated(self, times: float) -> "Figures":
        collectives = [c._replace(times=c.times * times) for c in self.collectives]
        products = [p._replace(times=p.times * times) for p in self.products]
        return Figures(collectives, products, self.cycles * times)

    def add(self, other: "Figures") -> None:
        self.collectives += other.collectives
        self.products += other.products
        self.cycles += other.cycles


class Instruction(NamedTuple):
    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str
    is_root: bool


def read(text: str, devices: int, trips: float) -> Figures:
    """Read the text of an optimized program (`compiled.as_text()`) for `devices`.

    `trips` is the number of iterations of loops that end by a condition on data, such as decoding. Of the branches of a
    conditional, the most expensive one counts.
    """
    return _Reader(text, devices, trips).figures()


class _Reader:
    def __init__(self, text: str, devices: int, trips: float):
        self.devices, self.trips = devices, trips
        self.computations: dict[str, dict[str, Instruction]] = {}
        self.entry = ""
        current: dict[str, Instruction] = {}
        for line in text.splitlines():
            if line.endswith("{") and "->" in line and not line.startswith(" "):
                name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
                current = self.computations[name] = {}
                self.entry = name if line.startswith("ENTRY ") else self.entry
            elif " = " in line and line.startswith("  "):
                one = _instruction(line)
                current[one.name] = one
        starts = {name: c for name, c in self.computations.items() if any(map(_starts, c.values()))}
        channels = {_channel(one) for computation in starts.values() for one in computation.values()}
        self.starts, self.started = set(starts), channels - {None}

    def figures(self) -> Figures:
        return self._walk(self.entry, 1, fused=False)

    def _walk(self, name: str, times: float, *, fused: bool) -> Figures:
        found = Figures()
        computation = self.computations[name]
        for one in computation.values():
            kind = one.opcode.removesuffix("-start")
            if not fused and (cycles := re.search(r'"estimated_cycles":"(\d+)"', one.rest)):
                found.cycles += times * int(cycles[1])
            if kind in COLLECTIVES:
                # on a TPU also in each fusion that it runs beside, and in the one that ends it
                if name in self.starts or _channel(one) not in self.started:
                    found.collectives.append(self._collective(one, kind, name, times))
            elif kind == "dot":
                found.products.append(_dot(computation, one, times))
            elif kind == "convolution":
                found.products.append(_convolution(computation, one, times, fused=fused))
            elif kind == "custom-call" and "contracting_dimensions" in one.rest:
                found.products.append(_gemm(computation, one, times))
            elif kind == "while":
                found.add(self._loop(computation, one, times))
            elif kind == "conditional":
                branches = [self._walk(branch, times, fused=fused) for branch in _branches(one.rest)]
                found.add(max(branches, key=lambda branch: branch.weight))
            elif kind in ("fusion", "call", "async", "custom-call") and (called := _called(one.rest)):
                found.add(self._walk(called, times, fused=fused or kind == "fusion"))
        return found

    def _loop(self, computation: dict[str, Instruction], loop: Instruction, times: float) -> Figures:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        body, condition = (re.search(rf"{key}=%?([\w.\-]+)", loop.rest) for key in ("body", "condition"))
        assert body is not None and condition is not None
        trips = int(known[1]) if known else self._trips(computation, loop, condition[1], body[1])
        return self._walk(body[1], times * (self.trips if trips is None else trips), fused=False)

    def _trips(self, computation: dict[str, Instruction], loop: Instruction, condition: str, body: str) -> int | None:
        """Iterations of a loop over `i < limit`, of which TPU programs do not say the number; None for other loops."""
        test = self.computations[condition]
        root = _root(test)
        if root.opcode == "fusion" and (called := _called(root.rest)):
            inner = self.computations[called]
            given = dict(zip(_parameters(inner), root.operands, strict=False))
            root = _root(inner)
        else:
            inner, given = test, {}
        if root.opcode != "compare" or "direction=LT" not in root.rest:
            return None
        counter, limit = (self._constant_or_index(inner, test, given, name) for name in root.operands)
        if not isinstance(counter, str) or not isinstance(limit, int):
            return None
        index = int(counter)
        start = self._initial(computation, loop, index)
        step = self._step(body, index)
        return None if start is None else max(0, -(-(limit - start) // step))

    def _constant_or_index(
        self, inner: dict[str, Instruction], outer: dict[str, Instruction], given: dict[str, str], name: str
    ) -> int | str | None:
        """An integer constant, or the index (as text) of the element of the loop's state that `name` is."""
        one = inner[name]
        if one.opcode == "parameter" and name in given:
            inner, one = outer, outer[given[name]]
        while one.opcode in ("copy", "bitcast", "convert") and one.operands:
            one = inner[one.operands[0]]
        if one.opcode == "constant":
            value = re.match(r"-?\d+$", one.rest.split(")")[0])
            return int(value[0]) if value else None
        index = re.search(r"index=(\d+)", one.rest)
        return index[1] if one.opcode == "get-tuple-element" and index else None

    def _initial(self, computation: dict[str, Instruction], loop: Instruction, index: int) -> int | None:
        state = computation[loop.operands[0]]
        if state.opcode != "tuple":
            return 0  # loops of jax count from 0
        value = self._constant_or_index(computation, computation, {}, state.operands[index])
        return value if isinstance(value, int) else 0

    def _step(self, body: str, index: int) -> int:
        computation = self.computations[body]
        root = _root(computation)
        if root.opcode != "tuple":
            return 1
        one = computation[root.operands[index]]
        while one.opcode in ("copy", "bitcast"):
            one = computation[one.operands[0]]
        if one.opcode != "add":
            return 1
        steps = [self._constant_or_index(computation, computation, {}, name) for name in one.operands]
        return next((step for step in steps if isinstance(step, int) and step > 0), 1)

    def _collective(self, one: Instruction, kind: str, computation: str, times: float) -> Collective:
        group = _group(one.rest, self.devices)
        arrays = _arrays(one.shape)
        total = sum(array.bytes for array in arrays)
        both = one.opcode.endswith("-start")  # whether the shape is that of operands and results
        if kind in ("all-gather", "reduce-scatter") and both:
            total *= len(group) / (len(group) + 1)
        elif kind == "reduce-scatter":
            total *= len(group)
        elif kind == "collective-permute" and both:
            total = arrays[0].bytes
        if kind == "all-reduce" and "all-reduce-scatter" in computation:  # a fusion of it with the slice
            kind = "reduce-scatter"
        return Collective(kind, total, group, times)


def _instruction(line: str) -> Instruction:
    left, right = line.strip().split(" = ", 1)
    end = _closing(right, 0) + 1 if right.startswith("(") else right.index(" ")
    shape, right = right[:end], right[end:].lstrip()
    opening = right.index("(")
    closing = _closing(right, opening)
    operands = right[opening + 1 : closing]
    # a constant's value and a parameter's number stand where others have operands
    rest = right[opening + 1 :] if right.startswith("constant(") else right[closing + 1 :]
    names = re.findall(r"%([\w.\-]+)", operands) if "%" in operands else re.findall(r"(?:^|, )([\w.\-]+)", operands)
    name = left.removeprefix("ROOT ").lstrip("%")
    return Instruction(name, shape, right[:opening], names, rest, left.startswith("ROOT "))


def _closing(text: str, opening: int) -> int:
    """Index of the parenthesis that closes the one at `opening`."""
    depth = 0
    for match in re.compile(r"[()]").finditer(text, opening):
        depth += 1 if match[0] == "(" else -1
        if depth == 0:
            return match.start()
    raise ValueError(f"unbalanced: {text[opening : opening + 80]}")


def _arrays(shape: str) -> list[Array]:
    """The arrays of a shape, which may be a tuple."""
    found = re.findall(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?", shape)
    return [
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), "T(" in layout and "S(1)" in layout)
        for dtype, dims, layout in found
        if dtype != "token"
    ]


def _array(computation: dict[str, Instruction], name: str) -> Array:
    return _arrays(computation[name].shape)[0]


def _starts(one: Instruction) -> bool:
    """True in the fusion that starts a collective on a TPU."""
    return one.opcode == "custom-call" and 'custom_call_target="AsyncCollectiveStart"' in one.rest


def _channel(one: Instruction) -> str | None:
    """The channel of a collective."""
    match = re.search(r"channel_id=(\d+)", one.rest)
    return match[1] if match else None


def _root(computation: dict[str, Instruction]) -> Instruction:
    return next(one for one in computation.values() if one.is_root)


def _parameters(computation: dict[str, Instruction]) -> list[str]:
    """Names of the parameters in order."""
    found = [one for one in computation.values() if one.opcode == "parameter"]
    return [one.name for one in sorted(found, key=lambda one: int(one.operands[0]))]


def _called(rest: str) -> str | None:
    match = re.search(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)", rest)
    return match[1] if match else None


def _branches(rest: str) -> list[str]:
    if match := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return [name.strip().lstrip("%") for name in match[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)


def _numbers(rest: str, key: str) -> list[int]:
    match = re.search(rf'{key}"?[=:][{{\[]([^}}\]]*)[}}\]]', rest)
    return [int(n) for n in re.findall(r"\d+", match[1])] if match else []


def _product(left: Array, right: Array, result: Array, contracted: float, times: float) -> Product:
    moved = sum(array.bytes for array in (left, right, result) if not array.on_chip)
    dtype = DTYPES.get(right.dtype, right.dtype)
    return Product(2.0 * math.prod(result.shape) * contracted, moved, dtype, times)


def _dot(computation: dict[str, Instruction], one: Instruction, times: float) -> Product:
    left, right = (_array(computation, name) for name in one.operands[:2])
    contracted = math.prod(left.shape[axis] for axis in _numbers(one.rest, "lhs_contracting_dims"))
    return _product(left, right, _arrays(one.shape)[0], contracted, times)


def _gemm(computation: dict[str, Instruction], one: Instruction, times: float) -> Product:
    """A call of cuBLAS or oneDNN."""
    left, right = (_array(computation, name) for name in one.operands[:2])
    contracted = math.prod(left.shape[axis] for axis in _numbers(one.rest, "lhs_contracting_dimensions"))
    return _product(left, right, _arrays(one.shape)[0], contracted, times)


def _convolution(computation: dict[str, Instruction], one: Instruction, times: float, *, fused: bool) -> Product:
    """A TPU's form of a matrix product: batch dimensions are spatial ones, windows over zeros that dilate the input."""
    left, right = (_array(computation, name) for name in one.operands[:2])
    result = _arrays(one.shape)[0]
    if fused:
        left, right = (
            array._replace(on_chip=_from_chip(computation, name))
            for array, name in zip((left, right), one.operands, strict=False)
        )
        result = result._replace(on_chip=not _leaves_chip(computation, result))
    labels = re.search(r"dim_labels=(\w+)_(\w+)->(\w+)", one.rest)
    assert labels is not None
    inputs, kernel, outputs = labels.groups()
    contracted = float(right.shape[kernel.index("i")])
    window = re.search(r"window=\{([^}]*)\}", one.rest)
    options = dict(part.split("=") for part in window[1].split()) if window else {}

    def values(key: str, default: str, spatial: int) -> list[str]:
        return options[key].split("x") if key in options else [default] * spatial

    digits = sorted(set(kernel) - set("io"))
    spatial = len(digits)
    settings = [values(key, "1", spatial) for key in ("stride", "lhs_dilate", "rhs_dilate")]
    for digit, stride, dilate, kernel_dilate, pad in zip(digits, *settings, values("pad", "0_0", spatial), strict=True):
        size, taps = left.shape[inputs.index(digit)], right.shape[kernel.index(digit)]
        places = result.shape[outputs.index(digit)]
        at = np.arange(places)[:, None] * int(stride) + np.arange(taps) * int(kernel_dilate) - int(pad.split("_")[0])
        valid = (at >= 0) & (at <= (size - 1) * int(dilate)) & (at % int(dilate) == 0)
        contracted *= valid.sum() / places  # of the places of the result, on average
    return _product(left, right, result, contracted, times)


def _from_chip(computation: dict[str, Instruction], name: str) -> bool:
    """True if a value of a fusion is computed from arrays on the chip alone."""
    one = computation[name]
    if one.opcode == "parameter":
        return _arrays(one.shape)[0].on_chip
    return all(_from_chip(computation, operand) for operand in one.operands)


def _leaves_chip(computation: dict[str, Instruction], product: Array) -> bool:
    """True if a fusion writes an array of the size of its product, or a larger one, to the memory of the device."""
    root = _root(computation)
    results = [computation[name] for name in root.operands] if root.opcode == "tuple" else [root]
    written = [_arrays(one.shape)[0] for one in results if one.opcode not in ("parameter", *COLLECTIVES)]
    return any(not one.on_chip and math.prod(one.shape) >= math.prod(product.shape) for one in written)


def _group(rest: str, devices: int) -> tuple[int, ...]:
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

"""Figures of a compiled program, read from its HLO: collectives, matrix products and, on a TPU, estimated cycles.

The HLO is that of one device after partitioning. What a loop repeats counts as often as it runs, which XLA's own cost
analysis does not do.
"""

import re
from dataclasses import dataclass, field

from jaxrlhf.plan.costs import Product
from jaxrlhf.plan.hlo.collectives import COLLECTIVES, Collective, channel, collective, starts_collective
from jaxrlhf.plan.hlo.products import convolution, dot, gemm
from jaxrlhf.plan.hlo.text import Computation, Instruction, computations, parameters, root_of


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


def read(text: str, devices: int, trips: float) -> Figures:
    """Read the text of an optimized program (`compiled.as_text()`) for `devices`.

    `trips` is the number of iterations of loops that end by a condition on data, such as decoding. Of the branches of a
    conditional, the most expensive one counts.
    """
    return _Reader(text, devices, trips).figures()


class _Reader:
    def __init__(self, text: str, devices: int, trips: float):
        self.devices, self.trips = devices, trips
        self.computations, self.entry = computations(text)
        starts = {name: c for name, c in self.computations.items() if any(map(starts_collective, c.values()))}
        channels = {channel(one) for computation in starts.values() for one in computation.values()}
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
                if name in self.starts or channel(one) not in self.started:
                    found.collectives.append(collective(one, kind, name, self.devices, times))
            elif kind == "dot":
                found.products.append(dot(computation, one, times))
            elif kind == "convolution":
                found.products.append(convolution(computation, one, times, fused=fused))
            elif kind == "custom-call" and "contracting_dimensions" in one.rest:
                found.products.append(gemm(computation, one, times))
            elif kind == "while":
                found.add(self._loop(computation, one, times))
            elif kind == "conditional":
                branches = [self._walk(branch, times, fused=fused) for branch in _branches(one.rest)]
                found.add(max(branches, key=lambda branch: branch.weight))
            elif kind in ("fusion", "call", "async", "custom-call") and (called := _called(one.rest)):
                found.add(self._walk(called, times, fused=fused or kind == "fusion"))
        return found

    def _loop(self, computation: Computation, loop: Instruction, times: float) -> Figures:
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"\}', loop.rest)
        body, condition = (re.search(rf"{key}=%?([\w.\-]+)", loop.rest) for key in ("body", "condition"))
        assert body is not None and condition is not None
        trips = int(known[1]) if known else self._trips(computation, loop, condition[1], body[1])
        return self._walk(body[1], times * (self.trips if trips is None else trips), fused=False)

    def _trips(self, computation: Computation, loop: Instruction, condition: str, body: str) -> int | None:
        """Iterations of a loop over `i < limit`, of which TPU programs do not say the number; None for other loops."""
        test = self.computations[condition]
        root = root_of(test)
        if root.opcode == "fusion" and (called := _called(root.rest)):
            inner = self.computations[called]
            given = dict(zip(parameters(inner), root.operands, strict=False))
            root = root_of(inner)
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
        self, inner: Computation, outer: Computation, given: dict[str, str], name: str
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

    def _initial(self, computation: Computation, loop: Instruction, index: int) -> int | None:
        state = computation[loop.operands[0]]
        if state.opcode != "tuple":
            return 0  # loops of jax count from 0
        value = self._constant_or_index(computation, computation, {}, state.operands[index])
        return value if isinstance(value, int) else 0

    def _step(self, body: str, index: int) -> int:
        computation = self.computations[body]
        root = root_of(computation)
        if root.opcode != "tuple":
            return 1
        one = computation[root.operands[index]]
        while one.opcode in ("copy", "bitcast"):
            one = computation[one.operands[0]]
        if one.opcode != "add":
            return 1
        steps = [self._constant_or_index(computation, computation, {}, name) for name in one.operands]
        return next((step for step in steps if isinstance(step, int) and step > 0), 1)


def _called(rest: str) -> str | None:
    match = re.search(r"(?:calls|to_apply|called_computations)=\{?%?([\w.\-]+)", rest)
    return match[1] if match else None


def _branches(rest: str) -> list[str]:
    if match := re.search(r"branch_computations=\{([^}]*)\}", rest):
        return [name.strip().lstrip("%") for name in match[1].split(",")]
    return re.findall(r"(?:true|false)_computation=%?([\w.\-]+)", rest)

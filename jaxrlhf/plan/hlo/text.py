"""The text of an optimized program: computations, instructions and the arrays of their shapes."""

import math
import re
from typing import NamedTuple

BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64, "c128": 128}


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


class Instruction(NamedTuple):
    """One line of a computation. `rest` is what follows the operands: attributes, or the value of a constant."""

    name: str
    shape: str
    opcode: str
    operands: list[str]
    rest: str
    is_root: bool


Computation = dict[str, Instruction]
"""Instructions by name, in order."""


def computations(text: str) -> tuple[dict[str, Computation], str]:
    """The computations of a program by name, and the name of the one that it begins with."""
    found: dict[str, Computation] = {}
    entry, current = "", {}
    for line in text.splitlines():
        if line.endswith("{") and "->" in line and not line.startswith(" "):
            name = line.removeprefix("ENTRY ").split(" ", 1)[0].lstrip("%")
            current = found[name] = {}
            entry = name if line.startswith("ENTRY ") else entry
        elif " = " in line and line.startswith("  "):
            one = _instruction(line)
            current[one.name] = one
    return found, entry


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


def arrays(shape: str) -> list[Array]:
    """The arrays of a shape, which may be a tuple."""
    found = re.findall(r"([a-z]+\d*[a-z\d]*)\[([\d,]*)\](\{[^}]*\})?", shape)
    return [
        Array(dtype, tuple(map(int, filter(None, dims.split(",")))), "T(" in layout and "S(1)" in layout)
        for dtype, dims, layout in found
        if dtype != "token"
    ]


def array_of(computation: Computation, name: str) -> Array:
    """The array that the instruction `name` results in; of a tuple, the first."""
    return arrays(computation[name].shape)[0]


def root_of(computation: Computation) -> Instruction:
    """The instruction whose result is that of the computation."""
    return next(one for one in computation.values() if one.is_root)


def parameters(computation: Computation) -> list[str]:
    """Names of the parameters in order."""
    found = [one for one in computation.values() if one.opcode == "parameter"]
    return [one.name for one in sorted(found, key=lambda one: int(one.operands[0]))]


def numbers(rest: str, key: str) -> list[int]:
    """The integers of an attribute of an instruction; none without it."""
    match = re.search(rf'{key}"?[=:][{{\[]([^}}\]]*)[}}\]]', rest)
    return [int(n) for n in re.findall(r"\d+", match[1])] if match else []

"""What XLA's compilers for GPUs and TPUs make of a program, and the record of it in tests/compiled/record.json.

Compiling takes minutes and lowering seconds: a program is compiled only if the record has no facts for its lowered text
and the compiler's version.
"""

import collections
import hashlib
import json
import math
import os
import pathlib
import re
import time
from dataclasses import dataclass, field
from typing import Any

import jax
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf import runtime
from jaxrlhf.compilation import Compiled
from jaxrlhf.plan.programs import Programs

RECORD = pathlib.Path(__file__).resolve().parents[1] / "compiled" / "record.json"
BYTES = {"pred": 1, "s8": 1, "u8": 1, "bf16": 2, "f16": 2, "s16": 2, "u16": 2, "s32": 4, "u32": 4, "f32": 4, "s64": 8}
COLLECTIVES = ("all-gather", "all-reduce", "reduce-scatter", "all-to-all", "collective-permute")
_compiled = {"seconds": 0}  # in this process
_INSTRUCTION = re.compile(r"^\s*(?:ROOT )?%?(?P<name>[\w.-]+) = (?P<type>\(.*?\)|\S+) (?P<op>[\w-]+)\((?P<rest>.*)$")
_SHAPE = re.compile(r"(?P<dtype>[a-z]+\d*)\[(?P<dims>[\d,]*)\]")


@dataclass
class Facts:
    """What a compiler made of a program. Shapes are those of one device: "bf16[8,128]"."""

    arguments: int
    """Bytes."""
    outputs: int
    aliased_bytes: int
    scratch: int
    donated: int
    """Arguments given up for results."""
    aliased: int
    """Arguments whose memory holds a result."""
    copies: dict[str, int] = field(default_factory=dict)
    """Copies in the device's memory, by shape; the largest ones."""
    collectives: dict[str, dict[str, int]] = field(default_factory=dict)
    """By kind: how many results of each shape."""
    products: dict[str, int] = field(default_factory=dict)
    """Matrix products by the dtype of the operands: "bf16 x bf16"."""
    wide: list[str] = field(default_factory=list)
    """Names of the matrix products that are computed in float32."""
    kernels: dict[str, int] = field(default_factory=dict)
    """Calls of libraries, by name."""
    loops: list[list[int]] = field(default_factory=list)
    """[passes, kernels of one pass] of every loop, those with the most kernels first; 0 passes if not known."""
    seconds: int = 0
    """Processor time of compiling, on the computer that wrote the record."""
    places: list[Any] = field(default_factory=list)
    """PartitionSpec of each result; None if it is replicated."""


class Recorded(Programs):
    """The programs of a run with what a target's compiler makes of them, but for those whose names are in `skip`.

    Attributes:
        facts: by the name of the function, those of each program of that name.
    """

    def __init__(self, run: str, target: str, record: dict[str, Any], skip: tuple[str, ...] = ()) -> None:
        self.run, self.target, self.record, self.skip = run, target, record, skip
        self.facts: dict[str, list[Facts]] = {}

    def compile(self, program: Any, *args: Any, **kwargs: Any) -> Any:
        traced = program.trace(*args, **kwargs)
        name = program.__name__.lstrip("_")
        if name in self.skip:
            return traced.out_info
        lowered = traced.lower()
        found = recorded(f"{self.run}: {name}", lowered, self.target, self.record)
        self.facts.setdefault(name, []).append(found)
        mesh = next(x.sharding.mesh for x in jax.tree.leaves((args, kwargs)) if hasattr(x, "sharding") and x.sharding)
        leaves, structure = jax.tree.flatten(lowered.out_info)
        placed = [
            jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, PartitionSpec(*map(_axes, spec or ()))))
            for x, spec in zip(leaves, found.places, strict=True)
        ]
        outputs = jax.tree.unflatten(structure, placed)
        self.setdefault(name, []).append(Compiled(name, traced.jaxpr, None, outputs, None))
        return outputs


def _axes(entry: Any) -> Any:
    return tuple(entry) if isinstance(entry, list) else entry


def key_of(lowered: Any, target: str) -> str:
    """Hash of a lowered program and of the version of the compiler for `target`."""
    text = re.sub(r'backend_config = "\d+"', "", lowered.as_text())  # addresses of this process's Python functions
    package = "libtpu" if target.startswith("v") else "jax-cuda13-plugin"
    return hashlib.sha256(f"{target} {package} {runtime.version(package)}\n{text}".encode()).hexdigest()[:16]


def recorded(name: str, lowered: Any, target: str, record: dict[str, Any]) -> Facts:
    """The facts of a lowered program, from the record if it has them, into which they go otherwise.

    Skips the test if the program would have to be compiled, and that would take longer than what is left of
    JAXRLHF_COMPILING_SECONDS: as long as the last time that it was recorded.
    """
    key, program = key_of(lowered, target), f"{name} on {target}"
    if key not in record:
        left = float(os.environ.get("JAXRLHF_COMPILING_SECONDS", "inf")) - _compiled["seconds"]
        if max((entry.get("seconds", 0) for entry in record.values() if entry["program"] == program), default=0) > left:
            pytest.skip(f"NOT CHECKED: {program} is not in tests/compiled/record.json, and would take too long")
        known = {k: v for k, v in vars(facts_of(lowered)).items() if v}
        _compiled["seconds"] += known.get("seconds", 0)
        record[key] = {"program": program, **known}
    record[key]["used"] = True
    zeros = dict.fromkeys(("arguments", "outputs", "aliased_bytes", "scratch", "donated", "aliased"), 0)
    return Facts(**zeros | {k: v for k, v in record[key].items() if k not in ("program", "used")})


def facts_of(lowered: Any) -> Facts:
    """Compile a lowered program and read what the compiler made."""
    before = time.process_time()
    compiled = lowered.compile()
    seconds = round(time.process_time() - before)
    memory, text = compiled.memory_analysis(), compiled.as_text()
    header = text.split("\n", 1)[0]
    aliases = re.search(r"input_output_alias=\{(.*?)\}, entry", header)
    facts = Facts(
        arguments=memory.argument_size_in_bytes,
        outputs=memory.output_size_in_bytes,
        aliased_bytes=memory.alias_size_in_bytes,
        scratch=memory.temp_size_in_bytes,
        donated=sum(one.donated for one in jax.tree.leaves(lowered.args_info)),
        aliased=len(re.findall(r"-alias\)", aliases.group(1))) if aliases else 0,
        seconds=seconds,
        places=[
            [list(axis) if isinstance(axis, tuple) else axis for axis in getattr(to, "spec", ())] or None
            for to in jax.tree.leaves(compiled.output_shardings)
        ],
    )
    _read(text, facts)
    return facts


def _read(text: str, facts: Facts) -> None:
    """Read copies, collectives, products and kernels from optimised HLO."""
    types, found = {}, []
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            types[match["name"]] = match["type"]
            found.append(match)
    facts.loops = _loops(text)
    copies = collections.Counter()
    for match in found:
        kind, rest = match["op"].removesuffix("-start"), match["rest"]
        if kind == "copy" and "S(" not in match["type"]:  # S: of a TPU's on-chip memory
            copies[shape_of(match["type"])] += 1
        elif kind in COLLECTIVES:
            shapes = facts.collectives.setdefault(kind, {})
            results = [_text(shape) for shape in _SHAPE.finditer(match["type"])]
            if match["op"].endswith("-start") and match["type"].startswith("("):  # operands, then results
                results = results[len(results) // 2 :]
            for shape in results:
                shapes[shape] = shapes.get(shape, 0) + 1
        elif kind == "custom-call":
            target = re.search(r'custom_call_target="([^"]+)"', rest)
            name = target.group(1) if target else ""
            if name.startswith("__c"):
                facts.kernels[name] = facts.kernels.get(name, 0) + 1
            if "gemm" in name or "matmul" in name:
                _product(match, types, facts)
        elif kind in ("dot", "convolution"):
            _product(match, types, facts)
    largest = sorted(copies, key=lambda shape: -size_of(shape))[:12]
    facts.copies = {shape: copies[shape] for shape in largest}


_NO_KERNEL = re.compile(
    r"parameter|constant|tuple|get-tuple-element|bitcast|while|conditional|call|after-all|opt-barrier|partition-id|"
    r"replica-id|.*-done"
)


def _loops(text: str) -> list[list[int]]:
    """`Facts.loops`, of optimised HLO. On a GPU an instruction of a loop's body is a kernel: fusions, products, copies,
    collectives and calls of libraries."""
    kernels, bodies, computation = collections.Counter(), {}, ""
    for line in text.splitlines():
        if match := _INSTRUCTION.match(line):
            kernels[computation] += not _NO_KERNEL.fullmatch(match["op"])
            if match["op"] == "while":
                body = re.search(r"body=%?([\w.-]+)", line).group(1)  # type: ignore[union-attr]
                passes = re.search(r'"known_trip_count":\{"n":"(\d+)"', line)
                bodies[body] = int(passes.group(1)) if passes else 0
        elif match := re.match(r"(?:ENTRY )?%?([\w.-]+) .*\{$", line):
            computation = match[1]
    return sorted(([passes, kernels[body]] for body, passes in bodies.items()), key=lambda loop: (-loop[1], loop[0]))


def _product(match: re.Match[str], types: dict[str, str], facts: Facts) -> None:
    operands = [types.get(name, "?") for name in re.findall(r"%([\w.-]+)", match["rest"].split(")")[0])[:2]]
    pair = " x ".join(re.split(r"\[", operand)[0] for operand in operands)
    facts.products[pair] = facts.products.get(pair, 0) + 1
    # a TPU multiplies float32 in bfloat16 unless it is asked for more, so that its compiler leaves out the rounding
    if "f32" in pair and ("T(" not in match["type"] or "highest" in match["rest"]):
        name = re.search(r'op_name="([^"]*)"', match["rest"])
        facts.wide.append(name.group(1) if name else "?")


def _text(shape: re.Match[str]) -> str:
    return f"{shape['dtype']}[{shape['dims']}]"


def shape_of(text: str) -> str:
    """The first shape in an HLO type, without its layout."""
    shape = _SHAPE.search(text)
    return _text(shape) if shape else text


def dims_of(shape: str) -> list[int]:
    """The sizes of a shape such as "bf16[8,128]"."""
    return [int(size) for size in re.search(r"\[([\d,]*)\]", shape).group(1).split(",") if size]  # type: ignore[union-attr]


def size_of(shape: str) -> int:
    """Bytes of such a shape."""
    return BYTES.get(shape.split("[")[0], 4) * math.prod(dims_of(shape))


def read_record() -> dict[str, Any]:
    return json.loads(RECORD.read_text()) if RECORD.exists() else {}


def write_record(used: dict[str, Any]) -> None:
    """Put facts into the record, in place of earlier ones of the same programs; one program a line, by name."""
    names = {entry["program"] for entry in used.values()}
    facts = {key: entry for key, entry in read_record().items() if entry["program"] not in names} | used
    lines = [(entry["program"], json.dumps({key: entry}, separators=(",", ":"))[1:-1]) for key, entry in facts.items()]
    RECORD.write_text("{\n" + ",\n".join(line for _, line in sorted(lines)) + "\n}\n")

"""Adapters of experts in PEFT's layouts.

transformers 5 stores the experts of a layer in two parameters, `mlp.experts.gate_up_proj` [E, 2 F, D] and
`mlp.experts.down_proj` [E, D, F], which PEFT adapts through `target_parameters`. Each has one A [E r, in], expert by
expert, and one B [out, r E], rank by rank: the delta of expert e is the product of rows e r to e r + r of A and of
columns e, E + e, 2 E + e, ... of B. The module of both is `mlp.experts`; if both are adapted, PEFT wraps it twice, and
`gate_up_proj` is the `base_layer` of the outer wrapper.

Under older versions every expert had linear layers of its own (`mlp.experts.3.gate_proj`), with an A and a B each.
"""

import re
from collections.abc import Iterable

import numpy as np

from jaxrlhf.lora import Module
from jaxrlhf.models import ModelConfig
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.names import Part, part_of
from jaxrlhf.weights.names import projections as linear_layers
from jaxrlhf.weights.peft.keys import MERGE

KEY = "target_parameters"
ROUTER = "mlp.gate"
GATE_UP, DOWN = "mlp.experts.gate_up_proj", "mlp.experts.down_proj"
_ONLY_OF_SINGLE = ("mlp.experts.gate_proj", "mlp.experts.up_proj")
_WRAPPED = "mlp.experts"
_SINGLE = re.compile(r"mlp\.experts\.(\d+)\.(gate|up|down)_proj")


def projections(model: ModelConfig) -> dict[str, list[Module]]:
    """The matrices of a layer by PEFT's names, with those of router and experts: `names.projections` and more."""
    found = linear_layers(model)
    if model.num_experts:
        found |= {ROUTER: [("experts", "router")], DOWN: [("experts", "down")]}
        found |= {GATE_UP: [("experts", "gate"), ("experts", "up")]}
        found |= dict(zip(_ONLY_OF_SINGLE, ([("experts", "gate")], [("experts", "up")]), strict=True))
    return found


def writing(model: ModelConfig) -> dict[str, list[Module]]:
    """`projections` as transformers 5 has them, each matrix once."""
    return {name: paths for name, paths in projections(model).items() if name not in _ONLY_OF_SINGLE}


def of_experts(path: Module) -> bool:
    """Return True for a matrix that every expert has, False for the router and other matrices."""
    return path[0] == "experts" and path[1] != "router"


def part(model: ModelConfig, module: str, path: Module) -> Part | None:
    """The columns of the matrix at `path` in the tensor of `module`; None if it is the whole tensor."""
    if module == GATE_UP:
        return Part(("gate", "up").index(path[1]), (model.mlp_size, model.mlp_size))
    return part_of(model, "/".join(path))


def parameters(fields: Fields, model: ModelConfig) -> list[str]:
    """The value of `target_parameters`. Raises DataError if it is set for a model without experts."""
    if not model.num_experts:
        fields.refuse_if_set(KEY, f"it is read for mixtures of experts only; {MERGE}")
    return fields.strings(KEY)


def targeted(name: str, targets: Iterable[str]) -> bool:
    """Return True if `target_parameters` names this parameter: its whole name, or its end after a dot."""
    return any(f".{name}".endswith(f".{target}") for target in targets)


def module_of(wrapped: str, prefix: str, names: Iterable[str], targets: list[str]) -> str:
    """The parameter ("mlp.experts.down_proj") that the adapters of a wrapped module of the layer `prefix` belong to, ""
    if that is unclear; other names are returned as they are. `names` are all that the file has adapters for."""
    inner = f"{_WRAPPED}.base_layer"
    if wrapped == inner:
        return GATE_UP
    if wrapped != _WRAPPED:
        return "" if wrapped.startswith(f"{_WRAPPED}.") else wrapped
    if f"{prefix}{inner}" in names:
        return DOWN
    found = [module for module in (GATE_UP, DOWN) if targeted(prefix + module, targets)]
    return found[0] if len(found) == 1 else ""


def single(module: str) -> tuple[int, str] | None:
    """(expert, name of the matrix) for a linear layer of one expert: "mlp.experts.3.gate_proj"."""
    match = _SINGLE.fullmatch(module)
    return (int(match[1]), f"mlp.experts.{match[2]}_proj") if match else None


def single_name(module: str, expert: int) -> str:
    """Inverse of `single`."""
    return module.replace("mlp.experts.", f"mlp.experts.{expert}.")


def together(given: dict[str, dict[int, np.ndarray]], count: int) -> tuple[dict[str, np.ndarray], list[str]]:
    """({"a": [E, r, in], "b": [E, out, r]}, problems) from {"a" or "b": {expert: array}}; 0 for experts without."""
    problems, stacked = [], {}
    if alone := given.get("a", {}).keys() ^ given.get("b", {}).keys():
        problems.append(f"missing: lora_A or lora_B of experts {sorted(alone)}")
    for part, arrays in given.items():
        shape, *others = {array.shape for array in arrays.values()}
        if others:
            problems.append(f"wrong shape: lora_{part.upper()} of some experts differs from that of others")
            continue
        stacked[part] = np.zeros((count, *shape), np.float32)
        for expert, array in arrays.items():
            stacked[part][expert] = array
    return stacked, problems


def separated(kind: str, array: np.ndarray, count: int) -> np.ndarray:
    """PEFT's A [E r, in] or B [out, r E] as [E, r, in] or [E, out, r]; unchanged if E does not divide it."""
    if kind == "a" and array.ndim == 2 and len(array) % count == 0:
        return array.reshape(count, -1, array.shape[1])
    if kind == "b" and array.ndim == 2 and array.shape[1] % count == 0:
        return array.reshape(len(array), -1, count).transpose(2, 0, 1)
    return array


def joined(kind: str, array: np.ndarray) -> np.ndarray:
    """Inverse of `separated`; other arrays are unchanged."""
    if array.ndim < 3:
        return array
    return array.reshape(-1, array.shape[-1]) if kind == "a" else array.transpose(1, 2, 0).reshape(array.shape[1], -1)


def wrapped_name(module: str, modules: Iterable[str]) -> str:
    """The module of the tensors of a parameter, if all these modules have adapters."""
    if module not in (GATE_UP, DOWN):
        return module
    return f"{_WRAPPED}.base_layer" if module == GATE_UP and DOWN in modules else _WRAPPED


def parameter(module: str) -> str | None:
    """The name by which `target_parameters` adapts a module; None if it is a linear layer."""
    return {ROUTER: f"{ROUTER}.weight", GATE_UP: GATE_UP, DOWN: DOWN}.get(module)

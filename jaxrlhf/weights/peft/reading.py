"""Reading of adapters in PEFT's layout."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import DataError
from jaxrlhf.lora import Module
from jaxrlhf.models import Adapters, ModelConfig
from jaxrlhf.types import Params
from jaxrlhf.weights import safetensors
from jaxrlhf.weights.families import multimodal, tensor_names
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.mapping import set_leaf
from jaxrlhf.weights.names import layer_prefix
from jaxrlhf.weights.peft import experts, token_rows
from jaxrlhf.weights.peft.keys import MERGE
from jaxrlhf.weights.peft.layout import PREFIX, SCORES, read_fields, scan, widths

_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
}
_TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler")  # tensors without effect on the outputs
Parts = dict[str, np.ndarray]
"""Of one matrix: "a" [r, in], "b" [out, r] and, for DoRA, "magnitude" [out]; of experts [E, r, in], [E, out, r]."""


def read(folder: Path, model: ModelConfig) -> tuple[Adapters, Params]:
    """(static description, {"lora": float32 arrays and, if stored, "score"}) of the adapters in a folder.

    Smaller ranks are padded with zeros and differing scales are folded into B, so that one rank and one scale hold for
    all matrices. Layers without adapters between layers with adapters have A and B of 0 and a magnitude of NaN. Raises
    DataError for adapters other than LoRA and DoRA (see keys.py), and for adapters of another model, listing the names
    and shapes that do not fit.
    """
    fields = read_fields(folder)
    adapters = Adapters(fields.integer("r"), fields.number("lora_alpha"), fields.boolean("use_rslora", False))
    with_magnitudes = fields.boolean("use_dora", False)
    tokens = token_rows.indices(fields, model)
    matrices, row_tensors = experts.projections(model), token_rows.row_tensors(model)
    targets = experts.parameters(fields, model)
    by_module: dict[str, dict[int, Parts]] = defaultdict(lambda: defaultdict(dict))
    singles: dict[tuple[str, int], dict[str, dict[int, np.ndarray]]] = defaultdict(lambda: defaultdict(dict))
    score: Params = {}
    row_arrays: dict[str, np.ndarray] = {}
    problems = []
    entries = scan(folder)
    modules = {name.removeprefix(PREFIX).partition(".lora_")[0] for name in entries}
    for full_name, entry in entries.items():
        name = multimodal.text_name(full_name.removeprefix(PREFIX), tensor_names(model).decoder)
        if location := _location(name, model, matrices, modules, targets):
            module, layer, part, expert = location
            array = safetensors.read(entry).astype(np.float32)
            if expert is not None:
                singles[module, layer][part][expert] = array
            elif experts.of_experts(matrices[module][0]):
                by_module[module][layer][part] = experts.separated(part, array, model.num_experts)
            else:
                by_module[module][layer][part] = array.reshape(-1) if part == "magnitude" else array
        elif model.head == "linear" and full_name in SCORES:
            score = {"score": {"kernel": jnp.asarray(safetensors.read(entry).astype(np.float32).T)}}
        elif full_name.startswith(PREFIX) and name in row_tensors:
            row_arrays[name] = safetensors.read(entry).astype(np.float32)
        elif not any(part in name for part in _TRAINING_ONLY):
            problems.append(f"unexpected: {full_name} {list(entry.shape)}")
    for (module, layer), given in singles.items():
        by_module[module][layer], different = experts.together(given, model.num_experts)
        problems += [f"{problem}: layer {layer}, {module}" for problem in different]
    ranks, alphas = _patterns(fields, "rank_pattern"), _patterns(fields, "alpha_pattern")

    def configured(module: str, layer: int) -> Adapters:
        prefix = layer_prefix(model, layer)
        names = [f"{prefix}{module}"]
        if experts.targeted(f"{names[0]}.weight", targets):
            names = [f"{names[0]}.weight"]
        elif (module, layer) in singles:
            names = [f"{prefix}{experts.single_name(module, expert)}" for expert in range(model.num_experts)]
        found = {(_pattern(ranks, name, adapters.rank), _pattern(alphas, name, adapters.alpha)) for name in names}
        if len(found) > 1:
            fields.refuse("rank_pattern", f"the same rank and alpha for all experts; {MERGE}")
        ((rank, alpha),) = found
        return dataclasses.replace(adapters, rank=int(rank), alpha=float(alpha))

    for module, by_layer in by_module.items():
        inputs, outputs = widths(model, matrices[module])
        for layer, parts in by_layer.items():
            rank = configured(module, layer).rank
            shapes: dict[str, tuple[int, ...]] = {"a": (rank, inputs), "b": (sum(outputs), rank)}
            if experts.of_experts(matrices[module][0]):
                shapes = {part: (model.num_experts, *shape) for part, shape in shapes.items()}
            elif with_magnitudes:
                shapes["magnitude"] = (sum(outputs),)
            problems += _part_problems(f"layer {layer}, {module}", parts, shapes)
    rows, row_problems = token_rows.from_tensors(row_arrays, tokens, model)
    problems += row_problems
    if problems or not by_module:
        raise DataError(
            f"{folder}: these adapters do not fit the model ({model.family}, {model.num_layers} layers, hidden size "
            f"{model.hidden_size}):\n  " + "\n  ".join(problems[:20] or ["there are none in the file"]) + "\nIf PEFT "
            f"applies them to this model, {MERGE}"
        )
    all_layers = {layer for by_layer in by_module.values() for layer in by_layer}
    layers = range(min(all_layers), max(all_layers) + 1)
    tree: Params = {}
    for module, by_layer in by_module.items():
        having = [layer for layer in model.layers_with(matrices[module][0][0]) if layer in layers]
        stacked = _stack(by_layer, {layer: configured(module, layer).scale / adapters.scale for layer in having})
        for path in matrices[module]:
            part = experts.part(model, module, path)
            columns = slice(None) if part is None else part.columns
            leaf = {name: array if name == "a" else array[..., columns] for name, array in stacked.items()}
            set_leaf(tree, path, {name: jnp.array(array) for name, array in leaf.items()})
    span = None if len(layers) == model.num_layers else (layers.start, layers.stop)
    lora: Params = {"layers": tree} | ({"rows": rows} if rows else {})
    return dataclasses.replace(adapters, layers=span, tokens=tokens), {"lora": lora, **score}


def _stack(by_layer: dict[int, Parts], scales: dict[int, float]) -> Parts:
    """Stack one matrix over the layers of `scales`: "a" [n, in, r], "b" [n, r, out] and "magnitude" [n, out]; "a" and
    "b" of experts have an axis E after the first.

    B is multiplied by its layer's scale; layers without adapters are zero, with a magnitude of NaN.
    """
    max_rank = max(parts["a"].shape[-2] for parts in by_layer.values())
    first = next(iter(by_layer.values()))
    absent = {part: np.full_like(array, np.nan if part == "magnitude" else 0) for part, array in first.items()}
    stacked = defaultdict(list)
    for layer, scale in scales.items():
        parts = by_layer.get(layer, absent)
        padding, whole = (0, max_rank - parts["a"].shape[-2]), (0, 0)
        lead = [whole] * (parts["a"].ndim - 2)
        stacked["a"].append(np.pad(parts["a"].swapaxes(-1, -2), [*lead, whole, padding]))
        stacked["b"].append(np.pad(parts["b"].swapaxes(-1, -2) * scale, [*lead, padding, whole]))
        if "magnitude" in parts:
            stacked["magnitude"].append(parts["magnitude"])
    return {part: np.stack(arrays) for part, arrays in stacked.items()}


def _location(
    name: str, model: ModelConfig, matrices: Mapping[str, list[Module]], modules: set[str], targets: list[str]
) -> tuple[str, int, str, int | None] | None:
    """(module, layer, part, number of the expert or None for all) of a tensor of the file; None if it is not an adapter
    of this model. `modules` are those of all tensors, `targets` is `target_parameters`."""
    match = re.fullmatch(r"(.+?\.)(\d+)\.(.+?)\.(lora_.+)", name)
    if match is None or match[4] not in _PARTS:
        return None
    layer, part, prefix = int(match[2]), _PARTS[match[4]], f"{match[1]}{match[2]}."
    expert, module = experts.single(match[3]) or (None, experts.module_of(match[3], prefix, modules, targets))
    if module not in matrices:
        return None
    if experts.of_experts(matrices[module][0]) and (part == "magnitude" or (expert or 0) >= model.num_experts):
        return None
    fits = layer in model.layers_with(matrices[module][0][0]) and prefix == layer_prefix(model, layer)
    return (module, layer, part, expert) if fits else None


def _part_problems(where: str, parts: Parts, shapes: dict[str, tuple[int, ...]]) -> list[str]:
    """Differences between the stored parts of a matrix and the `shapes` of those it should have."""
    names = {part: name.removesuffix(".weight") for name, part in _PARTS.items()}
    problems = [f"missing: {where}, {names[part]} {list(shapes[part])}" for part in shapes if part not in parts]
    for part, array in parts.items():
        if part not in shapes:
            problems.append(f"unexpected: {where}, {names[part]}, because use_dora is false")
        elif array.shape != shapes[part]:
            problems.append(f"wrong shape: {where}, {names[part]} is {list(array.shape)}, not {list(shapes[part])}")
    return problems


def _patterns(fields: Fields, key: str) -> dict[str, Any]:
    """Numbers by regular expressions. A repeated group is refused: matching could take exponential time."""
    patterns = fields.mapping(key)
    for pattern, value in patterns.items():
        if not isinstance(value, int | float) or isinstance(value, bool) or value <= 0:
            fields.refuse(key, "numbers above 0 by names of modules")
        try:
            re.compile(pattern)
        except re.error as error:
            fields.refuse(key, f"regular expressions of module names ({pattern!r}: {error})")
        if re.search(r"\)[*+{]", pattern):
            fields.refuse(key, f"regular expressions without a repeated group, unlike {pattern!r}")
    return patterns


def _pattern(patterns: dict[str, Any], name: str, default: float) -> float:
    """The value of the first pattern that matches the module's name, or its end from a dot on, as in PEFT."""
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", name)), default)

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
from jaxrlhf.weights.names import layer_prefix, part_of, projections
from jaxrlhf.weights.peft import token_rows
from jaxrlhf.weights.peft.keys import MERGE
from jaxrlhf.weights.peft.layout import PREFIX, SCORES, read_fields, scan, widths

_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
}
_TRAINING_ONLY = ("lora_velora_embed", "lora_monteclora_sampler")  # tensors without effect on the outputs
Parts = dict[str, np.ndarray]  # of one matrix, as stored: "a" [r, in], "b" [out, r] and, for DoRA, "magnitude" [out]


def read(folder: Path, model: ModelConfig) -> tuple[Adapters, Params]:
    """(static description, {"lora": float32 arrays and, if stored, "score"}) of the adapters in a folder.

    Smaller ranks are padded with zeros and differing scales are folded into B, so that one rank and one scale hold for
    all matrices. Layers without adapters between layers with adapters have A and B of 0 and a magnitude of NaN. Raises
    DataError for adapters other than LoRA and DoRA (see keys.py), and for adapters of another model, listing the names
    and shapes that do not fit.
    """
    fields = read_fields(folder)
    adapters = Adapters(fields.integer("r"), fields.number("lora_alpha"), fields.boolean("use_rslora", False))
    kinds = ["a", "b", *(["magnitude"] if fields.boolean("use_dora", False) else [])]
    tokens = token_rows.indices(fields, model)
    matrices, row_tensors = projections(model), token_rows.row_tensors(model)
    by_module: dict[str, dict[int, Parts]] = defaultdict(lambda: defaultdict(dict))
    score: Params = {}
    row_arrays: dict[str, np.ndarray] = {}
    problems = []
    for full_name, entry in scan(folder).items():
        name = multimodal.text_name(full_name.removeprefix(PREFIX), tensor_names(model).decoder)
        if location := _location(name, model, matrices):
            module, layer, part = location
            array = safetensors.read(entry).astype(np.float32)
            by_module[module][layer][part] = array.reshape(-1) if part == "magnitude" else array
        elif model.head == "linear" and full_name in SCORES:
            score = {"score": {"kernel": jnp.asarray(safetensors.read(entry).astype(np.float32).T)}}
        elif full_name.startswith(PREFIX) and name in row_tensors:
            row_arrays[name] = safetensors.read(entry).astype(np.float32)
        elif not any(part in name for part in _TRAINING_ONLY):
            problems.append(f"unexpected: {full_name} {list(entry.shape)}")
    ranks, alphas = _patterns(fields, "rank_pattern"), _patterns(fields, "alpha_pattern")

    def configured(module: str, layer: int) -> Adapters:
        name = f"{layer_prefix(model, layer)}{module}"
        rank, alpha = _pattern(ranks, name, adapters.rank), _pattern(alphas, name, adapters.alpha)
        return dataclasses.replace(adapters, rank=int(rank), alpha=float(alpha))

    for module, by_layer in by_module.items():
        inputs, outputs = widths(model, matrices[module])
        for layer, parts in by_layer.items():
            rank = configured(module, layer).rank
            shapes = {"a": (rank, inputs), "b": (sum(outputs), rank), "magnitude": (sum(outputs),)}
            problems += _part_problems(f"layer {layer}, {module}", parts, {part: shapes[part] for part in kinds})
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
            part = part_of(model, "/".join(path))
            columns = slice(None) if part is None else part.columns
            leaf = {name: array if name == "a" else array[..., columns] for name, array in stacked.items()}
            set_leaf(tree, path, {name: jnp.array(array) for name, array in leaf.items()})
    span = None if len(layers) == model.num_layers else (layers.start, layers.stop)
    lora: Params = {"layers": tree} | ({"rows": rows} if rows else {})
    return dataclasses.replace(adapters, layers=span, tokens=tokens), {"lora": lora, **score}


def _stack(by_layer: dict[int, Parts], scales: dict[int, float]) -> Parts:
    """Stack one matrix over the layers of `scales`: "a" [n, in, r], "b" [n, r, out] and "magnitude" [n, out].

    B is multiplied by its layer's scale; layers without adapters are zero, with a magnitude of NaN.
    """
    max_rank = max(len(parts["a"]) for parts in by_layer.values())
    first = next(iter(by_layer.values()))
    absent = {part: np.full_like(array, np.nan if part == "magnitude" else 0) for part, array in first.items()}
    stacked = defaultdict(list)
    for layer, scale in scales.items():
        parts = by_layer.get(layer, absent)
        padding = (0, max_rank - len(parts["a"]))
        stacked["a"].append(np.pad(parts["a"].T, ((0, 0), padding)))
        stacked["b"].append(np.pad(parts["b"].T * scale, (padding, (0, 0))))
        if "magnitude" in parts:
            stacked["magnitude"].append(parts["magnitude"])
    return {part: np.stack(arrays) for part, arrays in stacked.items()}


def _location(name: str, model: ModelConfig, matrices: Mapping[str, list[Module]]) -> tuple[str, int, str] | None:
    """(module, layer, part) of a tensor of the file; None if it is not an adapter of this model."""
    match = re.fullmatch(r"(.+?\.)(\d+)\.(.+?)\.(lora_.+)", name)
    if match is None or match[4] not in _PARTS or match[3] not in matrices:
        return None
    layer = int(match[2])
    fits = layer in model.layers_with(matrices[match[3]][0][0]) and f"{match[1]}{layer}." == layer_prefix(model, layer)
    return (match[3], layer, _PARTS[match[4]]) if fits else None


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

"""Reading of adapters in PEFT's layout."""

import dataclasses
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrlhf.errors import DataError
from jaxrlhf.models import Adapters, ModelConfig
from jaxrlhf.types import Params
from jaxrlhf.weights import safetensors
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.mapping import set_leaf
from jaxrlhf.weights.names import layer_prefix, projections
from jaxrlhf.weights.peft import token_rows
from jaxrlhf.weights.peft.layout import PREFIX, SCORES, WEIGHTS, read_fields, widths

_PARTS = {
    "lora_A.weight": "a",
    "lora_B.weight": "b",
    "lora_magnitude_vector.weight": "magnitude",
    "lora_magnitude_vector": "magnitude",
}
Parts = dict[str, np.ndarray]  # of one matrix, as stored: "a" [r, in], "b" [out, r] and, for DoRA, "magnitude" [out]


def read(folder: Path, model: ModelConfig) -> tuple[Adapters, Params]:
    """(static description, {"lora": float32 arrays and, if stored, "score"}) of the adapters in a folder.

    Smaller ranks are padded with zeros and differing scales are folded into B, so that one rank and one scale hold for
    all matrices. Raises DataError for adapters other than LoRA and DoRA, and for adapters of another model, listing the
    names and shapes that do not fit.
    """
    fields = read_fields(folder)
    if fields.values.get("peft_type") != "LORA":
        fields.refuse("peft_type", "'LORA', the only supported kind of adapters")
    if fields.values.get("bias", "none") != "none":
        fields.refuse("bias", "'none': trained biases are not supported")
    adapters = Adapters(fields.integer("r"), fields.number("lora_alpha"), fields.boolean("use_rslora", False))
    tokens = token_rows.indices(fields, model)
    matrices, row_tensors = projections(model), token_rows.row_tensors(model)
    by_module: dict[str, dict[int, Parts]] = defaultdict(lambda: defaultdict(dict))
    score: Params = {}
    row_arrays: dict[str, np.ndarray] = {}
    problems = []
    for full_name, entry in safetensors.scan(folder / WEIGHTS).items():
        name = full_name.removeprefix(PREFIX)
        if location := _location(name, model, matrices):
            module, layer, part = location
            by_module[module][layer][part] = safetensors.read(entry).astype(np.float32)
        elif model.head == "linear" and full_name in SCORES:
            score = {"score": {"kernel": jnp.asarray(safetensors.read(entry).astype(np.float32).T)}}
        elif full_name.startswith(PREFIX) and name in row_tensors:
            row_arrays[name] = safetensors.read(entry).astype(np.float32)
        else:
            problems.append(f"unexpected: {full_name} {list(entry.shape)}")
    ranks, alphas = _patterns(fields, "rank_pattern"), _patterns(fields, "alpha_pattern")
    for module, by_layer in by_module.items():
        problems += _shape_problems(module, by_layer, *widths(model, matrices[module]))
    rows, row_problems = token_rows.from_tensors(row_arrays, tokens, model)
    problems += row_problems
    if problems or not by_module:
        raise DataError(
            f"{folder}: these adapters do not fit the model ({model.family}, {model.num_layers} layers, hidden size "
            f"{model.hidden_size}):\n  " + "\n  ".join(problems[:20] or ["there are none in the file"])
        )
    all_layers = {layer for by_layer in by_module.values() for layer in by_layer}
    layers = range(min(all_layers), max(all_layers) + 1)
    tree: Params = {}
    for module, by_layer in by_module.items():
        scales = {}
        for layer in layers:
            name = f"{layer_prefix(model, layer)}{module}"
            rank, alpha = _pattern(ranks, name, adapters.rank), _pattern(alphas, name, adapters.alpha)
            own = dataclasses.replace(adapters, rank=int(rank), alpha=float(alpha))
            scales[layer] = own.scale / adapters.scale
        stacked = _stack(by_layer, scales)
        paths = matrices[module]
        ends = np.cumsum(widths(model, paths)[1])[:-1]
        split = {part: np.split(array, ends, axis=-1) for part, array in stacked.items() if part != "a"}
        for i, path in enumerate(paths):
            leaf = {"a": stacked["a"]} | {part: arrays[i] for part, arrays in split.items()}
            set_leaf(tree, path, {part: jnp.array(array) for part, array in leaf.items()})
    span = None if len(layers) == model.num_layers else (layers.start, layers.stop)
    lora: Params = {"layers": tree} | ({"rows": rows} if rows else {})
    return dataclasses.replace(adapters, layers=span, tokens=tokens), {"lora": lora, **score}


def _stack(by_layer: dict[int, Parts], scales: dict[int, float]) -> Parts:
    """Stack one matrix over the layers of `scales`: "a" [n, in, r], "b" [n, r, out] and "magnitude" [n, out].

    B is multiplied by its layer's scale; layers without adapters are zero.
    """
    max_rank = max(len(parts["a"]) for parts in by_layer.values())
    zeros = {part: np.zeros_like(array) for part, array in next(iter(by_layer.values())).items()}
    stacked = defaultdict(list)
    for layer, scale in scales.items():
        parts = by_layer.get(layer, zeros)
        padding = (0, max_rank - len(parts["a"]))
        stacked["a"].append(np.pad(parts["a"].T, ((0, 0), padding)))
        stacked["b"].append(np.pad(parts["b"].T * scale, (padding, (0, 0))))
        if "magnitude" in parts:
            stacked["magnitude"].append(parts["magnitude"].reshape(-1))
    return {part: np.stack(arrays) for part, arrays in stacked.items()}


def _location(name: str, model: ModelConfig, matrices: Iterable[str]) -> tuple[str, int, str] | None:
    """(module, layer, part) of a tensor of the file; None if it is not an adapter of this model."""
    match = re.fullmatch(r"(.+?\.)(\d+)\.(.+?)\.(lora_.+)", name)
    if match is None or match[4] not in _PARTS or match[3] not in matrices:
        return None
    layer = int(match[2])
    fits = layer < model.num_layers and f"{match[1]}{layer}." == layer_prefix(model, layer)
    return (match[3], layer, _PARTS[match[4]]) if fits else None


def _shape_problems(module: str, by_layer: dict[int, Parts], inputs: int, outputs: list[int]) -> list[str]:
    problems = []
    for layer, parts in by_layer.items():
        where = f"layer {layer}, {module}"
        if not {"a", "b"} <= parts.keys():
            problems.append(f"missing: {where} has only {', '.join(sorted(parts))} of A and B")
        elif parts["a"].shape[1:] != (inputs,) or parts["b"].shape != (sum(outputs), len(parts["a"])):
            problems.append(
                f"wrong shape: {where} has A {list(parts['a'].shape)} and B {list(parts['b'].shape)}; the model makes "
                f"them [r, {inputs}] and [{sum(outputs)}, r]"
            )
    return problems


def _patterns(fields: Fields, key: str) -> dict[str, Any]:
    patterns = fields.mapping(key)
    if not all(re.fullmatch(r"\^?[\w.]+", p) and isinstance(v, int | float) for p, v in patterns.items()):
        fields.refuse(key, "numbers by names of modules; regular expressions are not supported")
    return patterns


def _pattern(patterns: dict[str, Any], name: str, default: float) -> float:
    """The value of the first pattern that is a suffix of the module's name or, after "^", the whole name."""
    return next((v for p, v in patterns.items() if f"^{name}" == p or f".{name}".endswith(f".{p}")), default)

"""Writing of adapters in PEFT's layout."""

import dataclasses
import json
import re
from pathlib import Path

import numpy as np

from jaxrlhf.lora import modules_of
from jaxrlhf.models import Adapters, ModelConfig
from jaxrlhf.types import Params
from jaxrlhf.weights import families, writer
from jaxrlhf.weights.mapping import leaf_at
from jaxrlhf.weights.names import Part, layer_prefix
from jaxrlhf.weights.peft import experts, token_rows
from jaxrlhf.weights.peft.layout import CONFIG, PREFIX, WEIGHTS


def write(
    folder: Path, model: ModelConfig, params: Params, base: str, revision: str | None = None, multimodal: bool = False
) -> None:
    """Write the adapters in `params` for the model `base`, with token rows and a linear score head if there are any.

    For a `multimodal` base, names and target modules are those of the text model inside it. `base` must have rows for
    the tokens. Where the folder joins several matrices in one tensor (GPT-2's c_attn), their A are
    concatenated and their B placed on the block diagonal: the same product, at the sum of their ranks. So are gate
    and up of experts, for which PEFT's `target_parameters` are those of transformers 5.
    """
    adapters, names = model.adapters, families.tensor_names(model)
    assert adapters is not None
    tree = params["lora"]["layers"]
    trained = set(modules_of(tree))
    matrices = {}
    for module, paths in experts.writing(model).items():
        if found := [path for path in paths if path in trained]:
            matrices[module] = found
    first, last = adapters.layers or (0, model.num_layers)
    ranks: dict[str, int] = {}
    tensors: dict[str, np.ndarray] = {}
    for module, paths in matrices.items():
        parts = [experts.part(model, module, path) for path in paths]
        joined = _join([leaf_at(tree, path) for path in paths], parts)
        rank = joined["lora_A.weight"].shape[-2]
        if rank != adapters.rank:
            ranks[module] = rank
        layers = [layer for layer in model.layers_with(paths[0][0]) if first <= layer < last]
        for i, layer in enumerate(layers):
            prefix = f"{layer_prefix(model, layer)}{experts.wrapped_name(module, matrices)}"
            tensors |= {
                f"{prefix}.{part}": experts.joined("a" if part == "lora_A.weight" else "b", array[i])
                for part, array in joined.items()
            }
    if model.head == "linear":
        tensors["score.weight"] = np.asarray(params["score"]["kernel"], np.float32).T
    row_arrays, token_ids = token_rows.to_tensors(model, params["lora"].get("rows", {}))
    tensors |= row_arrays
    parameters = [name for module in matrices if (name := experts.parameter(module))]
    targets: list[str] | str = [module for module in matrices if not experts.parameter(module)]
    if adapters.layers:  # PEFT applies layers_to_transform to target_modules only
        parameters = [f"{layer_prefix(model, layer)}{name}" for layer in range(first, last) for name in parameters]
    if multimodal:
        tensors = {families.multimodal.outer_name(name, names.decoder): array for name, array in tensors.items()}
        layers = "|".join(map(str, range(first, last)))  # PEFT allows no layers_to_transform beside an expression
        targets = rf".*\.language_model\.layers\.({layers})\.({'|'.join(map(re.escape, matrices))})"
    all_layers = adapters.layers is None or multimodal
    writer.write_file(folder / WEIGHTS, [_source(PREFIX + name, array) for name, array in tensors.items()])
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.head == "lm" else "SEQ_CLS",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "use_rslora": adapters.rank_stabilised,
        "use_dora": any("magnitude" in leaf_at(tree, path) for path in trained),
        "target_modules": targets,
        "target_parameters": parameters or None,
        "layers_to_transform": None if all_layers else list(range(first, last)),
        "layers_pattern": None if all_layers else names.layer.partition(".")[0],
        "rank_pattern": ranks,
        "alpha_pattern": {module: _alpha(adapters, rank) for module, rank in ranks.items()},
        "fan_in_fan_out": not names.transposed,
        "bias": "none",
        token_rows.KEY: token_ids,
        "modules_to_save": None if model.head == "lm" else ["score"],
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _join(adapters: list[Params], parts: list[Part | None]) -> dict[str, np.ndarray]:
    """{name in PEFT's layout: array over layers} of the tensor that joins matrices with these adapters, as `parts`."""
    arrays = [{name: np.asarray(value, np.float32) for name, value in leaf.items()} for leaf in adapters]
    outputs = arrays[0]["b"].shape[-1] if parts[0] is None else parts[0].groups * sum(parts[0].widths)
    a = np.concatenate([leaf["a"] for leaf in arrays], axis=-1)
    b, row = np.zeros((*a.shape[:-2], a.shape[-1], outputs), np.float32), 0
    magnitude = np.zeros((len(a), outputs), np.float32)
    for leaf, part in zip(arrays, parts, strict=True):
        rank = leaf["b"].shape[-2]
        columns = np.arange(outputs) if part is None else part.columns
        b[..., row : row + rank, columns] = leaf["b"]
        magnitude[:, columns] = leaf.get("magnitude", 0)
        row += rank
    joined = {"lora_A.weight": a.swapaxes(-1, -2), "lora_B.weight": b.swapaxes(-1, -2)}
    return joined | ({"lora_magnitude_vector": magnitude} if "magnitude" in arrays[0] else {})


def _alpha(adapters: Adapters, rank: int) -> float:
    """The `lora_alpha` that gives the scale of `adapters` at another rank."""
    return adapters.scale * (adapters.alpha / dataclasses.replace(adapters, rank=rank).scale)


def _source(name: str, array: np.ndarray) -> writer.Source:
    return writer.Source(name, np.dtype(np.float32), array.shape, lambda: np.ascontiguousarray(array))

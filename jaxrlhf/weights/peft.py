"""Adapters in PEFT's layout (adapter_config.json, adapter_model.safetensors), in and out."""

import dataclasses
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.lora import Module, modules_of
from jaxrlhf.models import Adapters, ModelConfig, init
from jaxrlhf.types import Params
from jaxrlhf.weights import safetensors, trainable_tokens, writer
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.mapping import leaf_at
from jaxrlhf.weights.names import layer_prefix, projections

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
ALL = "all-linear"
_PREFIX = "base_model.model."
_SCORES = (f"{_PREFIX}score.weight", f"{_PREFIX}score.modules_to_save.weight")
_PARTS = {"lora_A.weight": "a", "lora_B.weight": "b", "lora_magnitude_vector.weight": "magnitude",
          "lora_magnitude_vector": "magnitude"}  # fmt: skip


def modules(model: ModelConfig, targets: Sequence[str]) -> list[Module]:
    """The matrices of a layer that `targets` mean: names as in PEFT ("q_proj", "self_attn.q_proj"), or `all-linear`.

    Raises ConfigError for a name that no matrix has, with those that there are.
    """
    known = projections(model)
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in known))
    found: dict[Module, None] = {}
    for target in targets:
        named = [ours for name, ours in known.items() if target == ALL or f".{name}".endswith(f".{target}")]
        if not named:
            raise ConfigError(
                f"lora.target_modules: a {model.family} has no '{target}'{did_you_mean(target, short)}; it has "
                f"{', '.join(short)}, or {ALL} for all of them"
            )
        found |= dict.fromkeys(module for ours in named for module in ours)
    return list(found)


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds adapters and not a whole model."""
    return (folder / CONFIG).is_file() and not (folder / "config.json").is_file()


def base_of(folder: Path) -> tuple[str, str | None]:
    """(path or hub id, revision) of the model that adapters were made for. Raises DataError where they do not say."""
    fields = _fields(folder)
    base = fields.values.get("base_model_name_or_path")
    if not isinstance(base, str) or not base:
        fields.refuse("base_model_name_or_path", "the model that these adapters are for; write its path there")
    revision = fields.values.get("revision")
    return base, revision if isinstance(revision, str) and revision else None


def labels(folder: Path) -> int:
    """The number of outputs of the score head that comes with the adapters; 0: none."""
    entries = safetensors.scan(folder / WEIGHTS)
    return next((e.shape[0] for name, e in entries.items() if name in _SCORES), 0)


def read(folder: Path, model: ModelConfig) -> tuple[Adapters, Params]:
    """(what is static, {"lora": float32 arrays, and "score" where there is a head}) of the adapters in a folder, with
    the rows of its `trainable_token_indices`.

    Ranks that differ are filled up with zeros, scales that differ are put into B, so that one rank and one scale hold
    for all. Raises DataError for adapters of another kind than LoRA and DoRA, and for those of another model, with the
    names and shapes that do not fit.
    """
    fields = _fields(folder)
    if fields.values.get("peft_type") != "LORA":
        fields.refuse("peft_type", "'LORA', the one kind of adapters that is supported")
    if fields.values.get("bias", "none") != "none":
        fields.refuse("bias", "'none': trained biases are not supported")
    rank, alpha = fields.count("r"), fields.number("lora_alpha")
    adapters = Adapters(rank, alpha, fields.flag("use_rslora", False))
    known, tables = projections(model), {_PREFIX + name: name for name in trainable_tokens.names(model)}
    tokens = trainable_tokens.indices(fields, model)
    entries = safetensors.scan(folder / WEIGHTS)
    pieces: dict[str, dict[int, dict[str, np.ndarray]]] = {}
    head: dict[str, np.ndarray] = {}
    of_tokens: dict[str, np.ndarray] = {}
    strange = []
    for name, entry in entries.items():
        found = _place(name.removeprefix(_PREFIX), model, known)
        if found is not None:
            module, layer, part = found
            pieces.setdefault(module, {}).setdefault(layer, {})[part] = safetensors.read(entry).astype(np.float32)
        elif model.head == "linear" and name in _SCORES:
            head["kernel"] = safetensors.read(entry).astype(np.float32).T
        elif name in tables:
            of_tokens[tables[name]] = safetensors.read(entry).astype(np.float32)
        else:
            strange.append(f"unexpected: {name} {list(entry.shape)}")
    patterns = fields.mapping("rank_pattern"), fields.mapping("alpha_pattern")
    for key, found in zip(("rank_pattern", "alpha_pattern"), patterns, strict=True):
        if not all(re.fullmatch(r"\^?[\w.]+", p) and isinstance(v, int | float) for p, v in found.items()):
            fields.refuse(key, "numbers by names of modules; regular expressions are not supported")
    tree: Params = {}
    layers = [layer for found in pieces.values() for layer in found]
    first, last = min(layers, default=0), max(layers, default=model.num_layers - 1) + 1
    for module, found in pieces.items():
        widths = _widths(model, known[module])
        strange += _misfits(module, found, widths)
    rows, wrong = trainable_tokens.rows(of_tokens, tokens, model)
    strange += wrong
    if strange or not pieces:
        raise DataError(
            f"{folder}: these adapters do not fit the model ({model.family}, {model.num_layers} layers, hidden size "
            f"{model.hidden_size}):\n  " + "\n  ".join(strange[:20] or ["there are none in the file"])
        )
    for module, found in pieces.items():
        most = max(parts["a"].shape[0] for parts in found.values())
        whole: dict[str, list[np.ndarray]] = {}
        for layer in range(first, last):
            parts = found.get(layer) or _nothing(next(iter(found.values())))
            name = f"{layer_prefix(model, layer)}{module}"
            own = Adapters(
                int(_pattern(patterns[0], name, rank)),
                float(_pattern(patterns[1], name, alpha)),
                adapters.rank_stabilised,
            )
            room = most - parts["a"].shape[0]
            whole.setdefault("a", []).append(np.pad(parts["a"].T, ((0, 0), (0, room))))
            b = parts["b"].T * (own.scale / adapters.scale)
            whole.setdefault("b", []).append(np.pad(b, ((0, room), (0, 0))))
            if "magnitude" in parts:
                whole.setdefault("magnitude", []).append(parts["magnitude"].reshape(-1))
        stacked = {part: np.stack(arrays) for part, arrays in whole.items()}
        ours = known[module]
        ends = np.cumsum(_widths(model, ours)[1])[:-1]
        for path, *split in zip(ours, *(np.split(stacked[p], ends, axis=-1) for p in stacked if p != "a"), strict=True):
            named = dict(zip([p for p in stacked if p != "a"], split, strict=True))
            here = tree
            for key in path[:-1]:
                here = here.setdefault(key, {})
            here[path[-1]] = {"a": jnp.array(stacked["a"]), **{k: jnp.array(v) for k, v in named.items()}}
    span = None if (first, last) == (0, model.num_layers) else (first, last)
    found_params: Params = {"lora": {"layers": tree} | ({"rows": rows} if rows else {})}
    if head:
        found_params["score"] = {"kernel": jnp.asarray(head["kernel"])}
    return dataclasses.replace(adapters, layers=span, tokens=tokens), found_params


def write(folder: Path, model: ModelConfig, params: Params, base: str, revision: str | None = None) -> None:
    """Write the adapters in `params`, and a linear score head beside them, for the model `base`; rows of tokens too,
    which that must have room for.

    Where the folder's layout has several of our matrices in one (GPT-2's c_attn), their A are put side by side and
    their B on the diagonal: the same product at the sum of their ranks.
    """
    adapters = model.adapters
    assert adapters is not None
    known, tree = projections(model), params["lora"]["layers"]
    first, last = adapters.layers or (0, model.num_layers)
    have, sources = set(modules_of(tree)), []
    ranks: dict[str, int] = {}
    for module, ours in known.items():
        trained = [path for path in ours if path in have]
        if not trained:
            continue
        outputs = _widths(model, ours)[1]
        arrays = {path: {k: np.asarray(v, np.float32) for k, v in leaf_at(tree, path).items()} for path in trained}
        rank = sum(parts["a"].shape[-1] for parts in arrays.values())
        if rank != adapters.rank:
            ranks[module] = rank
        for layer in range(last - first):
            a = np.concatenate([parts["a"][layer] for parts in arrays.values()], axis=1)
            b, row = np.zeros((rank, sum(outputs)), np.float32), 0
            magnitude = []
            for path, start, width in zip(ours, np.cumsum([0, *outputs]), outputs, strict=False):
                if path in arrays:
                    part = arrays[path]["b"][layer]
                    b[row : row + len(part), start : start + width] = part
                    row += len(part)
                    magnitude.append(arrays[path].get("magnitude", np.zeros((last - first, 0), np.float32))[layer])
            name = f"{_PREFIX}{layer_prefix(model, first + layer)}{module}"
            made = {"lora_A.weight": a.T, "lora_B.weight": b.T}
            if sum(map(len, magnitude)):
                made["lora_magnitude_vector"] = np.concatenate(magnitude)
            sources += [_source(f"{name}.{part}", array) for part, array in made.items()]
    if model.head == "linear":
        sources.append(_source(f"{_PREFIX}score.weight", np.asarray(params["score"]["kernel"], np.float32).T))
    of_tokens, indices = trainable_tokens.layout(model, params["lora"].get("rows", {}))
    sources += [_source(_PREFIX + name, array) for name, array in of_tokens.items()]
    writer.write_file(folder / WEIGHTS, sources)
    names = [module for module, ours in known.items() if set(ours) & have]
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM" if model.head == "lm" else "SEQ_CLS",
        "base_model_name_or_path": base,
        "revision": revision,
        "r": adapters.rank,
        "lora_alpha": adapters.alpha,
        "lora_dropout": adapters.dropout,
        "use_rslora": adapters.rank_stabilised,
        "use_dora": any("magnitude" in leaf_at(tree, path) for path in have),
        "target_modules": names,
        "layers_to_transform": None if adapters.layers is None else list(range(first, last)),
        "layers_pattern": None if adapters.layers is None else ("h" if model.family == "gpt2" else "layers"),
        "rank_pattern": ranks,
        "alpha_pattern": {module: adapters.scale * _base(rank, adapters) for module, rank in ranks.items()},
        "fan_in_fan_out": model.family == "gpt2",
        "bias": "none",
        trainable_tokens.KEY: indices,
        "modules_to_save": None if model.head == "lm" else ["score"],
        "init_lora_weights": True,
        "inference_mode": True,
    }
    (folder / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _base(rank: int, adapters: Adapters) -> float:
    """What alpha is divided by."""
    return adapters.alpha / dataclasses.replace(adapters, rank=rank).scale


def _fields(folder: Path) -> Fields:
    return Fields(safetensors.read_json(folder / CONFIG), str(folder / CONFIG))


def _place(name: str, model: ModelConfig, known: Iterable[str]) -> tuple[str, int, str] | None:
    """(module, layer, part) of a tensor of the file."""
    match = re.fullmatch(r"(.+?\.)(\d+)\.(.+?)\.(lora_.+)", name)
    if match is None or match[4] not in _PARTS or match[3] not in known:
        return None
    layer = int(match[2])
    fits = layer < model.num_layers and f"{match[1]}{layer}." == layer_prefix(model, layer)
    return (match[3], layer, _PARTS[match[4]]) if fits else None


def _widths(model: ModelConfig, ours: Sequence[Module]) -> tuple[int, list[int]]:
    """(inputs, outputs of each) of the matrices that one module holds."""
    layers = jax.eval_shape(lambda: init(model, jax.random.key(0)))["layers"]
    shapes = [leaf_at(layers, path)["kernel"].shape for path in ours]
    return shapes[0][1], [shape[2] for shape in shapes]


def _misfits(module: str, found: dict[int, dict[str, np.ndarray]], widths: tuple[int, list[int]]) -> list[str]:
    """What is wrong with the arrays of a module."""
    inputs, outputs = widths
    wrong = []
    for layer, parts in found.items():
        where = f"layer {layer}, {module}"
        if not {"a", "b"} <= parts.keys():
            wrong.append(f"missing: {where} has only {', '.join(sorted(parts))} of A and B")
        elif parts["a"].shape[1:] != (inputs,) or parts["b"].shape != (sum(outputs), len(parts["a"])):
            wrong.append(
                f"wrong shape: {where} has A {list(parts['a'].shape)} and B {list(parts['b'].shape)}; the model makes "
                f"them [r, {inputs}] and [{sum(outputs)}, r]"
            )
    return wrong


def _nothing(like: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Adapters that change nothing, for a layer without."""
    return {part: np.zeros_like(array) for part, array in like.items()}


def _pattern(patterns: dict[str, Any], name: str, default: float) -> float:
    """The value of the first pattern that is the end of the module's name, or, from "^" on, all of it."""
    return next((v for p, v in patterns.items() if f"^{name}" == p or f".{name}".endswith(f".{p}")), default)


def _source(name: str, array: np.ndarray) -> writer.Source:
    return writer.Source(name, np.dtype(np.float32), array.shape, lambda: np.ascontiguousarray(array))

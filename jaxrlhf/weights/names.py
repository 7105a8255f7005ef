"""Correspondence between the tensors of a Hugging Face folder and the leaves of the parameter tree."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.heads import MLP_SIZES
from jaxrlhf.weights.families import tensor_names

Path = tuple[str, ...]
Index = tuple[int, ...]
"""Position of a tensor in its leaf: () the leaf itself, (layer,) or (layer, expert)."""


@dataclass(frozen=True)
class Part:
    """The columns of one matrix in a tensor that joins several: block `number` of each of `groups` equal groups."""

    number: int
    widths: tuple[int, ...]  # of the blocks of a group
    groups: int = 1

    @property
    def columns(self) -> np.ndarray:
        """Their indices in the joined tensor, in order."""
        start = sum(self.widths[: self.number])
        groups = np.arange(self.groups * sum(self.widths)).reshape(self.groups, -1)
        return groups[:, start : start + self.widths[self.number]].ravel()


@dataclass(frozen=True)
class Tensor:
    """One tensor of a folder: the part `index` of the leaf at `path`, stored as it is or transposed."""

    name: str
    path: Path
    index: Index
    transpose: bool
    part: Part | None = None  # along its last axis, for a tensor that joins several leaves


def tensors(model: ModelConfig) -> list[Tensor]:
    """All leaves of `init(model)` and all tensors of its folder.

    A leaf stacked over layers (and experts) has one entry for each; a tensor that joins several leaves (GPT-2's c_attn)
    has one entry per leaf.
    """
    return [*_decoder_tensors(model), *_head_tensors(model)]


def projections(model: ModelConfig) -> dict[str, list[Path]]:
    """The matrices of a layer: {name in the folder ("self_attn.q_proj"): paths of the kernels that it joins}."""
    modules, result = tensor_names(model).modules, {}
    for module, (weight, _) in _layer_modules(model).items():
        if weight == "kernel":
            result.setdefault(modules[module], []).append(tuple(module.split("/")))
    return result


def part_of(model: ModelConfig, module: str) -> Part | None:
    """The columns of a module of a layer ("attention/q") in its tensor; None if it is the whole tensor."""
    names = tensor_names(model)
    joined = [other for other, name in names.modules.items() if name == names.modules[module]]
    if len(joined) == 1:
        return None
    kv_width = model.num_kv_heads * model.head_dim
    widths = {"attention/q": model.num_heads * model.head_dim, "attention/k": kv_width, "attention/v": kv_width}
    groups = model.num_heads if names.joined_by_head else 1
    return Part(joined.index(module), tuple(widths.get(name, model.mlp_size) // groups for name in joined), groups)


def layer_prefix(model: ModelConfig, layer: int) -> str:
    """Prefix of the names of a layer's tensors."""
    names = tensor_names(model)
    return names.decoder + names.layer.format(layer)


def _decoder_tensors(model: ModelConfig) -> Iterator[Tensor]:
    names = tensor_names(model)
    yield Tensor(f"{names.decoder}{names.embedding}.weight", ("embed", "embedding"), (), False)
    if model.rope is None:
        yield Tensor(f"{names.decoder}{names.positions}.weight", ("positions", "embedding"), (), False)
    for layer in range(model.num_layers):
        for module, (weight, has_bias) in _layer_modules(model).items():
            name, path = names.modules[module], ("layers", *module.split("/"))
            if layer not in (stacked := model.layers_with(path[1])):
                continue
            position = (stacked.index(layer),)
            part, prefix = part_of(model, module), f"{layer_prefix(model, layer)}{name}"
            transpose = weight == "kernel" and names.transposed
            if weight:
                yield Tensor(f"{prefix}.weight", (*path, weight), position, transpose, part)
            else:
                yield Tensor(prefix, path, position, False)
            if has_bias:
                yield Tensor(f"{prefix}.bias", (*path, "bias"), position, False, part)
        if model.num_experts:
            yield from _expert_tensors(model, layer)
    yield Tensor(f"{names.decoder}{names.final_norm}.weight", ("norm", "scale"), (), False)
    if model.norm == "layernorm":
        yield Tensor(f"{names.decoder}{names.final_norm}.bias", ("norm", "bias"), (), False)


def _expert_tensors(model: ModelConfig, layer: int) -> Iterator[Tensor]:
    names, prefix = tensor_names(model).modules, layer_prefix(model, layer)
    yield Tensor(f"{prefix}{names['experts/router']}.weight", ("layers", "experts", "router", "kernel"), (layer,), True)
    for module in ("gate", "up", "down"):
        path = ("layers", "experts", module, "kernel")
        for expert in range(model.num_experts):
            name = names[f"experts/{module}"].format(expert)
            yield Tensor(f"{prefix}{name}.weight", path, (layer, expert), True)


def _layer_modules(model: ModelConfig) -> dict[str, tuple[str, bool]]:
    """{module of a layer: (name of its weight in the parameter tree, whether it has a bias)}.

    The name is "" if the module is itself an array.
    """
    norm = ("scale", model.norm == "layernorm")
    before, after = model.norm_placement != "post", model.norm_placement != "pre"
    modules: dict[str, tuple[str, bool]] = {"attention_norm": norm} if before else {}
    modules |= {f"attention/{name}": ("kernel", model.qkv_bias) for name in "qkv"}
    modules["attention/o"] = ("kernel", model.attention_out_bias)
    if model.qk_norm:
        modules |= {"attention/q_norm": ("scale", False), "attention/k_norm": ("scale", False)}
    if model.delta is not None:
        modules |= {f"delta/{name}": ("kernel", False) for name in ("qkv", "z", "beta", "decay", "o")}
        modules |= {"delta/conv": ("taps", False), "delta/norm": ("scale", False)}
        modules |= {"delta/log_rate": ("", False), "delta/step_bias": ("", False)}
    modules |= {"attention_post_norm": norm} if after else {}
    modules |= {"mlp_norm": norm} if before else {}
    names = () if model.num_experts else ("gate", "up", "down") if model.gated_mlp else ("up", "down")
    modules |= {f"mlp/{name}": ("kernel", model.mlp_bias) for name in names}
    return modules | ({"mlp_post_norm": norm} if after else {})


def _head_tensors(model: ModelConfig) -> Iterator[Tensor]:
    if model.head == "lm" and not model.tie_embeddings:
        yield Tensor(f"{tensor_names(model).lm_head}.weight", ("lm_head", "kernel"), (), True)
    if model.head == "linear":
        yield Tensor("score.weight", ("score", "kernel"), (), True)
    if model.head == "mlp":  # transformers has no such head: the names are jaxrlhf's own
        for i in range(len(MLP_SIZES) + 1):
            yield Tensor(f"score.dense_{i}.weight", ("score", f"dense_{i}", "kernel"), (), True)
            yield Tensor(f"score.dense_{i}.bias", ("score", f"dense_{i}", "bias"), (), False)

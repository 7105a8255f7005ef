"""Correspondence between the tensors of a Hugging Face folder and the leaves of the parameter tree."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.heads import MLP_SIZES
from jaxrlhf.weights.families import tensor_names

Path = tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a folder: the leaf at `path`, or its layer `layer`, stored as it is or transposed."""

    name: str
    path: Path
    layer: int | None
    transpose: bool
    part: tuple[int, int] = (0, 1)  # (i, n): the leaf is part i of the n that the tensor joins along its last axis


def tensors(model: ModelConfig) -> list[Tensor]:
    """All leaves of `init(model)` and all tensors of its folder.

    A leaf stacked over layers has one entry per layer; a tensor that joins several leaves (GPT-2's c_attn) has one
    entry per leaf.
    """
    return [*_decoder_tensors(model), *_head_tensors(model)]


def projections(model: ModelConfig) -> dict[str, list[Path]]:
    """The matrices of a layer: {name in the folder ("self_attn.q_proj"): paths of the kernels that it joins}."""
    modules, result = tensor_names(model).modules, {}
    for module, (weight, _) in _layer_modules(model).items():
        if weight == "kernel":
            result.setdefault(modules[module], []).append(tuple(module.split("/")))
    return result


def layer_prefix(model: ModelConfig, layer: int) -> str:
    """Prefix of the names of a layer's tensors."""
    names = tensor_names(model)
    return names.decoder + names.layer.format(layer)


def _decoder_tensors(model: ModelConfig) -> Iterator[Tensor]:
    names = tensor_names(model)
    yield Tensor(f"{names.decoder}{names.embedding}.weight", ("embed", "embedding"), None, False)
    if model.rope is None:
        yield Tensor(f"{names.decoder}{names.positions}.weight", ("positions", "embedding"), None, False)
    for layer in range(model.num_layers):
        for module, (weight, has_bias) in _layer_modules(model).items():
            name, path = names.modules[module], ("layers", *module.split("/"))
            joined = [other for other, other_name in names.modules.items() if other_name == name]
            part, prefix = (joined.index(module), len(joined)), f"{layer_prefix(model, layer)}{name}"
            transpose = weight == "kernel" and names.transposed
            yield Tensor(f"{prefix}.weight", (*path, weight), layer, transpose, part)
            if has_bias:
                yield Tensor(f"{prefix}.bias", (*path, "bias"), layer, False, part)
    yield Tensor(f"{names.decoder}{names.final_norm}.weight", ("norm", "scale"), None, False)
    if model.norm == "layernorm":
        yield Tensor(f"{names.decoder}{names.final_norm}.bias", ("norm", "bias"), None, False)


def _layer_modules(model: ModelConfig) -> dict[str, tuple[str, bool]]:
    """{module of a layer: (name of its weight in the parameter tree, whether it has a bias)}."""
    norm = ("scale", model.norm == "layernorm")
    before, after = model.norm_placement != "post", model.norm_placement != "pre"
    modules: dict[str, tuple[str, bool]] = {"attention_norm": norm} if before else {}
    modules |= {f"attention/{name}": ("kernel", model.qkv_bias) for name in "qkv"}
    modules["attention/o"] = ("kernel", model.attention_out_bias)
    if model.qk_norm:
        modules |= {"attention/q_norm": ("scale", False), "attention/k_norm": ("scale", False)}
    modules |= {"attention_post_norm": norm} if after else {}
    modules |= {"mlp_norm": norm} if before else {}
    for name in ("gate", "up", "down") if model.gated_mlp else ("up", "down"):
        modules[f"mlp/{name}"] = ("kernel", model.mlp_bias)
    return modules | ({"mlp_post_norm": norm} if after else {})


def _head_tensors(model: ModelConfig) -> Iterator[Tensor]:
    if model.head == "lm" and not model.tie_embeddings:
        yield Tensor("lm_head.weight", ("lm_head", "kernel"), None, True)
    if model.head == "linear":
        yield Tensor("score.weight", ("score", "kernel"), None, True)
    if model.head == "mlp":  # transformers has no such head: the names are jaxrlhf's own
        for i in range(len(MLP_SIZES) + 1):
            yield Tensor(f"score.dense_{i}.weight", ("score", f"dense_{i}", "kernel"), None, True)
            yield Tensor(f"score.dense_{i}.bias", ("score", f"dense_{i}", "bias"), None, False)

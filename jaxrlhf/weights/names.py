"""Which tensor of a Hugging Face model folder is which leaf of the parameter tree."""

from collections.abc import Iterator
from dataclasses import dataclass

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.heads import MLP_SIZES

Path = tuple[str, ...]


@dataclass(frozen=True)
class Tensor:
    """One tensor of a folder: layer `layer` of the leaf at `path` (the whole leaf if None), as it is or transposed."""

    name: str
    path: Path
    layer: int | None
    transpose: bool
    part: tuple[int, int] = (0, 1)  # part i of the n that the tensor falls into along the leaf's last axis


@dataclass(frozen=True)
class Names:
    """How one lineage of models calls its modules. A module has a weight and, where ours has one, a bias."""

    decoder: str  # prefix of everything but the heads
    embed: str
    positions: str | None
    layer: str  # with {} for its number
    norm: str
    modules: dict[Path, tuple[str, tuple[int, int]]]  # our module within a layer: (their name, part)
    transposed: bool  # kernels of layers are stored [out, in]


def _modules(**named: str) -> dict[Path, tuple[str, tuple[int, int]]]:
    return {tuple(ours.split("__")): (theirs, (0, 1)) for ours, theirs in named.items()}


LLAMA = Names(
    decoder="model.",
    embed="embed_tokens",
    positions=None,
    layer="layers.{}.",
    norm="norm",
    modules=_modules(
        attention_norm="input_layernorm",
        attention__q="self_attn.q_proj",
        attention__k="self_attn.k_proj",
        attention__v="self_attn.v_proj",
        attention__o="self_attn.o_proj",
        attention__q_norm="self_attn.q_norm",
        attention__k_norm="self_attn.k_norm",
        mlp_norm="post_attention_layernorm",
        mlp__gate="mlp.gate_proj",
        mlp__up="mlp.up_proj",
        mlp__down="mlp.down_proj",
    ),
    transposed=True,
)

GPT2 = Names(
    decoder="transformer.",
    embed="wte",
    positions="wpe",
    layer="h.{}.",
    norm="ln_f",
    modules=_modules(
        attention_norm="ln_1", attention__o="attn.c_proj", mlp_norm="ln_2", mlp__up="mlp.c_fc", mlp__down="mlp.c_proj"
    )
    | {("attention", name): ("attn.c_attn", (i, 3)) for i, name in enumerate("qkv")},
    transposed=False,
)


def tensors(model: ModelConfig) -> list[Tensor]:
    """Every leaf of `init(model)` and every tensor of its folder: a leaf stacked over layers has one entry per layer,
    a tensor that falls into parts (GPT-2's c_attn) one per part."""
    names = GPT2 if model.family == "gpt2" else LLAMA
    return [*_decoder(model, names), *_head(model)]


def projections(model: ModelConfig) -> dict[str, list[Path]]:
    """Every matrix of a layer, by the folder's name for it ("self_attn.q_proj"), and which of ours it is: several of
    one where the folder has them in one tensor, in their order."""
    names, found = GPT2 if model.family == "gpt2" else LLAMA, {}
    for module, (kind, _) in _layer_modules(model).items():
        if kind == "kernel":
            found.setdefault(names.modules[module][0], []).append(module)
    return found


def layer_prefix(model: ModelConfig, layer: int) -> str:
    """What the names of a layer's tensors begin with."""
    names = GPT2 if model.family == "gpt2" else LLAMA
    return names.decoder + names.layer.format(layer)


def _decoder(model: ModelConfig, names: Names) -> Iterator[Tensor]:
    yield Tensor(f"{names.decoder}{names.embed}.weight", ("embed", "embedding"), None, False)
    if model.rope is None:
        yield Tensor(f"{names.decoder}{names.positions}.weight", ("positions", "embedding"), None, False)
    for i in range(model.num_layers):
        for module, (kind, bias) in _layer_modules(model).items():
            theirs, part = names.modules[module]
            prefix = f"{names.decoder}{names.layer.format(i)}{theirs}"
            transpose = kind == "kernel" and names.transposed
            yield Tensor(f"{prefix}.weight", ("layers", *module, kind), i, transpose, part)
            if bias:
                yield Tensor(f"{prefix}.bias", ("layers", *module, "bias"), i, False, part)
    yield Tensor(f"{names.decoder}{names.norm}.weight", ("norm", "scale"), None, False)
    if model.norm == "layernorm":
        yield Tensor(f"{names.decoder}{names.norm}.bias", ("norm", "bias"), None, False)


def _layer_modules(model: ModelConfig) -> dict[Path, tuple[str, bool]]:
    """The modules of a layer, what their weight is called in our tree, and whether they have a bias."""
    norm_bias = model.norm == "layernorm"
    found: dict[Path, tuple[str, bool]] = {("attention_norm",): ("scale", norm_bias)}
    found |= {("attention", name): ("kernel", model.qkv_bias) for name in "qkv"}
    found[("attention", "o")] = ("kernel", model.attention_out_bias)
    if model.qk_norm:
        found |= {("attention", name): ("scale", False) for name in ("q_norm", "k_norm")}
    found[("mlp_norm",)] = ("scale", norm_bias)
    for name in ("gate", "up", "down") if model.gated_mlp else ("up", "down"):
        found[("mlp", name)] = ("kernel", model.mlp_bias)
    return found


def _head(model: ModelConfig) -> Iterator[Tensor]:
    if model.head == "lm" and not model.tie_embeddings:
        yield Tensor("lm_head.weight", ("lm_head", "kernel"), None, True)
    if model.head == "linear":
        yield Tensor("score.weight", ("score", "kernel"), None, True)
    if model.head == "mlp":  # a head of our own, so the names are our own
        for i in range(len(MLP_SIZES) + 1):
            yield Tensor(f"score.dense_{i}.weight", ("score", f"dense_{i}", "kernel"), None, True)
            yield Tensor(f"score.dense_{i}.bias", ("score", f"dense_{i}", "bias"), None, False)

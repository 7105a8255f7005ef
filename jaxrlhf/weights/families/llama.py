"""Llama and the families derived from it: Mistral, Qwen2 (also Qwen2.5; biases on q, k and v) and Qwen3 (RMSNorm over
each head of q and k).

Defaults are those of transformers, for keys that old files lack.
"""

from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families.base import Family, Key, TensorNames, activation, nullable
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import FULL, SLIDING, parse_rope, render_rope

FIXED = {
    "norm": "rmsnorm",
    "gated_mlp": True,
    "qkv_bias": False,
    "attention_out_bias": False,
    "mlp_bias": False,
    "qk_norm": False,
}
_BIAS = Key("attention_bias", Fields.boolean, False)
BIASES = {"qkv_bias": _BIAS, "attention_out_bias": _BIAS}
MLP_BIAS = {"mlp_bias": Key("mlp_bias", Fields.boolean, False)}


def keys(*, positions: int, head_dim: int | None = None) -> dict[str, Key]:
    """The keys of all families with these names; `positions` and `head_dim` are the defaults of one."""
    return {
        "hidden_size": Key("hidden_size", Fields.integer),
        "num_layers": Key("num_hidden_layers", Fields.integer),
        "num_heads": Key("num_attention_heads", Fields.integer),
        "num_kv_heads": Key("num_key_value_heads", Fields.integer, lambda values: values["num_heads"]),
        "head_dim": Key("head_dim", Fields.integer, lambda v: head_dim or v["hidden_size"] // v["num_heads"]),
        "mlp_size": Key("intermediate_size", Fields.integer),
        "max_positions": Key("max_position_embeddings", Fields.integer, positions),
        "norm_eps": Key("rms_norm_eps", Fields.number, 1e-6),
        "activation": activation("hidden_act", "silu"),
    }


def parse(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """Rotary embeddings and full attention in every layer."""
    return parse_rope(fields, values) | parse_windows(fields, values, None, every_layer=FULL)


def render(model: ModelConfig) -> dict[str, Any]:
    """The inverse of `parse`."""
    return render_rope(model)


def _parse_mistral(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """A sliding window in every layer or in none."""
    window = parse_window(fields)
    return parse_rope(fields, values) | parse_windows(
        fields, values, window, every_layer=FULL if window is None else SLIDING
    )


def _render_mistral(model: ModelConfig) -> dict[str, Any]:
    return render(model) | {"sliding_window": model.sliding_window}


def _parse_qwen(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """With `use_sliding_window`, a window in the layers of `layer_types`, or from layer `max_window_layers` on."""
    enabled = fields.boolean("use_sliding_window", False)
    first = fields.number("max_window_layers", 28, least=0)
    default = [SLIDING if enabled and i >= first else FULL for i in range(values["num_layers"])]
    window = fields.integer("sliding_window", 4096) if enabled else None
    return parse_rope(fields, values) | parse_windows(fields, values, window, default=default)


def _render_qwen(model: ModelConfig) -> dict[str, Any]:
    return _render_mistral(model) | {
        "use_sliding_window": model.sliding_window is not None,
        **render_layer_types(model),
        "max_window_layers": (*model.sliding_layers, True).index(True),  # read by versions without layer_types
    }


def parse_window(fields: Fields) -> int | None:
    """`sliding_window`: 4096 if the key is absent, and no window if it is null."""
    return nullable(Fields.integer)(fields, "sliding_window", 4096)


def parse_windows(
    fields: Fields,
    values: dict[str, Any],
    window: int | None,
    *,
    every_layer: str | None = None,
    default: list[str] | None = None,
) -> dict[str, Any]:
    """`sliding_window` and `sliding_layers`, from `layer_types` if it is there. `every_layer` is the only kind, in
    families with one kind."""
    layers = values["num_layers"]
    kinds = fields.strings("layer_types") or default or [every_layer] * layers
    allowed = {every_layer} if every_layer else {FULL} | ({SLIDING} if window else set())
    if len(kinds) != layers or not set(kinds) <= allowed:
        fields.refuse("layer_types", f"one entry for each of the {layers} layers, of {', '.join(sorted(allowed))}")
    sliding = tuple(kind == SLIDING for kind in kinds)
    return {"sliding_window": window if any(sliding) else None, "sliding_layers": sliding}


def render_layer_types(model: ModelConfig) -> dict[str, Any]:
    """`layer_types`."""
    return {"layer_types": [SLIDING if slides else FULL for slides in model.sliding_layers]}


TENSORS = TensorNames(
    decoder="model.",
    embedding="embed_tokens",
    positions=None,
    layer="layers.{}.",
    final_norm="norm",
    modules={
        "attention_norm": "input_layernorm",
        "attention/q": "self_attn.q_proj",
        "attention/k": "self_attn.k_proj",
        "attention/v": "self_attn.v_proj",
        "attention/o": "self_attn.o_proj",
        "attention/q_norm": "self_attn.q_norm",
        "attention/k_norm": "self_attn.k_norm",
        "mlp_norm": "post_attention_layernorm",
        "mlp/gate": "mlp.gate_proj",
        "mlp/up": "mlp.up_proj",
        "mlp/down": "mlp.down_proj",
    },
    transposed=True,
)

_LLAMA_KEYS = keys(positions=2048) | BIASES | MLP_BIAS
_MISTRAL_KEYS = keys(positions=131072)
_QWEN2_KEYS = keys(positions=32768)
_QWEN3_KEYS = keys(positions=32768, head_dim=128) | BIASES
FAMILIES = {
    "llama": Family("Llama", _LLAMA_KEYS, FIXED, parse, render, TENSORS),
    "mistral": Family("Mistral", _MISTRAL_KEYS, FIXED, _parse_mistral, _render_mistral, TENSORS),
    "qwen2": Family("Qwen2", _QWEN2_KEYS, FIXED | {"qkv_bias": True}, _parse_qwen, _render_qwen, TENSORS),
    "qwen3": Family("Qwen3", _QWEN3_KEYS, FIXED | {"qk_norm": True}, _parse_qwen, _render_qwen, TENSORS),
}

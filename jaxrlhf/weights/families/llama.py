"""Llama and the families derived from it: Mistral, Qwen2 (also Qwen2.5) and Qwen3.

Defaults are those of transformers, for keys that old files lack.
"""

from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families.base import Family, TensorNames, parse_activation, render_activation
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import parse_rope, render_rope


def _parse_common(fields: Fields, *, positions: int, head_dim: int | None = None) -> dict[str, Any]:
    """The fields of Llama without biases; `positions` and `head_dim` are the defaults of the family."""
    heads, width, layers = fields.integer("num_attention_heads"), fields.integer("hidden_size"), _num_layers(fields)
    max_positions = fields.integer("max_position_embeddings", positions)
    return {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.integer("num_key_value_heads", heads),
        "head_dim": fields.integer("head_dim", head_dim or width // heads),
        "mlp_size": fields.integer("intermediate_size"),
        "max_positions": max_positions,
        "norm": "rmsnorm",
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "activation": parse_activation(fields, "hidden_act", "silu"),
        "gated_mlp": True,
        "rope": parse_rope(fields, max_positions),
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "sliding_window": None,
        "sliding_layers": (False,) * layers,
    }


def _render_common(model: ModelConfig) -> dict[str, Any]:
    assert model.rope is not None
    return {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_size,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": render_activation(model.activation),
        **render_rope(model.rope),
    }


def _parse_llama(fields: Fields) -> dict[str, Any]:
    _parse_layer_types(fields, None, every_layer="full_attention")
    bias = fields.boolean("attention_bias", False)
    return _parse_common(fields, positions=2048) | {
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": fields.boolean("mlp_bias", False),
    }


def _render_llama(model: ModelConfig) -> dict[str, Any]:
    return _render_common(model) | {"attention_bias": model.qkv_bias, "mlp_bias": model.mlp_bias}


def _parse_mistral(fields: Fields) -> dict[str, Any]:
    """Llama without biases, with a sliding window in every layer or in none."""
    absent = "sliding_window" not in fields.values  # null means no window; only an absent key has the default
    window = fields.integer("sliding_window", 4096) if absent or fields.has("sliding_window") else None
    kind = "full_attention" if window is None else "sliding_attention"
    return _parse_common(fields, positions=131072) | _parse_layer_types(fields, window, every_layer=kind)


def _render_mistral(model: ModelConfig) -> dict[str, Any]:
    return _render_common(model) | {"sliding_window": model.sliding_window}


def _parse_qwen2(fields: Fields) -> dict[str, Any]:
    """Biases on q, k and v, and a sliding window in some layers."""
    return _parse_common(fields, positions=32768) | _parse_qwen_window(fields) | {"qkv_bias": True}


def _render_qwen2(model: ModelConfig) -> dict[str, Any]:
    return _render_common(model) | _render_qwen_window(model)


def _parse_qwen3(fields: Fields) -> dict[str, Any]:
    """Qwen2 with RMSNorm over each head of q and k."""
    bias = fields.boolean("attention_bias", False)
    return (
        _parse_common(fields, positions=32768, head_dim=128)
        | _parse_qwen_window(fields)
        | {"qkv_bias": bias, "attention_out_bias": bias, "qk_norm": True}
    )


def _render_qwen3(model: ModelConfig) -> dict[str, Any]:
    return _render_common(model) | {"attention_bias": model.qkv_bias} | _render_qwen_window(model)


def _parse_qwen_window(fields: Fields) -> dict[str, Any]:
    """With `use_sliding_window`, a window in the layers of `layer_types`, or from layer `max_window_layers` on."""
    enabled = fields.boolean("use_sliding_window", False)
    first = fields.number("max_window_layers", 28, least=0)
    default = ["sliding_attention" if enabled and i >= first else "full_attention" for i in range(_num_layers(fields))]
    return _parse_layer_types(fields, fields.integer("sliding_window", 4096) if enabled else None, default=default)


def _render_qwen_window(model: ModelConfig) -> dict[str, Any]:
    return {
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        "layer_types": ["sliding_attention" if slides else "full_attention" for slides in model.sliding_layers],
        "max_window_layers": (*model.sliding_layers, True).index(True),  # read by versions without layer_types
    }


def _parse_layer_types(
    fields: Fields, window: int | None, *, every_layer: str | None = None, default: list[str] | None = None
) -> dict[str, Any]:
    """`sliding_window` and `sliding_layers`. `every_layer` is the only kind allowed, in families with one kind."""
    layers = _num_layers(fields)
    kinds = fields.strings("layer_types") or default or [every_layer] * layers
    allowed = {every_layer} if every_layer else {"full_attention"} | ({"sliding_attention"} if window else set())
    if len(kinds) != layers or not set(kinds) <= allowed:
        fields.refuse("layer_types", f"one entry for each of the {layers} layers, of {', '.join(sorted(allowed))}")
    sliding = tuple(kind == "sliding_attention" for kind in kinds)
    return {"sliding_window": window if any(sliding) else None, "sliding_layers": sliding}


def _num_layers(fields: Fields) -> int:
    return fields.integer("num_hidden_layers")


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

FAMILIES = {
    "llama": Family("Llama", "ForCausalLM", _parse_llama, _render_llama, TENSORS),
    "mistral": Family("Mistral", "ForCausalLM", _parse_mistral, _render_mistral, TENSORS),
    "qwen2": Family("Qwen2", "ForCausalLM", _parse_qwen2, _render_qwen2, TENSORS),
    "qwen3": Family("Qwen3", "ForCausalLM", _parse_qwen3, _render_qwen3, TENSORS),
}

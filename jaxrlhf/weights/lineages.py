"""The two lineages of decoders, GPT-2's and Llama's: between config.json values and ModelConfig fields.

Defaults are those of transformers, for keys that old files lack.
"""

from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import parse_rope, render_rope

ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}
ACTIVATION_NAMES = {"silu": "silu", "gelu": "gelu", "gelu_tanh": "gelu_pytorch_tanh", "relu": "relu"}


def _activation(fields: Fields, key: str, default: str) -> str:
    return ACTIVATIONS[fields.choice(key, tuple(ACTIVATIONS), default) or default]


def parse_gpt2(fields: Fields) -> dict[str, Any]:
    """ModelConfig fields of GPT-2 (Radford et al. 2019)."""
    fields.refuse_set("add_cross_attention", "only decoders are supported")
    heads, width = fields.count("n_head"), fields.count("n_embd")
    if width % heads:
        fields.refuse("n_embd", f"a multiple of n_head ({heads})")
    layers = fields.count("n_layer")
    return {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "mlp_size": fields.count("n_inner", 4 * width),
        "max_positions": fields.count("n_positions", 1024),
        "norm": "layernorm",
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "activation": _activation(fields, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "rope": None,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "sliding_window": None,
        "sliding_layers": (False,) * layers,
        "attention_scale": None if fields.flag("scale_attn_weights", True) else 1.0,
        "attention_scale_by_layer": fields.flag("scale_attn_by_inverse_layer_idx", False),
    }


def render_gpt2(model: ModelConfig) -> dict[str, Any]:
    """The config.json keys that `parse_gpt2` reads."""
    return {
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.mlp_size,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": ACTIVATION_NAMES[model.activation],
        "scale_attn_weights": model.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": model.attention_scale_by_layer,
    }


def parse_llama(fields: Fields) -> dict[str, Any]:
    """ModelConfig fields of Llama and what calls itself Llama (SmolLM2, ...)."""
    _sliding_layers(fields, None, all_of="full_attention")
    bias = fields.flag("attention_bias", False)
    return _parse_lineage(fields, positions=2048) | {
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": fields.flag("mlp_bias", False),
    }


def parse_mistral(fields: Fields) -> dict[str, Any]:
    """ModelConfig fields of Mistral: Llama without biases, and one window in every layer or in none."""
    absent = "sliding_window" not in fields.values  # null is a choice here, and not the default
    window = fields.count("sliding_window", 4096) if absent or fields.has("sliding_window") else None
    sliding = _sliding_layers(fields, window, all_of="full_attention" if window is None else "sliding_attention")
    return _parse_lineage(fields, positions=131072) | sliding


def parse_qwen2(fields: Fields) -> dict[str, Any]:
    """ModelConfig fields of Qwen2 and Qwen2.5: biases on q, k and v, and a window in some layers."""
    return _parse_lineage(fields, positions=32768) | _parse_qwen_window(fields) | {"qkv_bias": True}


def parse_qwen3(fields: Fields) -> dict[str, Any]:
    """ModelConfig fields of Qwen3: norms on the heads of q and k."""
    bias = fields.flag("attention_bias", False)
    return (
        _parse_lineage(fields, positions=32768, head_dim=128)
        | _parse_qwen_window(fields)
        | {"qkv_bias": bias, "attention_out_bias": bias, "qk_norm": True}
    )


def _parse_qwen_window(fields: Fields) -> dict[str, Any]:
    """A window only with `use_sliding_window`, and then for `layer_types` or for layers `max_window_layers` and up."""
    on = fields.flag("use_sliding_window", False)
    first = fields.number("max_window_layers", 28, least=0)
    default = ["sliding_attention" if on and i >= first else "full_attention" for i in range(_layers(fields))]
    return _sliding_layers(fields, fields.count("sliding_window", 4096) if on else None, default=default)


def _sliding_layers(
    fields: Fields, window: int | None, *, all_of: str | None = None, default: list[str] | None = None
) -> dict[str, Any]:
    """The window and its layers. `all_of`: what every entry of `layer_types` must be, in families without a choice."""
    layers = _layers(fields)
    types = fields.names("layer_types") or default or [all_of] * layers
    expected = {all_of} if all_of else {"full_attention"} | ({"sliding_attention"} if window else set())
    if len(types) != layers or not set(types) <= expected:
        fields.refuse("layer_types", f"one entry for each of the {layers} layers, of {', '.join(sorted(expected))}")
    sliding = tuple(kind == "sliding_attention" for kind in types)
    return {"sliding_window": window if any(sliding) else None, "sliding_layers": sliding}


def _layers(fields: Fields) -> int:
    return fields.count("num_hidden_layers")


def _parse_lineage(fields: Fields, *, positions: int, head_dim: int | None = None) -> dict[str, Any]:
    """What Llama and its descendants share; `positions` and `head_dim` are the family's defaults."""
    heads, width, layers = fields.count("num_attention_heads"), fields.count("hidden_size"), _layers(fields)
    return {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": fields.count("num_key_value_heads", heads),
        "head_dim": fields.count("head_dim", head_dim or width // heads),
        "mlp_size": fields.count("intermediate_size"),
        "max_positions": fields.count("max_position_embeddings", positions),
        "norm": "rmsnorm",
        "norm_eps": fields.number("rms_norm_eps", 1e-6),
        "activation": _activation(fields, "hidden_act", "silu"),
        "gated_mlp": True,
        "rope": parse_rope(fields, fields.count("max_position_embeddings", positions)),
        "qkv_bias": False,
        "attention_out_bias": False,
        "mlp_bias": False,
        "qk_norm": False,
        "sliding_window": None,
        "sliding_layers": (False,) * layers,
    }


def render_lineage(model: ModelConfig) -> dict[str, Any]:
    """The config.json keys that the other families read."""
    assert model.rope is not None
    described = {
        "hidden_size": model.hidden_size,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "intermediate_size": model.mlp_size,
        "max_position_embeddings": model.max_positions,
        "rms_norm_eps": model.norm_eps,
        "hidden_act": ACTIVATION_NAMES[model.activation],
        **render_rope(model.rope),
    }
    if model.family in ("llama", "qwen3"):
        described["attention_bias"] = model.qkv_bias
    if model.family == "llama":
        described["mlp_bias"] = model.mlp_bias
    if model.family == "mistral":
        described["sliding_window"] = model.sliding_window
    if model.family in ("qwen2", "qwen3"):
        described["use_sliding_window"] = model.sliding_window is not None
        described["sliding_window"] = model.sliding_window
        described["layer_types"] = ["sliding_attention" if on else "full_attention" for on in model.sliding_layers]
        # for readers that do not know layer_types
        described["max_window_layers"] = (*model.sliding_layers, True).index(True)
    return described

"""GPT-2 (Radford et al. 2019). Defaults are those of transformers, for keys that old files lack."""

from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families.base import Family, TensorNames, parse_activation, render_activation
from jaxrlhf.weights.fields import Fields


def _parse(fields: Fields) -> dict[str, Any]:
    fields.refuse_if_set("add_cross_attention", "only decoders are supported")
    heads, width, layers = fields.integer("n_head"), fields.integer("n_embd"), fields.integer("n_layer")
    if width % heads:
        fields.refuse("n_embd", f"a multiple of n_head ({heads})")
    return {
        "hidden_size": width,
        "num_layers": layers,
        "num_heads": heads,
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "mlp_size": fields.integer("n_inner", 4 * width),
        "max_positions": fields.integer("n_positions", 1024),
        "norm": "layernorm",
        "norm_eps": fields.number("layer_norm_epsilon", 1e-5),
        "activation": parse_activation(fields, "activation_function", "gelu_new"),
        "gated_mlp": False,
        "rope": None,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "qk_norm": False,
        "sliding_window": None,
        "sliding_layers": (False,) * layers,
        "attention_scale": None if fields.boolean("scale_attn_weights", True) else 1.0,
        "attention_scale_by_layer": fields.boolean("scale_attn_by_inverse_layer_idx", False),
    }


def _render(model: ModelConfig) -> dict[str, Any]:
    return {
        "n_embd": model.hidden_size,
        "n_layer": model.num_layers,
        "n_head": model.num_heads,
        "n_inner": model.mlp_size,
        "n_positions": model.max_positions,
        "layer_norm_epsilon": model.norm_eps,
        "activation_function": render_activation(model.activation),
        "scale_attn_weights": model.attention_scale is None,
        "scale_attn_by_inverse_layer_idx": model.attention_scale_by_layer,
    }


TENSORS = TensorNames(
    decoder="transformer.",
    embedding="wte",
    positions="wpe",
    layer="h.{}.",
    final_norm="ln_f",
    modules={
        "attention_norm": "ln_1",
        "attention/q": "attn.c_attn",
        "attention/k": "attn.c_attn",
        "attention/v": "attn.c_attn",
        "attention/o": "attn.c_proj",
        "mlp_norm": "ln_2",
        "mlp/up": "mlp.c_fc",
        "mlp/down": "mlp.c_proj",
    },
    transposed=False,
)

FAMILIES = {"gpt2": Family("GPT2", "LMHeadModel", _parse, _render, TENSORS, tied_by_default=True)}

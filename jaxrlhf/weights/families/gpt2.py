"""GPT-2 (Radford et al. 2019). Defaults are those of transformers, for keys that old files lack."""

from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families.base import Family, Key, TensorNames, activation
from jaxrlhf.weights.fields import Fields

_KEYS = {
    "hidden_size": Key("n_embd", Fields.integer),
    "num_layers": Key("n_layer", Fields.integer),
    "num_heads": Key("n_head", Fields.integer),
    "mlp_size": Key("n_inner", Fields.integer, lambda values: 4 * values["hidden_size"]),
    "max_positions": Key("n_positions", Fields.integer, 1024),
    "norm_eps": Key("layer_norm_epsilon", Fields.number, 1e-5),
    "activation": activation("activation_function", "gelu_new"),
    "attention_scale_by_layer": Key("scale_attn_by_inverse_layer_idx", Fields.boolean, False),
}
_FIXED = {
    "norm": "layernorm",
    "gated_mlp": False,
    "rope": None,
    "qkv_bias": True,
    "attention_out_bias": True,
    "mlp_bias": True,
    "qk_norm": False,
    "sliding_window": None,
}


def _parse(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    fields.refuse_if_set("add_cross_attention", "only decoders are supported")
    heads, width = values["num_heads"], values["hidden_size"]
    if width % heads:
        fields.refuse("n_embd", f"a multiple of n_head ({heads})")
    return {
        "num_kv_heads": heads,
        "head_dim": width // heads,
        "sliding_layers": (False,) * values["num_layers"],
        "attention_scale": None if fields.boolean("scale_attn_weights", True) else 1.0,
    }


def _render(model: ModelConfig) -> dict[str, Any]:
    return {"scale_attn_weights": model.attention_scale is None}


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

FAMILIES = {"gpt2": Family("GPT2", _KEYS, _FIXED, _parse, _render, TENSORS, "GPT2LMHeadModel", tied_by_default=True)}

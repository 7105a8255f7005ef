"""GPT-NeoX (Black et al. 2022) and Pythia. Defaults are those of transformers, for keys that old files lack."""

from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families.base import Family, Key, TensorNames, activation
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import RopeKeys, parse_rope, render_rope

_BIAS = Key("attention_bias", Fields.boolean, True)
_KEYS = {
    "hidden_size": Key("hidden_size", Fields.integer),
    "num_layers": Key("num_hidden_layers", Fields.integer),
    "num_heads": Key("num_attention_heads", Fields.integer),
    "mlp_size": Key("intermediate_size", Fields.integer),
    "max_positions": Key("max_position_embeddings", Fields.integer, 2048),
    "norm_eps": Key("layer_norm_eps", Fields.number, 1e-5),
    "activation": activation("hidden_act", "gelu"),
    "parallel_residual": Key("use_parallel_residual", Fields.boolean, True),
    "qkv_bias": _BIAS,
    "attention_out_bias": _BIAS,
}
_FIXED = {"norm": "layernorm", "gated_mlp": False, "mlp_bias": True, "qk_norm": False, "sliding_window": None}
_ROPE = RopeKeys(theta="rotary_emb_base", partial="rotary_pct", partial_default=0.25)


def _parse(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    heads, width = values["num_heads"], values["hidden_size"]
    if width % heads:
        fields.refuse("hidden_size", f"a multiple of num_attention_heads ({heads})")
    sizes = {"num_kv_heads": heads, "head_dim": width // heads, "sliding_layers": (False,) * values["num_layers"]}
    return sizes | parse_rope(fields, values | sizes, _ROPE)


def _render(model: ModelConfig) -> dict[str, Any]:
    return render_rope(model, _ROPE)


TENSORS = TensorNames(
    decoder="gpt_neox.",
    embedding="embed_in",
    positions=None,
    layer="layers.{}.",
    final_norm="final_layer_norm",
    modules={
        "attention_norm": "input_layernorm",
        "attention/q": "attention.query_key_value",
        "attention/k": "attention.query_key_value",
        "attention/v": "attention.query_key_value",
        "attention/o": "attention.dense",
        "mlp_norm": "post_attention_layernorm",
        "mlp/up": "mlp.dense_h_to_4h",
        "mlp/down": "mlp.dense_4h_to_h",
    },
    transposed=True,
    lm_head="embed_out",
    joined_by_head=True,
)

FAMILIES = {"gpt_neox": Family("GPTNeoX", _KEYS, _FIXED, _parse, _render, TENSORS)}

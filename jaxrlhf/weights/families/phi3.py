"""Phi-3, Phi-3.5 and Phi-4 (also mini). Defaults are those of transformers, for keys that old files lack."""

from dataclasses import replace
from typing import Any

from jaxrlhf.models.config import Kind, ModelConfig
from jaxrlhf.weights.families import llama
from jaxrlhf.weights.families.base import Family
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import RopeKeys, parse_rope, render_rope

# the first files said "su", and "yarn", for what is longrope
_KINDS: dict[str, Kind] = {"default": "default", "longrope": "longrope", "su": "longrope", "yarn": "longrope"}
_ROPE = RopeKeys(partial="partial_rotary_factor", original_default=4096, kinds=_KINDS)
_KEYS = {field: key for field, key in llama.keys(positions=4096).items() if field != "head_dim"}
_KEYS["norm_eps"] = replace(_KEYS["norm_eps"], default=1e-5)


def _parse(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    for key in ("attention_bias", "mlp_bias", "lm_head_bias"):
        fields.refuse_if_set(key, "the layers of this family have no biases")
    heads, width = values["num_heads"], values["hidden_size"]
    if width % heads or fields.integer("head_dim", width // heads) != width // heads:
        fields.refuse("hidden_size" if width % heads else "head_dim", f"hidden_size / num_attention_heads ({heads})")
    head_dim = width // heads
    window = fields.integer("sliding_window") if fields.has("sliding_window") else None
    return {
        "head_dim": head_dim,
        "sliding_window": window,
        "sliding_layers": (window is not None,) * values["num_layers"],
        **parse_rope(fields, values | {"head_dim": head_dim}, _ROPE),
    }


def _render(model: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": model.sliding_window, **render_rope(model, _ROPE)}


TENSORS = replace(
    llama.TENSORS,
    modules=llama.TENSORS.modules
    | {f"attention/{name}": "self_attn.qkv_proj" for name in "qkv"}
    | {f"mlp/{name}": "mlp.gate_up_proj" for name in ("gate", "up")},
)

FAMILIES = {"phi3": Family("Phi3", _KEYS, llama.FIXED, _parse, _render, TENSORS)}

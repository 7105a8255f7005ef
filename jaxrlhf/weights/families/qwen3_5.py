"""The text model of Qwen 3.5: three layers with a gated delta net (https://arxiv.org/abs/2412.06464), one with gated
attention, and so on. Norms multiply by 1 + scale, and a quarter of each head turns.

The layers for multi-token prediction (`mtp`), which nothing here reads, are left out.
"""

from dataclasses import replace
from typing import Any

from jaxrlhf.models.config import DeltaNet, ModelConfig
from jaxrlhf.weights.families import llama
from jaxrlhf.weights.families.base import Family, Key
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import FULL, RopeKeys, parse_rope, render_rope

DELTA = "linear_attention"
"""An entry of `layer_types`."""
_SIZES = {
    "linear_num_key_heads": ("key_heads", 16),
    "linear_num_value_heads": ("value_heads", 32),
    "linear_key_head_dim": ("key_size", 128),
    "linear_value_head_dim": ("value_size", 128),
    "linear_conv_kernel_dim": ("conv_width", 4),
}
_ROPE = RopeKeys(partial="partial_rotary_factor", partial_default=0.25)
# of images and videos, whose positions have three coordinates; those of text are equal
_IMAGES = ("mrope_section", "mrope_interleaved")


def _parse(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    every = fields.integer("full_attention_interval", 4)
    layers = values["num_layers"]
    kinds = fields.strings("layer_types") or [DELTA if i % every else FULL for i in range(1, layers + 1)]
    if len(kinds) != layers or set(kinds) != {DELTA, FULL}:
        fields.refuse("layer_types", f"one entry for each of the {layers} layers, {DELTA} and {FULL} both among them")
    if not fields.boolean("attn_output_gate", True):
        fields.refuse("attn_output_gate", "true")
    fields.choice("output_gate_type", ("swish", "silu"), "swish")  # of delta nets
    sizes = {field: fields.integer(key, default) for key, (field, default) in _SIZES.items()}
    ropes = {
        key: {name: value for name, value in fields.mapping(key).items() if name not in _IMAGES}
        for key in ("rope_scaling", "rope_parameters")
    }
    return parse_rope(replace(fields, values=fields.values | ropes), values, _ROPE) | {
        "delta": DeltaNet(layers=tuple(kind == DELTA for kind in kinds), **sizes),
        "sliding_window": None,
        "sliding_layers": (False,) * layers,
    }


def _render(model: ModelConfig) -> dict[str, Any]:
    net = model.delta
    assert net is not None
    rope = render_rope(model, _ROPE)
    parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"], **(rope.pop("rope_scaling") or {})}
    parameters |= {"partial_rotary_factor": rope["partial_rotary_factor"]}
    return {key: getattr(net, field) for key, (field, _) in _SIZES.items()} | {
        "layer_types": [DELTA if delta else FULL for delta in net.layers],
        "rope_parameters": parameters,
    }


_KEYS = llama.keys(positions=32768, head_dim=256) | llama.BIASES
_DEFAULTS = {"hidden_size": 4096, "num_layers": 32, "num_heads": 16, "num_kv_heads": 4, "mlp_size": 12288}
_KEYS |= {field: Key(_KEYS[field].name, Fields.integer, size) for field, size in _DEFAULTS.items()}
_MODULES = {
    "delta/qkv": "linear_attn.in_proj_qkv",
    "delta/z": "linear_attn.in_proj_z",
    "delta/beta": "linear_attn.in_proj_b",
    "delta/decay": "linear_attn.in_proj_a",
    "delta/o": "linear_attn.out_proj",
    "delta/conv": "linear_attn.conv1d",
    "delta/norm": "linear_attn.norm",
    "delta/log_rate": "linear_attn.A_log",
    "delta/step_bias": "linear_attn.dt_bias",
}
FAMILIES = {
    "qwen3_5_text": Family(
        "Qwen3_5Text",
        _KEYS,
        llama.FIXED | {"norm": "rmsnorm_1p", "qk_norm": True, "attention_gate": True},
        _parse,
        _render,
        replace(llama.TENSORS, modules=llama.TENSORS.modules | _MODULES),
        lm_class="Qwen3_5ForCausalLM",
        vocab_size=248320,
    )
}

"""Gemma 2 (https://arxiv.org/abs/2408.00118) and the text model of Gemma 3 (https://arxiv.org/abs/2503.19786).

Both scale the embedding by sqrt(D), multiply norms by 1 + scale, and have norms before and after attention and MLP.
Gemma 2 softcaps the logits of attention and of the head, and has a window in every second layer. Gemma 3 has RMSNorm
over each head of q and k, a window in five of six layers, and another rope_theta in those.
"""

from dataclasses import replace
from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families import llama
from jaxrlhf.weights.families.base import Family, Key, activation, nullable
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import FULL, SLIDING, parse_rope, parse_ropes, render_ropes

_FIXED = llama.FIXED | {"norm": "rmsnorm_1p", "norm_placement": "both"}


def _keys(*, positions: int, logits_softcap: float | None) -> dict[str, Key]:
    """The keys of both. All have defaults, because published files leave many out."""
    sizes = {"hidden_size": 2304, "num_layers": 26, "num_heads": 8, "num_kv_heads": 4, "mlp_size": 9216}
    keys = llama.keys(positions=positions, head_dim=256) | llama.BIASES
    keys |= {field: Key(keys[field].name, Fields.integer, size) for field, size in sizes.items()}
    return keys | {
        "activation": activation("hidden_activation", "gelu_pytorch_tanh"),
        "attention_scale": Key("query_pre_attn_scalar", _parse_scalar, 256, lambda scale: scale and round(scale**-2)),
        "logits_softcap": Key("final_logit_softcapping", nullable(Fields.number), logits_softcap),
    }


def _parse_scalar(fields: Fields, name: str, default: int) -> float:
    return fields.integer(name, default) ** -0.5


def _parse_gemma2(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    return parse_rope(fields, values) | _parse_layers(fields, values, full_every=2)


def _parse_gemma3(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    fields.refuse_if_set("attn_logit_softcapping", "transformers ignores it in Gemma 3; remove it")
    layers = _parse_layers(fields, values, full_every=fields.integer("sliding_window_pattern", 6))
    return layers | parse_ropes(fields, values, layers["sliding_layers"], theta=1e6, local=1e4)


def _parse_layers(fields: Fields, values: dict[str, Any], full_every: int) -> dict[str, Any]:
    fields.refuse_if_set("use_bidirectional_attention", "only causal attention is supported")
    default = [SLIDING if i % full_every else FULL for i in range(1, values["num_layers"] + 1)]
    windows = llama.parse_windows(fields, values, llama.parse_window(fields), default=default)
    return windows | {"embedding_multiplier": values["hidden_size"] ** 0.5}


def _render_layers(model: ModelConfig) -> dict[str, Any]:
    return {"sliding_window": model.sliding_window, **llama.render_layer_types(model)}


def _render_gemma2(model: ModelConfig) -> dict[str, Any]:
    return llama.render(model) | _render_layers(model)


def _render_gemma3(model: ModelConfig) -> dict[str, Any]:
    return render_ropes(model, local=True) | _render_layers(model)


_NORMS = {
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
TENSORS = replace(llama.TENSORS, modules=llama.TENSORS.modules | _NORMS)

_GEMMA2_KEYS = _keys(positions=8192, logits_softcap=30.0) | {
    "attention_softcap": Key("attn_logit_softcapping", nullable(Fields.number), 50.0)
}
_GEMMA3_KEYS = _keys(positions=131072, logits_softcap=None)
FAMILIES = {
    "gemma2": Family(
        "Gemma2", _GEMMA2_KEYS, _FIXED, _parse_gemma2, _render_gemma2, TENSORS, tied_by_default=True, vocab_size=256000
    ),
    "gemma3_text": Family(
        "Gemma3Text",
        _GEMMA3_KEYS,
        _FIXED | {"qk_norm": True},
        _parse_gemma3,
        _render_gemma3,
        TENSORS,
        lm_class="Gemma3ForCausalLM",
        tied_by_default=True,
        vocab_size=262208,
    ),
}

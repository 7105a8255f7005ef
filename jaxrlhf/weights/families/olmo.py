"""OLMo 2 (https://arxiv.org/abs/2501.00656) and Olmo 3: Llama with the norms after attention and MLP, and RMSNorm over
all heads of q and of k together. Olmo 3 has a window in three of four layers.

Defaults are those of transformers, for keys that a file lacks.
"""

from dataclasses import replace
from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families import llama
from jaxrlhf.weights.families.base import Family, Key
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import FULL, SLIDING, parse_ropes, render_ropes

_KEYS = llama.keys(positions=2048) | llama.BIASES | {"norm_eps": Key("rms_norm_eps", Fields.number, 1e-5)}
_FIXED = llama.FIXED | {"norm_placement": "post", "qk_norm": True, "qk_norm_over": "all_heads"}


def _parse_olmo3(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    default = [SLIDING if i % 4 else FULL for i in range(1, values["num_layers"] + 1)]
    windows = llama.parse_windows(fields, values, llama.parse_window(fields), default=default)
    return windows | parse_ropes(fields, values, windows["sliding_layers"], theta=500000.0, local=None)


def _render_olmo3(model: ModelConfig) -> dict[str, Any]:
    return render_ropes(model, local=False) | {"sliding_window": model.sliding_window} | llama.render_layer_types(model)


_NORMS = {"attention_post_norm": "post_attention_layernorm", "mlp_post_norm": "post_feedforward_layernorm"}
_MODULES = {
    module: name for module, name in llama.TENSORS.modules.items() if module not in ("attention_norm", "mlp_norm")
}
TENSORS = replace(llama.TENSORS, modules=_MODULES | _NORMS)

FAMILIES = {
    "olmo2": Family("Olmo2", _KEYS, _FIXED, llama.parse, llama.render, TENSORS),
    "olmo3": Family("Olmo3", _KEYS, _FIXED, _parse_olmo3, _render_olmo3, TENSORS),
}

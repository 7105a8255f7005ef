"""OLMoE (Muennighoff et al. 2024). Defaults are those of transformers, for keys that files lack."""

from dataclasses import replace
from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families import llama, moe
from jaxrlhf.weights.families.base import Family
from jaxrlhf.weights.fields import Fields

_KEYS = llama.keys(positions=4096) | llama.BIASES | moe.KEYS
_KEYS["norm_eps"] = replace(_KEYS["norm_eps"], default=1e-5)
_FIXED = llama.FIXED | {"qk_norm": True, "qk_norm_over": "all_heads"}


def _parse(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    fields.refuse_if_set("clip_qkv", "clipping of q, k and v is not implemented")
    return llama.parse(fields, values) | moe.parse_router(fields, values, 64, 0.01)


def _render(model: ModelConfig) -> dict[str, Any]:
    return llama.render(model) | {"num_experts": model.num_experts}


FAMILIES = {
    "olmoe": Family("Olmoe", _KEYS, _FIXED, _parse, _render, moe.with_experts(llama.TENSORS), has_classifier=False)
}

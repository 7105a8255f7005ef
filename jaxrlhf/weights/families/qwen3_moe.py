"""Qwen3 mixtures of experts (Qwen3-30B-A3B, ...). Defaults are those of transformers, for keys that files lack."""

from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families import llama, moe
from jaxrlhf.weights.families.base import Family, Key
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import parse_rope, render_rope

_KEYS = llama.keys(positions=32768) | llama.BIASES | moe.KEYS
_KEYS["mlp_size"] = Key("moe_intermediate_size", Fields.integer, 768)


def _parse(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """A sliding window in every layer or in none."""
    window = fields.integer("sliding_window", 4096) if fields.boolean("use_sliding_window", False) else None
    return {
        "sliding_window": window,
        "sliding_layers": (window is not None,) * values["num_layers"],
        **moe.parse_router(fields, values, 128, 0.001),
        **parse_rope(fields, values),
    }


def _render(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_experts": model.num_experts,
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        **render_rope(model),
    }


FAMILIES = {
    "qwen3_moe": Family(
        "Qwen3Moe", _KEYS, llama.FIXED | {"qk_norm": True}, _parse, _render, moe.with_experts(llama.TENSORS)
    )
}

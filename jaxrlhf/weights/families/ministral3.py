"""Ministral 3, the text model. Defaults are those of transformers, for keys that files lack."""

from dataclasses import replace
from typing import Any

from jaxrlhf.errors import DataError
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families import llama
from jaxrlhf.weights.families.base import Family
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import RopeKeys, parse_rope, render_rope

_ROPE = RopeKeys(query_scale=True)
_KEYS = llama.keys(positions=262144, head_dim=128)
_KEYS["norm_eps"] = replace(_KEYS["norm_eps"], default=1e-5)


def _parse(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    """A sliding window in every layer or in none."""
    if not fields.has("rope_parameters") and not fields.has("rope_scaling"):
        raise DataError(f"{fields.where}: rope_parameters is missing; expected the rotary embeddings of a Ministral 3")
    window = fields.integer("sliding_window") if fields.has("sliding_window") else None
    return {
        "sliding_window": window,
        "sliding_layers": (window is not None,) * values["num_layers"],
        **parse_rope(fields, values, _ROPE),
    }


def _render(model: ModelConfig) -> dict[str, Any]:
    """With the rotary embeddings in `rope_parameters`: the family is not in transformers 4."""
    rope = render_rope(model, _ROPE)
    parameters = {"rope_type": "default", "rope_theta": rope["rope_theta"], **(rope["rope_scaling"] or {})}
    return {"sliding_window": model.sliding_window, "rope_parameters": parameters}


FAMILIES = {"ministral3": Family("Ministral3", _KEYS, llama.FIXED, _parse, _render, llama.TENSORS)}

"""SmolLM3: Llama with layers that have no rotary embeddings, every fourth unless the file says which.

Defaults are those of transformers, for keys that a file lacks.
"""

from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.families import llama
from jaxrlhf.weights.families.base import Family, nullable
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import FULL, SLIDING, RopeKeys, parse_rope

_ROPE_LAYERS = "no_rope_layers"  # despite the name of the key, 1 stands for a layer with rotary embeddings
_KEYS = llama.keys(positions=32768) | llama.BIASES | llama.MLP_BIAS


def _parse(fields: Fields, values: dict[str, Any]) -> dict[str, Any]:
    layers = values["num_layers"]
    interval = fields.integer("no_rope_layer_interval", 4)
    given = fields.values.get(_ROPE_LAYERS)
    given = [int(i % interval != 0) for i in range(1, layers + 1)] if given is None else given
    if not (isinstance(given, list) and len(given) >= layers and all(entry in (0, 1) for entry in given)):
        fields.refuse(_ROPE_LAYERS, f"0 or 1 for each of the {layers} layers")
    rotary = tuple(bool(entry) for entry in given[:layers])
    enabled = fields.boolean("use_sliding_window", False)
    window = nullable(Fields.integer)(fields, "sliding_window", None) if enabled else None
    default = [FULL if window is None or has_rope else SLIDING for has_rope in rotary]
    return {
        **parse_rope(fields, values, RopeKeys(theta_default=2e6)),
        "rope_layers": () if all(rotary) else rotary,
        **llama.parse_windows(fields, values, window, default=default),
    }


def _render(model: ModelConfig) -> dict[str, Any]:
    return llama.render(model) | {
        _ROPE_LAYERS: [int(has_rope) for has_rope in model.rope_layers or (True,) * model.num_layers],
        "use_sliding_window": model.sliding_window is not None,
        "sliding_window": model.sliding_window,
        **llama.render_layer_types(model),
    }


FAMILIES = {"smollm3": Family("SmolLM3", _KEYS, llama.FIXED, _parse, _render, llama.TENSORS, tied_by_default=True)}

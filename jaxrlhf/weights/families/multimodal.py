"""The text model inside a multimodal folder: its config.json and its tensors.

The other parts (vision tower, projector, layers for multi-token prediction) are left out: models are read as the
decoder of text that they contain, and written as such.
"""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from jaxrlhf.errors import DataError
from jaxrlhf.weights.families.base import Family

TEXT_TYPES = {
    "gemma3": "gemma3_text",
    "mistral3": "mistral",
    "llava": "llama",
    "internvl": "qwen2",
    "qwen3_5": "qwen3_5_text",
}
"""Each supported multimodal model_type, whose text model is a decoder like any other of its own type -> the type of a
`text_config` that names none."""
_TEXT_CONFIG = "text_config"
_INHERITED = ("torch_dtype", "dtype", "bos_token_id", "eos_token_id", "pad_token_id", "transformers_version")
_OUTER = ("tie_word_embeddings", "quantization_config", "auto_map", "is_encoder_decoder")  # they count, if they are set
_TOWER, _QWEN35 = ("vision_tower", "multi_modal_projector"), ("visual", "mtp")  # mtp: multi-token prediction
_OTHERS = {"gemma3": _TOWER, "mistral3": _TOWER, "llava": _TOWER, "internvl": _TOWER}
_OTHERS |= {"qwen3_5": _QWEN35, "qwen3_5_text": _QWEN35}
"""Each model_type with parts that no text needs -> the prefixes of their tensors."""
KEYS_OF_OTHERS = frozenset({"mtp_num_hidden_layers", "mtp_use_dedicated_embeddings"})
"""Keys of a text model's config.json that announce such tensors."""
_TEXT = re.compile(r"(?:model\.)?language_model\.(?:model\.)?(.+)")


def is_multimodal(config: Mapping[str, Any]) -> bool:
    """Return True for a config.json that holds that of a text model."""
    kind = config.get("model_type")
    return (isinstance(kind, str) and kind in TEXT_TYPES) or isinstance(config.get(_TEXT_CONFIG), dict)


def text_config(config: dict[str, Any], where: str, families: Mapping[str, Family]) -> dict[str, Any]:
    """The config.json of the text model; that of another model is returned as it is.

    Raises DataError for a model_type that is not in `TEXT_TYPES`, for a text model of no supported family, and for
    classes other than the language model.
    """
    if not is_multimodal(config):
        return config
    outer, inner = config.get("model_type"), config.get(_TEXT_CONFIG)
    if not isinstance(outer, str) or outer not in TEXT_TYPES:
        raise DataError(
            f"{where}: model_type {outer!r} holds a text model that is not known to be a decoder of its own; supported "
            f"are {', '.join(TEXT_TYPES)}, and text models without such a frame"
        )
    if not isinstance(inner, dict):
        raise DataError(f"{where}: model_type {outer!r} needs a {_TEXT_CONFIG}, which is {inner!r}")
    name = inner.get("model_type") or TEXT_TYPES[outer]
    if not isinstance(name, str) or name not in families:
        raise DataError(
            f"{where}: the text model of this {outer} is a {name!r}, which is not supported; supported are "
            f"{', '.join(families)}"
        )
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or not all(
        isinstance(c, str) and c.endswith(("ForConditionalGeneration", "Model")) for c in classes
    ):
        raise DataError(
            f"{where}: architectures is {classes!r}; expected a language model (...ForConditionalGeneration)"
        )
    flat = {key: config[key] for key in _INHERITED if config.get(key) is not None} | inner
    flat |= {key: config[key] for key in _OUTER if config.get(key) is not None}
    return flat | {"model_type": name, "architectures": [families[name].language_model]}


def text_name(name: str, decoder: str) -> str:
    """The name that a tensor of a multimodal folder has in a folder of the text model, whose decoder has the prefix
    `decoder`; other names are returned as they are."""
    match = _TEXT.fullmatch(name)
    if match is None:
        return name
    return match[1] if match[1].startswith("lm_head.") else decoder + match[1]


def outer_name(name: str, decoder: str) -> str:
    """The inverse of `text_name`, as in the models of transformers."""
    return f"model.language_model.{name.removeprefix(decoder)}" if name.startswith(decoder) else name


def left_out(names: Iterable[str], model_type: str) -> dict[str, str]:
    """{tensor that no text needs: the part of a model of this type that it belongs to}."""
    parts = [(part, (f"{part}.", f"model.{part}.")) for part in _OTHERS.get(model_type, ())]
    return {name: part for name in names for part, prefixes in parts if name.startswith(prefixes)}

"""Model families: conversion between config.json and `ModelConfig`.

Keys of transformers 4 (`torch_dtype`, `rope_theta`, `rope_scaling`) and 5 (`dtype`, `rope_parameters`) are read. A key
that would change the output and is not implemented is refused; keys without effect on the forward pass (dropout rates,
special tokens, ...) are ignored. To add a family, see docs/families.md.
"""

from dataclasses import replace
from typing import Any

from jaxrlhf.errors import DataError
from jaxrlhf.models import ModelConfig, for_length
from jaxrlhf.weights.families import (
    gemma,
    gpt2,
    gpt_neox,
    granite,
    llama,
    ministral3,
    multimodal,
    olmo,
    olmoe,
    phi3,
    qwen3_5,
    qwen3_moe,
    smollm3,
)
from jaxrlhf.weights.families.base import Family, TensorNames, check_sizes
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.rope import TOP_LEVEL

ADD_EOS = "score_add_eos"
"""Key of a reward model's config.json: whether an end token follows every completion that it reads. Absent: those that
ended by themselves. It is not kept when the model is written again, because it belongs to the stored head."""
_MODULES = gpt2, llama, gemma, olmo, smollm3, granite, phi3, gpt_neox, ministral3, qwen3_moe, olmoe, qwen3_5
FAMILIES: dict[str, Family] = {name: family for module in _MODULES for name, family in module.FAMILIES.items()}


def tensor_names(model: ModelConfig) -> TensorNames:
    """The tensor names of the family of `model`."""
    return FAMILIES[model.family].tensors


def parse(config: dict, where: str) -> ModelConfig:
    """The model that a config.json describes; dtype, remat and attention keep their defaults.

    That of a multimodal model (multimodal.py) gives its text model. `where` names the file in messages. Raises
    DataError for an unknown `model_type`, a missing or malformed value, or an option that is not implemented.
    """
    config = multimodal.text_config(config, where, FAMILIES)
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise DataError(f"{where}: model_type {name!r} is not supported; supported are {', '.join(FAMILIES)}")
    fields, family = Fields(config, where), FAMILIES[name]
    fields.refuse_if_set("quantization_config", "use a copy of the model that is not quantised")
    fields.refuse_if_set("is_encoder_decoder", "only decoders are supported")
    fields.refuse_if_set("pruned_heads", "only whole layers are supported")
    # the code of a family that transformers has adopted since; its newest version is the one that is followed here
    adopted = {f"modeling_{name}.{kind}" for kind in (family.language_model, family.classifier)}
    if any(key.startswith("AutoModel") and value not in adopted for key, value in fields.mapping("auto_map").items()):
        raise DataError(f"{where}: auto_map asks for custom modelling code, which is never run")
    try:
        values = {"vocab_size": fields.integer("vocab_size", family.vocab_size), **family.parse_all(fields)}
        check_sizes(values, where)
        tied = fields.boolean("tie_word_embeddings", family.tied_by_default)
        return ModelConfig(family=name, tie_embeddings=tied, **_parse_head(fields, family), **values)
    except DataError:
        raise
    except ValueError as error:  # raised by ModelConfig for inconsistent values
        raise DataError(f"{where}: {error}") from error


def _parse_head(fields: Fields, family: Family) -> dict[str, Any]:
    architectures = fields.strings("architectures")
    if set(architectures) <= {family.language_model, f"{family.architecture}Model"}:
        return {}
    if architectures != [family.classifier]:
        fields.refuse("architectures", f"[{family.language_model}] or [{family.classifier}]")
    # transformers' default is two labels, and it writes neither id2label nor num_labels for the default
    labels = len(fields.mapping("id2label")) or fields.integer("num_labels", 2)
    if labels > 2:
        raise DataError(
            f"{fields.where}: the classifier has {labels} labels; a reward model has one (the output is the score) or "
            "two (the score is the probability of label 1)"
        )
    if labels == 2:
        fields.choice("problem_type", ("single_label_classification",))
    return {"head": fields.choice("score_head", ("linear", "mlp"), "linear"), "num_labels": labels}


def render(model: ModelConfig, original: dict, stored_dtype: str | None = None) -> dict:
    """The config.json of `model`: `original` with only the differing keys rewritten; `{}` writes a new one.

    A multimodal `original` gives the config.json of its text model. `stored_dtype` is the dtype of the stored tensors
    ("float32", "bfloat16"); None keeps the original's value. Raises DataError if a config.json of the family cannot
    describe the model.
    """
    model = for_length(model, None)
    config = rendered = _render_all(model)
    if original:
        original = multimodal.text_config(original, "the original config.json", FAMILIES)
        before = _render_all(parse(original, "the original config.json"))
        changed = {key: value for key, value in rendered.items() if key not in before or before[key] != value}
        dropped = before.keys() - rendered.keys()
        if changed.keys() & TOP_LEVEL:
            changed |= {key: rendered[key] for key in rendered.keys() & TOP_LEVEL}
            dropped |= TOP_LEVEL
        # the code that auto_map names and the tensors of other parts are not written
        dropped |= {ADD_EOS, "auto_map", *multimodal.KEYS_OF_OTHERS}
        if "id2label" in changed:
            dropped |= {"num_labels", "problem_type"}
        config = {key: value for key, value in original.items() if key not in dropped} | changed
    if stored_dtype is not None:
        config["dtype" if "dtype" in config else "torch_dtype"] = stored_dtype
    execution = "platform", "dtype", "remat", "mesh", "attention", "adapters", "router_aux_loss_coef"
    not_in_file = {name: getattr(model, name) for name in execution}
    if replace(parse(config, "the config.json to write"), **not_in_file) != model:
        raise DataError(f"a config.json of model_type {model.family} cannot describe this model: {model}")
    return config


def _render_all(model: ModelConfig) -> dict[str, Any]:
    """A new config.json, with the keys of transformers 4, which every version reads."""
    family = FAMILIES[model.family]
    config: dict[str, Any] = {
        "model_type": model.family,
        "architectures": [family.language_model if model.head == "lm" else family.classifier],
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        **family.render_all(model),
    }
    if model.head != "lm":
        config["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.num_labels)}
        config["label2id"] = {f"LABEL_{i}": i for i in range(model.num_labels)}
    if model.head == "mlp":
        config["score_head"] = "mlp"
    return config

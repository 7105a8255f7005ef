"""Model families: what their config.json means, in both spellings, and back.

Transformers 4 wrote `torch_dtype`, `rope_theta` and `rope_scaling`; 5 writes `dtype` and `rope_parameters`. Whatever
would change the numbers and is not implemented is refused; keys that do not touch the forward pass (dropout rates,
special tokens, ...) are left alone.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from jaxrlhf.errors import DataError
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.lineages import (
    parse_gpt2,
    parse_llama,
    parse_mistral,
    parse_qwen2,
    parse_qwen3,
    render_gpt2,
    render_lineage,
)
from jaxrlhf.weights.names import Tensor, tensors

__all__ = ["SUPPORTED", "Tensor", "parse", "render", "tensors"]


@dataclass(frozen=True)
class Family:
    """What sets one family apart."""

    classes: str  # prefix of its architecture names
    lm: str  # suffix of the language model's architecture name
    parse: Callable[[Fields], dict[str, Any]]  # the ModelConfig fields that the family decides
    render: Callable[[ModelConfig], dict[str, Any]]  # and back


FAMILIES = {
    "gpt2": Family("GPT2", "LMHeadModel", parse_gpt2, render_gpt2),
    "llama": Family("Llama", "ForCausalLM", parse_llama, render_lineage),
    "mistral": Family("Mistral", "ForCausalLM", parse_mistral, render_lineage),
    "qwen2": Family("Qwen2", "ForCausalLM", parse_qwen2, render_lineage),
    "qwen3": Family("Qwen3", "ForCausalLM", parse_qwen3, render_lineage),
}
SUPPORTED = tuple(FAMILIES)


def parse(config: dict, where: str) -> ModelConfig:
    """The decoder that a config.json describes; `where` names the file in messages. dtype, remat and attention keep
    their defaults.

    Raises DataError on an unknown `model_type`, a missing or malformed value, and options that are not implemented.
    """
    name = config.get("model_type")
    if not isinstance(name, str) or name not in FAMILIES:
        raise DataError(f"{where}: model_type {name!r} is not supported; supported are {', '.join(SUPPORTED)}")
    fields, family = Fields(config, where), FAMILIES[name]
    fields.refuse_set("quantization_config", "use a copy of the model that is not quantised")
    fields.refuse_set("is_encoder_decoder", "only decoders are supported")
    fields.refuse_set("pruned_heads", "only whole layers are supported")
    if any(key.startswith("AutoModel") for key in fields.mapping("auto_map")):
        raise DataError(f"{where}: auto_map asks for modelling code of the model's own, which is never run")
    try:
        return ModelConfig(
            family=name,
            vocab_size=fields.count("vocab_size"),
            tie_embeddings=fields.flag("tie_word_embeddings", name == "gpt2"),
            **_parse_head(fields, family),
            **family.parse(fields),
        )
    except DataError:
        raise
    except ValueError as error:  # of ModelConfig: values that do not go together
        raise DataError(f"{where}: {error}") from error


def _parse_head(fields: Fields, family: Family) -> dict[str, Any]:
    names, classifier = fields.names("architectures"), f"{family.classes}ForSequenceClassification"
    if set(names) <= {f"{family.classes}{family.lm}", f"{family.classes}Model"}:
        return {}
    if names != [classifier]:
        fields.refuse("architectures", f"[{family.classes}{family.lm}] or [{classifier}]")
    # transformers' default number of labels is two, and a file with the default may name neither labels nor number
    labels = len(fields.mapping("id2label")) or fields.count("num_labels", 2)
    if labels > 2:
        raise DataError(
            f"{fields.where}: the classifier has {labels} labels; a reward model has one (the output is the score) or "
            "two (the score is the probability of label 1)"
        )
    if labels == 2:
        fields.choice("problem_type", ("single_label_classification",))
    return {"head": fields.choice("score_head", ("linear", "mlp"), "linear"), "num_labels": labels}


def render(model: ModelConfig, original: dict, stored_dtype: str | None = None) -> dict:
    """The config.json to write for `model`: `original` with only what differs rewritten; `{}` gives a whole new one.

    `stored_dtype` is that of the tensors beside it ("float32", "bfloat16"); None leaves the original's word for it.
    Raises DataError if the family's config.json cannot say what the model is.
    """
    result = wanted = _describe(model)
    if original:
        before = _describe(parse(original, "the original config.json"))
        changed = {key: value for key, value in wanted.items() if key not in before or before[key] != value}
        dropped = before.keys() - wanted.keys()
        if changed.keys() & {"rope_theta", "rope_scaling"}:
            changed |= {key: wanted[key] for key in ("rope_theta", "rope_scaling")}
            dropped |= {"rope_parameters", "original_max_position_embeddings"}
        if "id2label" in changed:
            dropped |= {"num_labels", "problem_type"}
        result = {key: value for key, value in original.items() if key not in dropped} | changed
    if stored_dtype is not None:
        result["dtype" if "dtype" in result else "torch_dtype"] = stored_dtype
    if (
        replace(
            parse(result, "the config.json to write"),
            dtype=model.dtype,
            remat=model.remat,
            attention=model.attention,
            adapters=model.adapters,
        )
        != model
    ):
        raise DataError(f"a config.json of model_type {model.family} cannot describe this model: {model}")
    return result


def _describe(model: ModelConfig) -> dict[str, Any]:
    """A whole config.json, in the older spelling, which every version of transformers reads."""
    family = FAMILIES[model.family]
    described: dict[str, Any] = {
        "model_type": model.family,
        "architectures": [family.classes + (family.lm if model.head == "lm" else "ForSequenceClassification")],
        "vocab_size": model.vocab_size,
        "tie_word_embeddings": model.tie_embeddings,
        **family.render(model),
    }
    if model.head != "lm":
        described["id2label"] = {str(i): f"LABEL_{i}" for i in range(model.num_labels)}
        described["label2id"] = {f"LABEL_{i}": i for i in range(model.num_labels)}
    if model.head == "mlp":
        described["score_head"] = "mlp"
    return described

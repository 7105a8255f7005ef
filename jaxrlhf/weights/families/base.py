"""Description of a model family: the meaning of its config.json and the names of its tensors."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.fields import Fields

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "relu": "relu",
}


@dataclass(frozen=True)
class TensorNames:
    """Module names in a Hugging Face folder. A module has a `.weight` and, where the model has one, a `.bias`."""

    decoder: str  # prefix of every tensor outside the heads
    embedding: str
    positions: str | None  # learned position embeddings
    layer: str  # prefix of a layer, with {} for its index
    final_norm: str
    modules: dict[str, str]  # module within a layer: its name in the folder; several may share one tensor, in order
    transposed: bool  # kernels of layers are stored [out, in]


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    architecture: str  # prefix of its class names
    lm_suffix: str  # suffix of the class name of the language model
    parse: Callable[[Fields], dict[str, Any]]  # config.json -> the ModelConfig fields specific to the family
    render: Callable[[ModelConfig], dict[str, Any]]  # the inverse of `parse`
    tensors: TensorNames
    tied_by_default: bool = False  # default of tie_word_embeddings

    @property
    def language_model(self) -> str:
        return self.architecture + self.lm_suffix

    @property
    def classifier(self) -> str:
        return f"{self.architecture}ForSequenceClassification"


def parse_activation(fields: Fields, key: str, default: str) -> str:
    """The activation of `ModelConfig` that config.json names under `key`."""
    return _ACTIVATIONS[fields.choice(key, tuple(_ACTIVATIONS), default) or default]


def render_activation(activation: str) -> str:
    """The Hugging Face name of an activation of `ModelConfig`."""
    return "gelu_pytorch_tanh" if activation == "gelu_tanh" else activation

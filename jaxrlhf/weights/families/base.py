"""Description of a model family: the meaning of its config.json and the names of its tensors."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from jaxrlhf.errors import DataError
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.weights.fields import Fields

_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_accurate": "gelu_tanh",
    "gelu_python_tanh": "gelu_tanh",
    "gelu_python": "gelu",
    "quick_gelu": "quick_gelu",
    "relu": "relu",
    "relu2": "relu2",
    "tanh": "tanh",
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
    lm_head: str = "lm_head"
    joined_by_head: bool = False  # a tensor that joins q, k and v holds those of the first head, of the second, ...


@dataclass(frozen=True)
class Key:
    """The key of config.json that holds one field of `ModelConfig`."""

    name: str
    read: Callable[[Fields, str, Any], Any]  # Fields.integer, ...
    default: Any = None  # for files that lack it, or a function from the fields before it to that; None: required
    render: Callable[[Any], Any] = lambda value: value  # the inverse of `read`


@dataclass(frozen=True)
class Family:
    """One `model_type` of Hugging Face."""

    architecture: str  # prefix of its class names
    keys: dict[str, Key]  # by field of ModelConfig
    fixed: dict[str, Any]  # fields that are equal in all models of the family
    parse: Callable[[Fields, dict[str, Any]], dict[str, Any]]  # config.json, `keys` read from it -> all other fields
    render: Callable[[ModelConfig], dict[str, Any]]  # the inverse of `parse`
    tensors: TensorNames
    lm_class: str = ""  # class name of the language model; "": `architecture` and ForCausalLM
    tied_by_default: bool = False  # default of tie_word_embeddings
    vocab_size: int | None = None  # default of vocab_size; None: required
    has_classifier: bool = True  # transformers has a class for reward models

    @property
    def language_model(self) -> str:
        return self.lm_class or f"{self.architecture}ForCausalLM"

    @property
    def classifier(self) -> str:
        return f"{self.architecture}ForSequenceClassification"

    def parse_all(self, fields: Fields) -> dict[str, Any]:
        """The ModelConfig fields that `keys`, `fixed` and `parse` describe."""
        values: dict[str, Any] = {}
        for field, key in self.keys.items():
            default = key.default(values) if callable(key.default) else key.default
            values[field] = key.read(fields, key.name, default)
        check_sizes(values, fields.where)  # before anything is built with an entry for each layer
        return self.fixed | values | self.parse(fields, values)

    def render_all(self, model: ModelConfig) -> dict[str, Any]:
        """The inverse of `parse_all`."""
        return {key.name: key.render(getattr(model, field)) for field, key in self.keys.items()} | self.render(model)


LARGEST = {
    "vocab_size": 2**26,
    "hidden_size": 2**20,
    "num_layers": 10_000,
    "num_heads": 2**16,
    "num_kv_heads": 2**16,
    "head_dim": 2**14,
    "mlp_size": 2**24,
    "num_experts": 2**16,
    "max_positions": 2**40,
}
"""Sizes far above those of any model: a larger one is a mistake, or meant to exhaust the memory of its reader."""


def check_sizes(values: Mapping[str, Any], where: str) -> None:
    """Raise DataError if one of the fields of a ModelConfig in `values` is above LARGEST."""
    for field, most in LARGEST.items():
        if (size := values.get(field)) is not None and size > most:
            raise DataError(f"{where}: {field} would be {size:,}, and no model has more than {most:,}")


def nullable(read: Callable[[Fields, str, Any], Any]) -> Callable[[Fields, str, Any], Any]:
    """`read` for a key whose null means that there is no such thing; only an absent key has the default, which may be
    None."""

    def read_or_none(fields: Fields, name: str, default: Any) -> Any:
        if fields.has(name):
            return read(fields, name, default)
        return None if name in fields.values else default

    return read_or_none


def activation(name: str, default: str) -> Key:
    """The key `name` with the name of an activation."""
    return Key(name, _parse_activation, default, lambda x: "gelu_pytorch_tanh" if x == "gelu_tanh" else x)


def _parse_activation(fields: Fields, name: str, default: str) -> str:
    return _ACTIVATIONS[fields.choice(name, tuple(_ACTIVATIONS), default) or default]

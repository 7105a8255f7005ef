"""Models in and out of Hugging Face layout: config.json, safetensors, the hub, model cards."""

from jaxrlhf.weights.export import export
from jaxrlhf.weights.hub import (
    abstract_weights,
    described_by,
    load,
    load_config,
    resize_embeddings,
    resolve,
    tokenizer_folder,
)
from jaxrlhf.weights.tokenizer import open_tokenizer

__all__ = [
    "abstract_weights",
    "described_by",
    "export",
    "load",
    "load_config",
    "open_tokenizer",
    "resize_embeddings",
    "resolve",
    "tokenizer_folder",
]

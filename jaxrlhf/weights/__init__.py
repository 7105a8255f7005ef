"""Models in Hugging Face layout: reading, writing, the hub, tokenizers and model cards."""

from jaxrlhf.weights.export import export
from jaxrlhf.weights.hub import base_and_adapters, resolve, tokenizer_folder
from jaxrlhf.weights.loading import (
    abstract_weights,
    abstract_weights_wanted,
    load,
    load_config,
    open_tokenizer,
    resize_embeddings,
    tensors_of,
)
from jaxrlhf.weights.upload import push_to_hub

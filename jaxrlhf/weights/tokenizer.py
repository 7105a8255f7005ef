"""Which tokenizer goes with a model."""

import dataclasses

from jaxrlhf.config import ModelSource, TokenizerSource
from jaxrlhf.data.tokenizer import Tokenizer, load_tokenizer
from jaxrlhf.errors import ConfigError
from jaxrlhf.weights.hub import load_config, resolve, tokenizer_folder


def open_tokenizer(source: TokenizerSource, model: ModelSource) -> Tokenizer:
    """The tokenizer of a run: its own path if one is given, else the model's, whose stop tokens count either way.

    Raises ConfigError if the model has no path, DataError if a folder is not there, holds a model that we do not run,
    or no tokenizer.
    """
    if not model.path:
        raise ConfigError("model.path is empty: give a folder in Hugging Face layout, a run directory or a hub id")
    load_config(model.path, revision=model.revision)  # what transformers says of a model unknown to it helps nobody
    folder = tokenizer_folder(model.path, model.revision)
    own = str(resolve(source.path, weights=False)) if source.path else ""
    return load_tokenizer(folder, dataclasses.replace(source, path=own))

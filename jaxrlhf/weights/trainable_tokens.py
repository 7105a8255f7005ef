"""Rows of single tokens in PEFT's layout (`trainable_token_indices`), beside the adapters of weights/peft.py.

They count in place of the table's own. A tied output goes with the embedding, an untied one has its own or none.
"""

from typing import Any

import jax.numpy as jnp
import numpy as np

from jaxrlhf.models import ModelConfig
from jaxrlhf.types import Params
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.names import tensors

KEY = "trainable_token_indices"
_SUFFIX = ".token_adapter.trainable_tokens_delta"


def names(model: ModelConfig) -> dict[str, str]:
    """{tensor of the folder: leaf of "rows"} for the tables that a model has."""
    tables = {("embed", "embedding"), ("lm_head", "kernel")}
    return {t.name.removesuffix(".weight") + _SUFFIX: t.path[1] for t in tensors(model) if t.path in tables}


def indices(fields: Fields, model: ModelConfig) -> tuple[int, ...]:
    """The tokens that adapter_config.json names. Raises DataError unless the model has them, the same in all tables."""
    given = fields.values.get(KEY)
    lists = list(given.values()) if isinstance(given, dict) else [given or []]
    first = lists[0] if lists else []
    if not (
        all(each == first for each in lists)
        and isinstance(first, list)
        and all(type(i) is int and 0 <= i < model.vocab_size for i in first)
        and len(set(first)) == len(first)
    ):
        fields.refuse(KEY, f"ids under {model.vocab_size}, none twice, and the same for every table")
    return tuple(first)


def rows(found: dict[str, np.ndarray], tokens: tuple[int, ...], model: ModelConfig) -> tuple[Params, list[str]]:
    """({leaf: its rows}, what does not fit) of the tensors `found` in a folder, by their names."""
    wanted = (len(tokens), model.hidden_size)
    wrong = [f"wrong shape: {n} is {list(a.shape)}, not {list(wanted)}" for n, a in found.items() if a.shape != wanted]
    if tokens and not found:
        wrong.append(f"missing: {next(iter(names(model)))} {list(wanted)}")
    leaves = ((names(model)[name], array) for name, array in found.items())
    return {leaf: jnp.asarray(array.T if leaf == "kernel" else array) for leaf, array in leaves}, wrong


def layout(model: ModelConfig, rows: Params) -> tuple[dict[str, np.ndarray], dict[str, Any] | None]:
    """(tensors by name, what adapter_config.json says) of the rows that a model has."""
    assert model.adapters is not None
    there = {name: leaf for name, leaf in names(model).items() if leaf in rows}
    arrays = {name: np.asarray(rows[leaf], np.float32) for name, leaf in there.items()}
    said = {name.removesuffix(_SUFFIX).rpartition(".")[2]: list(model.adapters.tokens) for name in there}
    return {name: a.T if there[name] == "kernel" else a for name, a in arrays.items()}, said or None

"""Trained rows of single tokens in PEFT's layout (`trainable_token_indices`), stored with the adapters.

They replace the rows of the embedding. A tied output head shares them; an untied one has its own or none.
"""

import jax.numpy as jnp
import numpy as np

from jaxrlhf.models import ModelConfig
from jaxrlhf.types import Params
from jaxrlhf.weights.fields import Fields
from jaxrlhf.weights.names import tensors

KEY = "trainable_token_indices"
_SUFFIX = ".token_adapter.trainable_tokens_delta"


def row_tensors(model: ModelConfig) -> dict[str, str]:
    """{tensor name in the folder: leaf of "rows"} for the embedding and an untied head."""
    tables = {("embed", "embedding"), ("lm_head", "kernel")}
    return {t.name.removesuffix(".weight") + _SUFFIX: t.path[1] for t in tensors(model) if t.path in tables}


def indices(fields: Fields, model: ModelConfig) -> tuple[int, ...]:
    """The token ids in adapter_config.json. Raises DataError for invalid ids, or if the tables have different ones."""
    value = fields.values.get(KEY)
    per_table = list(value.values()) if isinstance(value, dict) else [value or []]
    ids = per_table[0] if per_table else []
    if not (
        all(other == ids for other in per_table)
        and isinstance(ids, list)
        and all(type(i) is int and 0 <= i < model.vocab_size for i in ids)
        and len(set(ids)) == len(ids)
    ):
        fields.refuse(KEY, f"ids under {model.vocab_size}, none twice, and the same for every table")
    return tuple(ids)


def from_tensors(
    arrays: dict[str, np.ndarray], tokens: tuple[int, ...], model: ModelConfig
) -> tuple[Params, list[str]]:
    """({leaf of "rows": array}, problems) from arrays by tensor name."""
    shape, leaves = (len(tokens), model.hidden_size), row_tensors(model)
    problems = [
        f"wrong shape: {name} is {list(array.shape)}, not {list(shape)}"
        for name, array in arrays.items()
        if array.shape != shape
    ]
    if tokens and not arrays:
        problems.append(f"missing: {next(iter(leaves))} {list(shape)}")
    return {leaves[name]: jnp.asarray(_transposed(leaves[name], array)) for name, array in arrays.items()}, problems


def to_tensors(model: ModelConfig, rows: Params) -> tuple[dict[str, np.ndarray], dict[str, list[int]] | None]:
    """({tensor name: array}, value of `trainable_token_indices`) from the "rows" of a model."""
    assert model.adapters is not None
    leaves = {name: leaf for name, leaf in row_tensors(model).items() if leaf in rows}
    ids = {name.removesuffix(_SUFFIX).rpartition(".")[2]: list(model.adapters.tokens) for name in leaves}
    arrays = {name: _transposed(leaf, np.asarray(rows[leaf], np.float32)) for name, leaf in leaves.items()}
    return arrays, ids or None


def _transposed(leaf: str, array: np.ndarray) -> np.ndarray:
    return array.T if leaf == "kernel" else array

"""The models of tests/fixtures/models: between their folders and parameter trees, by the family table alone."""

import json
import pathlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file

from jaxrlhf import models
from jaxrlhf.models import ModelConfig
from jaxrlhf.weights import families, names

FOLDER = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "models"
CASES = sorted(folder.name for folder in FOLDER.iterdir())
CLASSIFIERS = [name for name in CASES if name.endswith(("-score", "-label"))]


@dataclass(frozen=True)
class Case:
    """A model with its parameters in float32, and what transformers computed with it."""

    folder: pathlib.Path
    model: ModelConfig
    params: dict[str, Any]
    golden: dict[str, np.ndarray]

    def named(self, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
        """A tree like the parameters (a gradient) under the names of the folder's tensors."""
        return named_from(self.model, tree)


@pytest.fixture(params=[name for name in CASES if name not in CLASSIFIERS])
def language_model(request) -> Case:
    return load(request.param)


@pytest.fixture(params=CLASSIFIERS)
def classifier(request) -> Case:
    return load(request.param)


def load(name: str) -> Case:
    folder = FOLDER / name
    model = families.parse(json.loads((folder / "config.json").read_text()), name)
    weights = {key: value.astype(np.float32) for key, value in load_file(folder / "model.safetensors").items()}
    return Case(folder, model, params_from(model, weights), load_file(folder / "golden.safetensors"))


def params_from(model: ModelConfig, named: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The parameter tree; fails if a tensor or a leaf is left over, or a shape is wrong."""
    abstract = jax.eval_shape(lambda key: models.init(model, key), jax.random.key(0))
    found: dict[tuple[str, ...], dict[tuple[int, ...], np.ndarray]] = {}
    used = set()
    for tensor in names.tensors(model):
        array = np.asarray(named[tensor.name])
        used.add(tensor.name)
        array = array.T if tensor.transpose else array
        if tensor.part is not None:
            groups = array.reshape(*array.shape[:-1], tensor.part.groups, -1)
            blocks = np.split(groups, np.cumsum(tensor.part.widths)[:-1], axis=-1)
            array = blocks[tensor.part.number].reshape(*array.shape[:-1], -1)
        found.setdefault(tensor.path, {})[tensor.index] = array
    assert used == set(named), used ^ set(named)
    tree: dict[str, Any] = {}
    for path, pieces in found.items():
        here = tree
        for key in path[:-1]:
            here = here.setdefault(key, {})
        lead = tuple(max(index[axis] for index in pieces) + 1 for axis in range(len(next(iter(pieces)))))
        stacked = np.stack([pieces[index] for index in np.ndindex(*lead)])
        here[path[-1]] = jnp.asarray(stacked.reshape(*lead, *stacked.shape[1:]))
    assert jax.tree.map(jnp.shape, tree) == jax.tree.map(jnp.shape, abstract)
    return tree


def named_from(model: ModelConfig, tree: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The other way: what each tensor of the folder holds."""
    parts: dict[str, list[tuple[int, np.ndarray]]] = {}
    transposed: dict[str, bool] = {}
    for tensor in names.tensors(model):
        leaf: Any = tree
        for key in tensor.path:
            leaf = leaf[key]
        array = np.asarray(leaf[tensor.index])
        number, groups = (tensor.part.number, tensor.part.groups) if tensor.part else (0, 1)
        block = array.reshape(*array.shape[:-1], groups, -1)
        parts.setdefault(tensor.name, []).append((number, block))
        transposed[tensor.name] = tensor.transpose
    named = {}
    for name, blocks in parts.items():
        joined = np.concatenate([block for _, block in sorted(blocks, key=lambda pair: pair[0])], axis=-1)
        joined = joined.reshape(*joined.shape[:-2], -1)
        named[name] = joined.T if transposed[name] else joined
    return named


@pytest.fixture(scope="session")
def padded():
    """padded(rows, side, width): tokens and mask [B, width] of rows of several lengths; padding is id 0."""

    def pad(rows: list[np.ndarray], side: str, width: int) -> tuple[jax.Array, jax.Array]:
        tokens, mask = np.zeros((len(rows), width), np.int32), np.zeros((len(rows), width), bool)
        for i, row in enumerate(rows):
            at = slice(0, len(row)) if side == "right" else slice(width - len(row), width)
            tokens[i, at], mask[i, at] = row, True
        return jnp.asarray(tokens), jnp.asarray(mask)

    return pad


@pytest.fixture(scope="session")
def make():
    """make(**changes): a small ModelConfig with grouped heads, biases off and a head_dim of its own."""

    def config(**changes: Any) -> ModelConfig:
        layers = changes.get("num_layers", 2)
        base = {
            "family": "qwen3",
            "vocab_size": 32,
            "hidden_size": 16,
            "num_layers": layers,
            "num_heads": 4,
            "num_kv_heads": 2,
            "head_dim": 6,
            "mlp_size": 20,
            "max_positions": 64,
            "norm": "rmsnorm",
            "norm_eps": 1e-6,
            "activation": "silu",
            "gated_mlp": True,
            "rope": models.Rope(theta=100.0),
            "qkv_bias": False,
            "attention_out_bias": False,
            "mlp_bias": False,
            "qk_norm": True,
            "sliding_window": None,
            "sliding_layers": (False,) * layers,
            "tie_embeddings": True,
        }
        return ModelConfig(**{**base, **changes})

    return config


@pytest.fixture(scope="session")
def big_weights():
    """big_weights(model): parameters with which attention is far from uniform and norms are not 1."""

    def weights(model: ModelConfig, seed: int = 0) -> dict[str, Any]:
        generator = np.random.default_rng(seed)
        abstract = jax.eval_shape(lambda key: models.init(model, key), jax.random.key(0))
        return jax.tree.map(lambda leaf: jnp.asarray(generator.normal(0, 0.5, leaf.shape), jnp.float32), abstract)

    return weights

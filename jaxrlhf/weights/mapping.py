"""Conversion between the tensors of a model folder and the parameter tree, one tensor at a time.

A leaf is filled on its device: the host holds one tensor at a time, transposition and dtype conversion run on the
device, and each device receives only its own shard. A process reads no bytes but those of its devices' shards.
"""

import functools
import re
from collections import defaultdict
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jaxrlhf import sharding
from jaxrlhf.errors import DataError
from jaxrlhf.models import ModelConfig
from jaxrlhf.types import Params, leaf_at, set_leaf
from jaxrlhf.weights import safetensors, writer
from jaxrlhf.weights.families import tensor_names
from jaxrlhf.weights.names import Index, Tensor, tensors
from jaxrlhf.weights.safetensors import Entry

# Constants that older versions of transformers stored with the weights: causal masks and rotary frequencies
_BUFFER = re.compile(r"(^|\.)((attn|attention)\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
_LM_HEAD = "lm_head.weight"


def shape_of(tensor: Tensor, leaf: Any) -> tuple[int, ...]:
    """The stored shape of `tensor`, from the shape of its leaf."""
    shape = list(leaf.shape[len(tensor.index) :])
    if tensor.part:
        shape[-1] = tensor.part.groups * sum(tensor.part.widths)
    return tuple(reversed(shape)) if tensor.transpose else tuple(shape)


def match(
    model: ModelConfig, shapes: Params, entries: dict[str, Entry], *, new_head: bool, where: str
) -> dict[str, Entry]:
    """{name in the family table: its entry} for every tensor that `model` needs, but for a new score head.

    Ignores stored constants, the output head of a language model that becomes a reward model, and an output head equal
    to the embedding it is tied to. Raises DataError listing all tensors that are missing, unexpected or of another
    shape or kind.
    """
    expected = {
        tensor.name: shape_of(tensor, leaf_at(shapes, tensor.path))
        for tensor in tensors(model)
        if not (new_head and tensor.path[0] == "score")
    }
    names = tensor_names(model)
    prefixes = ("", names.decoder)  # a bare decoder, as in the original GPT-2 files, has no prefix
    head = f"{names.lm_head}.weight"
    matched: dict[str, Entry] = {}
    unexpected = []
    for name, entry in entries.items():
        known_name = head if name == _LM_HEAD else name  # the name in transformers 5, if the family had another before
        full_name = next((prefix + known_name for prefix in prefixes if prefix + known_name in expected), None)
        if full_name is not None and full_name not in matched:
            matched[full_name] = entry
        elif not _BUFFER.search(name) and not (known_name == head and new_head):
            unexpected.append(name)
    stored_head = next((name for name in (head, _LM_HEAD) if name in unexpected), None)
    if stored_head and model.head == "lm" and model.tie_embeddings:
        embedding = next(t.name for t in tensors(model) if t.path == ("embed", "embedding"))
        if embedding in matched and not safetensors.same(entries[stored_head], matched[embedding]):
            raise DataError(
                f"{where}: config.json ties the output head to the embedding (tie_word_embeddings), but there is a "
                f"{stored_head} that differs from {matched[embedding].name}; if that head is meant, make it false"
            )
        unexpected.remove(stored_head)
    problems = [f"missing: {name} {list(shape)}" for name, shape in expected.items() if name not in matched]
    for name in unexpected:
        problems.append(f"unexpected: {name if name.isprintable() else ascii(name)} {list(entries[name].shape)}")
    for name, entry in matched.items():
        if entry.shape != expected[name]:
            problems.append(f"wrong shape: {name} is {list(entry.shape)}, config.json makes it {list(expected[name])}")
        if not jnp.issubdtype(entry.dtype, jnp.floating):
            problems.append(
                f"wrong dtype: {name} holds {entry.dtype}, not floating-point numbers; quantised models are not "
                "supported"
            )
    if problems:
        raise DataError(f"{where}: the weights do not fit config.json ({model.family}):\n  " + "\n  ".join(problems))
    return matched


def fill(
    model: ModelConfig, shapes: Params, entries: dict[str, Entry], *, dtype: str, shardings: Params | None
) -> Params:
    """The parameters whose tensors are in `entries` (returned by `match`).

    `dtype` "auto" keeps the stored dtype, but float16, float64 and leaves of mixed dtypes become float32.
    """
    by_leaf = _by_leaf(model, entries)
    params: Params = {}
    buffer = safetensors.allocate(0)  # reused, because jax frees borrowed host memory late
    # Largest tensor first: while it is in memory twice, the others are not loaded yet
    for path in sorted(by_leaf, key=lambda path: -max(entries[t.name].nbytes for t in by_leaf[path])):
        leaf_tensors, shape = by_leaf[path], leaf_at(shapes, path).shape
        leaf_sharding = None if shardings is None else leaf_at(shardings, path)
        leaf_dtype = _stored_dtype(leaf_tensors, entries) if dtype == "auto" else np.dtype(dtype)
        leaf = jnp.zeros(shape, leaf_dtype, device=leaf_sharding) if leaf_tensors[0].index else None
        for tensor in leaf_tensors:
            entry = entries[tensor.name]
            if leaf_sharding is None or leaf_sharding.is_fully_addressable:
                if not entry.nbytes <= buffer.nbytes <= 2 * entry.nbytes:
                    buffer = safetensors.allocate(entry.nbytes)
                piece = _to_device(safetensors.read(entry, buffer), tensor, leaf_sharding)
            else:
                piece = _read_shards(entry, tensor, leaf_sharding)
            leaf = _insert(leaf, piece, tensor.index, tensor.transpose, leaf_dtype, leaf_sharding)
            leaf.block_until_ready()  # `buffer` is overwritten next
        set_leaf(params, path, leaf)
    return params


def with_stored_dtypes(model: ModelConfig, shapes: Params, entries: dict[str, Entry]) -> Params:
    """`shapes` with the dtypes that `fill` gives for "auto"; leaves without entries are unchanged."""
    by_leaf = _by_leaf(model, entries)

    def with_dtype(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        leaf_tensors = by_leaf.get(tuple(key.key for key in keys))
        return jax.ShapeDtypeStruct(leaf.shape, _stored_dtype(leaf_tensors, entries)) if leaf_tensors else leaf

    return jax.tree_util.tree_map_with_path(with_dtype, shapes)


def _by_leaf(model: ModelConfig, entries: dict[str, Entry]) -> dict[tuple[str, ...], list[Tensor]]:
    by_leaf: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for tensor in tensors(model):
        if tensor.name in entries:
            by_leaf[tensor.path].append(tensor)
    return by_leaf


def _stored_dtype(leaf_tensors: list[Tensor], entries: dict[str, Entry]) -> np.dtype:
    all_bfloat16 = {entries[tensor.name].dtype for tensor in leaf_tensors} == {np.dtype(jnp.bfloat16)}
    return np.dtype(jnp.bfloat16 if all_bfloat16 else np.float32)


def _to_device(array: np.ndarray, tensor: Tensor, leaf_sharding: NamedSharding | None) -> Array:
    """Copy the part of a stored tensor that `tensor` is to its device, or its shards to theirs, split like the leaf."""
    if tensor.part:
        array = array.take(tensor.part.columns, axis=0 if tensor.transpose else -1)
    if array.dtype == np.float64:  # jax does not accept it
        array = array.astype(np.float32)
    if leaf_sharding is None:
        return jax.device_put(array)
    to = _sharding_of(tensor, array.ndim, leaf_sharding)
    return jax.make_array_from_callback(array.shape, to, lambda index: array[index])


def _sharding_of(tensor: Tensor, ndim: int, leaf_sharding: NamedSharding) -> NamedSharding:
    """The sharding of a stored tensor that is split like its leaf."""
    stacked = len(tensor.index)
    axes = (*leaf_sharding.spec, *(None,) * (ndim + stacked - len(leaf_sharding.spec)))[stacked:]
    return NamedSharding(leaf_sharding.mesh, P(*(reversed(axes) if tensor.transpose else axes)))


def _read_shards(entry: Entry, tensor: Tensor, leaf_sharding: NamedSharding) -> Array:
    """The part of a stored tensor that `tensor` is, on the mesh, of which this process reads the shards of its own
    devices."""
    axis = 0 if tensor.transpose else len(entry.shape) - 1
    columns = tensor.part.columns if tensor.part else np.arange(entry.shape[axis])
    shape = tuple(len(columns) if dim == axis else size for dim, size in enumerate(entry.shape))

    @functools.cache  # devices that hold the same shard
    def read(*bounds: tuple[int, int]) -> np.ndarray:
        wanted = columns[slice(*bounds[axis])]
        runs = np.split(wanted, np.flatnonzero(np.diff(wanted) != 1) + 1)  # of neighbours in the file
        index = [slice(*pair) for pair in bounds]
        pieces = []
        for run in runs:
            index[axis] = slice(run[0], run[-1] + 1)
            pieces.append(safetensors.read_part(entry, tuple(index)))
        array = np.concatenate(pieces, axis=axis)
        return array.astype(np.float32) if array.dtype == np.float64 else array

    def shard(index: Any) -> np.ndarray:
        return read(*(part.indices(size)[:2] for part, size in zip(index, shape, strict=True)))

    return jax.make_array_from_callback(shape, _sharding_of(tensor, len(shape), leaf_sharding), shard)


@partial(jax.jit, donate_argnums=0, static_argnames=("transpose", "dtype", "to"))
def _insert(
    leaf: Array | None, piece: Array, index: Index, transpose: bool, dtype: np.dtype, to: NamedSharding | None
) -> Array:
    """Write a tensor into its layer (and expert) of `leaf`, or make it the leaf if there is none."""
    piece = (piece.T if transpose else piece).astype(dtype)
    if leaf is None:
        whole = jnp.copy(piece)  # even so: memory that jax does not own could not be donated to an update
    else:
        stacked = piece.reshape((1,) * len(index) + piece.shape)
        whole = jax.lax.dynamic_update_slice(leaf, stacked, (*index, *(0,) * piece.ndim))
    return whole if to is None else jax.lax.with_sharding_constraint(whole, to)


def sources(model: ModelConfig, params: Params, dtype: str | None) -> list[writer.Source]:
    """All tensors of a model, to be written in `dtype`; each is copied from the device when it is written."""
    by_name: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors(model):
        by_name[tensor.name].append(tensor)
    result = []
    for name, parts in by_name.items():
        leaf = leaf_at(params, parts[0].path)
        stored_dtype = np.dtype(dtype or leaf.dtype)
        read = partial(_to_host, params, parts, stored_dtype)
        result.append(writer.Source(name, stored_dtype, shape_of(parts[0], leaf), read))
    return result


def _to_host(params: Params, parts: list[Tensor], dtype: np.dtype) -> np.ndarray:
    joined = np.empty(())
    for tensor in parts:
        leaf = leaf_at(params, tensor.path)
        array = sharding.fetch(leaf[tensor.index]).astype(dtype, copy=False)
        if tensor.part is None:
            joined = array
            break
        if not joined.shape:
            joined = np.empty((*array.shape[:-1], tensor.part.groups * sum(tensor.part.widths)), dtype)
        joined[..., tensor.part.columns] = array
    return joined.T if parts[0].transpose else joined

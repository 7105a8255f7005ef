"""Between the tensors of a model folder and the parameter tree, one tensor at a time.

The family table says which tensor is which (part of a) leaf. A leaf is filled on its device: the host holds one tensor
at a time, transposition and conversion run where the parameters live, and each device gets its own share only.
"""

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

from jaxrlhf.errors import DataError
from jaxrlhf.models import ModelConfig
from jaxrlhf.types import Params
from jaxrlhf.weights import safetensors, writer
from jaxrlhf.weights.names import Tensor, tensors
from jaxrlhf.weights.safetensors import Entry

# Constants that older versions of transformers stored beside the weights: causal masks and rotary frequencies.
_BUFFER = re.compile(r"(^|\.)(attn\.(bias|masked_bias)|rotary_emb\.inv_freq)$")
_PREFIXES = ("model.", "transformer.")  # absent where a bare decoder was saved, as in the original GPT-2 files
LM_HEAD = "lm_head.weight"


def leaf_at(tree: Params, path: tuple[str, ...]) -> Any:
    """The leaf of a nested dict at `path`."""
    for key in path:
        tree = tree[key]
    return tree


def shape_of(tensor: Tensor, leaf: Any) -> tuple[int, ...]:
    """The shape that the file must hold for `tensor`, from the shape of its leaf."""
    shape = list(leaf.shape[1:] if tensor.layer is not None else leaf.shape)
    shape[-1] *= tensor.part[1]
    return tuple(reversed(shape)) if tensor.transpose else tuple(shape)


def match(
    model: ModelConfig, abstract: Params, entries: dict[str, Entry], *, without: str, where: str
) -> dict[str, Entry]:
    """{name in the family table: its entry}, for every tensor that `model` needs; leaves under `without` are left out.

    Stored constants are passed over, and so are an output head that the model does not have (a language model that
    becomes a reward model) and one that repeats the embedding it is tied to. Raises DataError that lists everything
    else that is missing, unexpected or of another shape.
    """
    wanted = {t.name: shape_of(t, leaf_at(abstract, t.path)) for t in tensors(model) if t.path[0] != without}
    found: dict[str, Entry] = {}
    unexpected = []
    for name, entry in entries.items():
        full = next((p + name for p in ("", *_PREFIXES) if p + name in wanted), None)
        if full is not None and full not in found:
            found[full] = entry
        elif not _BUFFER.search(name) and not (name == LM_HEAD and without == "score"):
            unexpected.append(name)
    if LM_HEAD in unexpected and model.head == "lm" and model.tie_embeddings:
        embedding = next(t.name for t in tensors(model) if t.path == ("embed", "embedding"))
        if embedding in found and not safetensors.same(entries[LM_HEAD], found[embedding]):
            raise DataError(
                f"{where}: config.json ties the output head to the embedding (tie_word_embeddings), but there is a "
                f"{LM_HEAD} that differs from {found[embedding].name}; if that head is meant, make it false"
            )
        unexpected.remove(LM_HEAD)
    lines = [f"missing: {name} {list(shape)}" for name, shape in wanted.items() if name not in found]
    lines += [f"unexpected: {_printable(name)} {list(entries[name].shape)}" for name in unexpected]
    lines += [
        f"wrong shape: {name} is {list(found[name].shape)}, config.json makes it {list(shape)}"
        for name, shape in wanted.items()
        if name in found and found[name].shape != shape
    ]
    lines += [
        f"wrong dtype: {name} holds {e.dtype}, not floating-point numbers; quantised models are not supported"
        for name, e in found.items()
        if not jnp.issubdtype(e.dtype, jnp.floating)
    ]
    if lines:
        raise DataError(f"{where}: the weights do not fit config.json ({model.family}):\n  " + "\n  ".join(lines))
    return found


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def fill(
    model: ModelConfig,
    abstract: Params,
    entries: dict[str, Entry],
    *,
    without: str,
    dtype: str,
    shardings: Params | None,
) -> Params:
    """The parameters, read from `entries` (of `match`); leaves under `without` are left out.

    `dtype` "auto" keeps what is stored, but float16 and float64 become float32, as do leaves of several dtypes.
    """
    parts: dict[tuple[str, ...], list[Tensor]] = defaultdict(list)
    for tensor in tensors(model):
        if tensor.path[0] != without:
            parts[tensor.path].append(tensor)
    params: Params = {}
    memory = safetensors.allocate(0)  # used again: jax lets go of what it borrows some time later
    # Largest tensor first: while it is in memory twice, the rest is not there yet.
    for path in sorted(parts, key=lambda p: -max(entries[t.name].nbytes for t in parts[p])):
        leaf, sharding = leaf_at(abstract, path), None if shardings is None else leaf_at(shardings, path)
        stored = {entries[t.name].dtype for t in parts[path]}
        kind = _dtype(stored) if dtype == "auto" else np.dtype(dtype)
        filled = None if parts[path][0].layer is None else jnp.zeros(leaf.shape, kind, device=sharding)
        for tensor in parts[path]:
            entry = entries[tensor.name]
            if not entry.nbytes <= memory.nbytes <= 2 * entry.nbytes:
                memory = safetensors.allocate(entry.nbytes)
            filled = _take(filled, tensor, safetensors.read(entry, memory), kind, sharding)
            filled.block_until_ready()  # then nothing needs `memory` any more
        here = params
        for key in path[:-1]:
            here = here.setdefault(key, {})
        here[path[-1]] = filled
    return params


def with_stored_dtypes(model: ModelConfig, abstract: Params, entries: dict[str, Entry], *, without: str) -> Params:
    """The shapes of `abstract` in the dtypes that `fill` gives for "auto"; leaves under `without` are unchanged."""
    stored: dict[tuple[str, ...], set[np.dtype]] = defaultdict(set)
    for tensor in tensors(model):
        if tensor.path[0] != without:
            stored[tensor.path].add(entries[tensor.name].dtype)

    def with_dtype(keys: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> jax.ShapeDtypeStruct:
        dtypes = stored.get(tuple(key.key for key in keys))
        return jax.ShapeDtypeStruct(leaf.shape, _dtype(dtypes)) if dtypes else leaf

    return jax.tree_util.tree_map_with_path(with_dtype, abstract)


def _dtype(stored: set[np.dtype]) -> np.dtype:
    only = next(iter(stored)) if len(stored) == 1 else np.dtype(np.float32)
    return only if only == jnp.bfloat16 else np.dtype(np.float32)


def _take(
    leaf: Array | None, tensor: Tensor, array: np.ndarray, dtype: np.dtype, sharding: NamedSharding | None
) -> Array:
    """The leaf with one more tensor in it."""
    index, count = tensor.part
    if count > 1:
        array = np.split(array, count, axis=0 if tensor.transpose else -1)[index]
    if array.dtype == np.float64:  # which jax does not take as it is
        array = array.astype(np.float32)
    piece = _put(array, tensor, sharding)
    if leaf is None:
        return _whole(piece, dtype, tensor.transpose, sharding)
    assert tensor.layer is not None
    return _into_layer(leaf, piece, tensor.layer, tensor.transpose, sharding)


def _put(array: np.ndarray, tensor: Tensor, leaf: NamedSharding | None) -> Array:
    """Host memory to the device, or to every device its share: the tensor is split as the leaf will be."""
    if leaf is None:
        return jax.device_put(array)
    stacked = int(tensor.layer is not None)
    spec = (*leaf.spec, *(None,) * (array.ndim + stacked - len(leaf.spec)))[stacked:]
    sharding = NamedSharding(leaf.mesh, P(*(reversed(spec) if tensor.transpose else spec)))
    return jax.make_array_from_callback(array.shape, sharding, lambda index: array[index])


@partial(jax.jit, static_argnames=("dtype", "transpose", "sharding"))
def _whole(piece: Array, dtype: np.dtype, transpose: bool, sharding: NamedSharding | None) -> Array:
    # A copy even where nothing changes: memory that jax does not own could not be donated to an update
    leaf = jnp.copy((piece.T if transpose else piece).astype(dtype))
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)


@partial(jax.jit, donate_argnums=0, static_argnames=("transpose", "sharding"))
def _into_layer(leaf: Array, piece: Array, layer: int, transpose: bool, sharding: NamedSharding | None) -> Array:
    piece = (piece.T if transpose else piece).astype(leaf.dtype)
    leaf = jax.lax.dynamic_update_index_in_dim(leaf, piece, layer, 0)
    return leaf if sharding is None else jax.lax.with_sharding_constraint(leaf, sharding)


def sources(model: ModelConfig, params: Params, dtype: str | None) -> list[writer.Source]:
    """What to write for `params`: every tensor of the family table, read from the device when its turn comes."""
    parts: dict[str, list[Tensor]] = defaultdict(list)
    for tensor in tensors(model):
        parts[tensor.name].append(tensor)
    found = []
    for name, tensors_ in parts.items():
        leaf = leaf_at(params, tensors_[0].path)
        kind = np.dtype(dtype or leaf.dtype)
        found.append(writer.Source(name, kind, shape_of(tensors_[0], leaf), partial(_tensor, params, tensors_, kind)))
    return found


def _tensor(params: Params, parts: list[Tensor], dtype: np.dtype) -> np.ndarray:
    arrays = []
    for tensor in sorted(parts, key=lambda t: t.part):
        leaf = leaf_at(params, tensor.path)
        arrays.append(np.asarray(leaf if tensor.layer is None else leaf[tensor.layer]).astype(dtype, copy=False))
    whole = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, axis=-1)
    return whole.T if parts[0].transpose else whole

"""Memory of generation: slots and their cache on a mesh, and a cache that grows."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from jaxtyping import Array

from jaxrlhf import memory, sharding
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig, empty_cache
from jaxrlhf.rollout import decode
from jaxrlhf.rollout.decode import Decoding
from jaxrlhf.types import KVCache, Slots


def check_slots(model: ModelConfig, slots: int, columns: int, mesh: jax.sharding.Mesh | None = None) -> None:
    """Raise ConfigError for less than one slot, or if a cache [slots, columns] does not fit in device memory."""
    if slots < 1:
        raise ConfigError(f"rollout.slots is {slots}; it must be at least 1")
    if mesh is not None and not sharding.is_here(mesh):
        return  # `jaxrlhf plan` tells what its devices need
    shards = 1
    if mesh is not None and sharding.platform(mesh) != "cpu":  # CPU devices share memory
        shards = cache_shards(model, mesh)
    itemsize = jnp.dtype(model.dtype).itemsize
    slot_bytes = 2 * len(model.layers_with("attention")) * model.num_kv_heads * columns * model.head_dim * itemsize
    state = jax.eval_shape(lambda: empty_cache(model, 1, 0).states)
    slot_bytes += sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(state))
    free = memory.free_on_device()
    if free is not None and slots * slot_bytes > (free := free * shards):
        raise ConfigError(
            f"{slots} slots of {columns} tokens need {slots * slot_bytes / 2**30:.1f} GiB for keys and values, but "
            f"{free / 2**30:.1f} GiB are free; set rollout.slots to {max(1, int(0.8 * free / slot_bytes))} or less, or "
            "lower sampling.response_length"
        )


def cache_shapes(model: ModelConfig, slots: int, columns: int, mesh: jax.sharding.Mesh) -> KVCache:
    """The shapes of a cache [slots, columns], with their shardings."""
    cache = jax.eval_shape(lambda: empty_cache(model, slots, columns))
    return sharding.with_shardings(cache, _cache_shardings(cache, mesh))


def cache_shards(model: ModelConfig, mesh: jax.sharding.Mesh) -> int:
    """Number of shards of the keys and values of a cache: rows, and heads if `tensor` divides them."""
    tensor = mesh.shape["tensor"]
    return sharding.row_shards(mesh) * (tensor if model.num_kv_heads % tensor == 0 else 1)


def slot_shapes(
    decoding: Decoding, batch: int, columns: int, mesh: jax.sharding.Mesh | None, room: int | None = None
) -> Slots:
    """The shapes of `decode.empty_slots`, with their shardings if there is a mesh."""
    state = jax.eval_shape(lambda: decode.empty_slots(decoding, batch, columns, room))
    return state if mesh is None else sharding.with_shardings(state, slot_shardings(state, mesh))


@partial(jax.jit, static_argnames=("batch", "prompt_columns", "mesh", "room"))
def empty_slots(
    decoding: Decoding, batch: int, prompt_columns: int, mesh: jax.sharding.Mesh | None, room: int | None = None
) -> Slots:
    """`decode.empty_slots`, spread over the mesh if there is one."""
    slots = decode.empty_slots(decoding, batch, prompt_columns, room)
    return slots if mesh is None else jax.lax.with_sharding_constraint(slots, slot_shardings(slots, mesh))


def slot_shardings(slots: Slots, mesh: jax.sharding.Mesh) -> Any:
    """Shardings of slots: rows are split like those of a batch."""
    rows, replicated = NamedSharding(mesh, sharding.ROWS), NamedSharding(mesh, P())
    cache = _cache_shardings(slots.cache, mesh)
    return dataclasses.replace(jax.tree.map(lambda x: rows if x.ndim else replicated, slots), cache=cache)


def _cache_shardings(cache: KVCache, mesh: jax.sharding.Mesh) -> Any:
    """Rows are split like those of a batch, heads of keys, values and states over `tensor`."""
    rows, tensor = NamedSharding(mesh, sharding.ROWS), mesh.shape["tensor"]

    def heads(x: Any) -> NamedSharding:
        split = ("tensor",) if tensor > 1 and x.shape[-3] % tensor == 0 else ()
        if x.ndim == 5:  # stacked [L, S, K, B, H]
            return NamedSharding(mesh, P(None, None, *(split or (None,)), *sharding.ROWS))
        return NamedSharding(mesh, P(*sharding.ROWS, *split))

    return dataclasses.replace(
        jax.tree.map(lambda _: rows, cache),
        k=jax.tree.map(heads, cache.k),
        v=jax.tree.map(heads, cache.v),
        states=tuple((rows, heads(state)) for _, state in cache.states),
    )


def grow_cache(cache: KVCache, columns: int, model: ModelConfig) -> KVCache:
    """A cache of unstacked layers with empty columns added at its end, up to `columns`. Its arrays are replaced one by
    one, so that memory never holds both caches. A state of a delta net has no columns."""

    def widen(x: Array, axis: int) -> Array:
        wider = jax.block_until_ready(_pad(x, axis, columns - x.shape[axis], x.sharding))
        x.delete()
        return wider

    return dataclasses.replace(
        cache,
        k=jax.tree.map(lambda x: widen(x, model.key_columns), cache.k),
        v=jax.tree.map(lambda x: widen(x, 2), cache.v),
        positions=widen(cache.positions, 1),
        valid=widen(cache.valid, 1),
    )


@partial(jax.jit, static_argnames=("axis", "more", "to"))
def _pad(x: Array, axis: int, more: int, to: jax.sharding.Sharding) -> Array:
    padding = [(0, more if i == axis else 0) for i in range(x.ndim)]
    return jax.lax.with_sharding_constraint(jnp.pad(x, padding), to)

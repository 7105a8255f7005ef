"""Digests of the leaves of a state, and the seal of a checkpoint record, to detect damage when it is read back."""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.errors import StorageError

EXPERTS = ".lora.layers.experts."  # in the names of adapters of experts and of their moments
SMALL = 2**18
"""Elements of a leaf that the host sums up sooner than a program for its shape is compiled."""


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """Leaves by path ("params.policy.norm.scale"), without empty arrays."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    by_name = {path_name(path): leaf for path, leaf in leaves}
    assert len(by_name) == len(leaves), "two leaves of the state have the same name"
    return {name: leaf for name, leaf in by_name.items() if leaf.size}


def path_name(path: tuple) -> str:
    """Name of a leaf from its jax key path."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def total_bytes(leaves: dict[str, Any]) -> int:
    """Size of all leaves in bytes."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())


def digests(leaves: dict[str, Any]) -> dict[str, str]:
    """Digest of every leaf: "<16 hex digits>:<dtype>:<shape>".

    Equal bits give equal digests on any mesh, as a digest is a sum of integers modulo 2^32. Changing one element always
    changes the digest, as every multiplier is odd.
    """
    # One leaf at a time: each sums over devices, and XLA's CPU client deadlocks on many such programs at once.
    sums = {name: _sums_of(leaf) for name, leaf in leaves.items()}
    return {name: f"{int(a):08x}{int(b):08x}:{_dtype_and_shape(leaves[name])}" for name, (a, b) in sums.items()}


def shape_of(digest: str) -> jax.ShapeDtypeStruct:
    """Shape and dtype recorded in a digest."""
    _, dtype, shape = digest.split(":")
    return jax.ShapeDtypeStruct([int(n) for n in shape.split("x") if n], jnp.dtype(dtype))


def with_seal(record: dict[str, Any]) -> dict[str, Any]:
    """Add a SHA-256 of the record to it under "seal" (replacing any). Raises TypeError if the record is not JSON."""
    content = json.loads(json.dumps({key: value for key, value in record.items() if key != "seal"}))
    return {**content, "seal": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def check_leaves(checkpoint: str, stored: dict[str, str], template: dict[str, Any]) -> None:
    """Compare names, dtypes and shapes of the `stored` digests with those of the run's `template`.

    Raises:
        StorageError: they differ; the message lists the leaves.
    """
    found = {name: digest.partition(":")[2] for name, digest in stored.items()}
    expected = {name: _dtype_and_shape(leaf) for name, leaf in template.items()}
    if found == expected:
        return
    changed = sorted(name for name in found.keys() & expected.keys() if found[name] != expected[name])
    differences = {
        "lacks": sorted(expected.keys() - found.keys()),
        "has in addition": sorted(found.keys() - expected.keys()),
        "differs in": [f"{name} ({found[name]}, now {expected[name]})" for name in changed],
    }
    remedy = "Restore the config of that run, or start over with --fresh"
    if [verb for verb, names in differences.items() if names] == ["lacks"] and all(
        EXPERTS in name for name in differences["lacks"]
    ):
        remedy = (
            "`all-linear` of lora.target_modules did not include the experts when that run was started. To resume it, "
            "set lora.target_modules to the matrices that it trains, [q_proj, k_proj, v_proj, o_proj], in the "
            "config.yaml of the run and in your config; or start over with --fresh"
        )
    raise StorageError(
        f"{checkpoint} was written with another model or optimizer: it "
        + "; it ".join(f"{verb} {first_few(names)}" for verb, names in differences.items() if names)
        + f". {remedy}"
    )


def first_few(names: list[str]) -> str:
    """The first three names and the number of the others."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _dtype_and_shape(leaf: Any) -> str:
    """ "<dtype>:<shape>" of an array or a ShapeDtypeStruct, "float32:2x3"."""
    return f"{leaf.dtype}:{'x'.join(map(str, leaf.shape))}"


def _sums_of(leaf: Any) -> np.ndarray:
    """The two sums of a digest, uint32 [2]; those of a small leaf on the host, which compiles nothing."""
    if leaf.size <= SMALL and (not isinstance(leaf, jax.Array) or len(leaf.sharding.device_set) == 1):
        if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
            leaf = jax.random.key_data(leaf)
        values = np.ascontiguousarray(jax.device_get(leaf)).reshape(-1)
        words = values.view(_word(values.dtype)).astype(np.uint32)
        products = (words * factor for factor in _factors(np.arange(len(words), dtype=np.uint32)))
        return np.stack([np.sum(product, dtype=np.uint32) for product in products])
    return jax.device_get(_weighted_sums(sharding.to_device(leaf)))


@jax.jit
def _weighted_sums(x: jax.Array) -> jax.Array:  # uint32 [2]
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    # elements of 8 bytes become two words on a new last axis
    words = jax.lax.bitcast_convert_type(x, _word(x.dtype)).astype(jnp.uint32)
    factors = _factors(sharding.element_indices(words.shape))
    return jnp.stack([jnp.sum(words * factor, dtype=jnp.uint32) for factor in factors])


def _word(dtype: Any) -> Any:
    return {1: np.uint8, 2: np.uint16}.get(dtype.itemsize, np.uint32)


def _factors(index: Any) -> tuple[Any, Any]:
    """The odd multipliers of words with these numbers, uint32 arrays of jax or NumPy."""
    first = (index * np.uint32(0x9E3779B1) ^ (index >> np.uint32(15))) | np.uint32(1)
    return first, (index * np.uint32(0x85EBCA77) + np.uint32(0xC2B2AE3D)) | np.uint32(1)

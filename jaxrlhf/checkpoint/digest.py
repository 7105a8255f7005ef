"""What a checkpoint says about its content, so that whoever reads it can tell whether it still holds.

Every leaf of a state has a name (its path), a kind (dtype and shape) and a digest; a JSON record has a seal.
"""

import hashlib
import json
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.errors import StorageError


def leaves_by_name(tree: Any) -> dict[str, Any]:
    """Leaves by path ("params.policy.norm.scale"). Empty arrays are left out: there is nothing in them to keep."""
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    named = {name(path): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves of the state have the same name"
    return {path: leaf for path, leaf in named.items() if leaf.size}


def name(path: tuple) -> str:
    """A jax key path as text."""
    return jax.tree_util.keystr(path, simple=True, separator=".")


def kind(leaf: Any) -> str:
    """ "<dtype>:<shape>" of an array or a ShapeDtypeStruct, "float32:2x3"."""
    return f"{leaf.dtype}:{'x'.join(map(str, leaf.shape))}"


def described(digest: str) -> jax.ShapeDtypeStruct:
    """The shape and dtype of the array that a digest is of."""
    _, dtype, shape = digest.split(":")
    return jax.ShapeDtypeStruct([int(n) for n in shape.split("x") if n], jnp.dtype(dtype))


def size(leaves: dict[str, Any]) -> int:
    """Bytes of all leaves."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in leaves.values())


def digests(leaves: dict[str, Any]) -> dict[str, str]:
    """A digest of every leaf: "<16 hex digits>:<dtype>:<shape>".

    Equal bits give equal digests on any mesh: the digest is a sum of integers modulo 2^32, so order does not matter.
    Changing one element always changes it, as every multiplier is odd.
    """
    # One at a time: each sums over devices, and XLA's CPU client deadlocks when many such programs are under way.
    lanes = [jax.device_get(_lanes(sharding.to_device(leaf))) for leaf in leaves.values()]
    return {
        path: f"{int(a):08x}{int(b):08x}:{kind(leaf)}"
        for (path, leaf), (a, b) in zip(leaves.items(), lanes, strict=True)
    }


def sealed(record: dict[str, Any]) -> dict[str, Any]:
    """The record as JSON has it, with a SHA-256 of itself under "seal". TypeError where it is not JSON."""
    content = json.loads(json.dumps({k: v for k, v in record.items() if k != "seal"}))
    return {**content, "seal": hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()}


def check_fit(where: str, stored: dict[str, str], template: dict[str, Any]) -> None:
    """Refuse a checkpoint (`stored`: digests) whose leaves are not those of the run: names, dtypes, shapes.

    Raises:
        StorageError: what differs.
    """
    kinds = {path: digest.partition(":")[2] for path, digest in stored.items()}
    wanted = {path: kind(leaf) for path, leaf in template.items()}
    if kinds == wanted:
        return
    missing, extra = sorted(wanted.keys() - kinds.keys()), sorted(kinds.keys() - wanted.keys())
    both = sorted(kinds.keys() & wanted.keys())
    differ = [f"{path} ({kinds[path]}, now {wanted[path]})" for path in both if kinds[path] != wanted[path]]
    parts = {"lacks": missing, "has in addition": extra, "differs in": differ}
    raise StorageError(
        f"{where} was written with another model or optimizer: it "
        + "; it ".join(f"{what} {some(paths)}" for what, paths in parts.items() if paths)
        + ". Go back to the config of that run, or start over with --fresh"
    )


def some(names: list[str]) -> str:
    """The first few of a list, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


@jax.jit
def _lanes(x: jax.Array) -> jax.Array:  # uint32 [2]
    if jnp.issubdtype(x.dtype, jax.dtypes.prng_key):
        x = jax.random.key_data(x)
    if x.dtype == jnp.bool_:
        x = x.astype(jnp.uint8)
    word = {1: jnp.uint8, 2: jnp.uint16}.get(
        x.dtype.itemsize, jnp.uint32
    )  # 8 bytes become two words on a new last axis
    words = jax.lax.bitcast_convert_type(x, word).astype(jnp.uint32)
    index = sharding.element_indices(words.shape)
    first = (index * np.uint32(0x9E3779B1) ^ (index >> 15)) | np.uint32(1)
    second = (index * np.uint32(0x85EBCA77) + np.uint32(0xC2B2AE3D)) | np.uint32(1)
    return jnp.stack([jnp.sum(words * first, dtype=jnp.uint32), jnp.sum(words * second, dtype=jnp.uint32)])

"""What a checkpoint says about its content."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.checkpoint import digest
from jaxrlhf.checkpoint.digest import check_leaves, digests, leaves_by_name, with_seal
from jaxrlhf.errors import StorageError


@pytest.fixture(params=["host", "device"], autouse=True)
def summed(request, monkeypatch):
    """Where the digests of small leaves are computed: with the same results."""
    if request.param == "device":
        monkeypatch.setattr(digest, "SMALL", 0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int8", "int32", "uint8", "bool", "key"])
def test_host_and_device_give_the_same_digests(dtype, monkeypatch):
    for shape in ((), (1,), (7, 5), (3, 4, 5)):
        numbers = 100 * np.random.default_rng(0).normal(size=shape)
        x = jax.random.key(3) if dtype == "key" else jnp.asarray(numbers).astype(dtype)
        found = set()
        for small in (0, 2**18):
            monkeypatch.setattr(digest, "SMALL", small)
            found.add(digests({"x": x})["x"])
        assert len(found) == 1, shape


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16", "int32", "uint8", "bool"])
def test_changing_any_element_changes_the_digest(dtype):
    start = (np.arange(24).reshape(2, 3, 4) % 2).astype(jnp.dtype(dtype))
    seen = {digests({"x": jnp.asarray(start)})["x"]}
    for position in np.ndindex(start.shape):
        changed = start.copy()
        changed[position] = 1 - changed[position]
        seen.add(digests({"x": jnp.asarray(changed)})["x"])
    assert len(seen) == 1 + start.size


def test_changing_any_bit_of_a_float_changes_the_digest():
    start = np.float32([1.5, -2.25])
    seen = {digests({"x": jnp.asarray(start)})["x"]}
    for bit in range(32):
        changed = start.view(np.uint32).copy()
        changed[1] ^= np.uint32(1) << np.uint32(bit)
        seen.add(digests({"x": jnp.asarray(changed.view(np.float32))})["x"])
    assert len(seen) == 33


def test_order_shape_and_dtype_count():
    x = jnp.arange(6, dtype=jnp.float32).reshape(2, 3)
    variants = [x, x.T, x[::-1], x.reshape(6), x.astype(jnp.bfloat16)]
    assert len({digests({"x": v})["x"] for v in variants}) == len(variants)


def test_typed_keys_have_digests():
    one, two = (digests({"key": jax.random.key(seed)})["key"] for seed in (1, 2))
    assert one != two


def test_names_are_paths_and_empty_leaves_are_left_out():
    tree = {"params": {"w": jnp.ones((2, 3)), "none": jnp.zeros((0, 3))}, "opt": (jnp.zeros(()),)}
    assert list(leaves_by_name(tree)) == ["opt.0", "params.w"]


def test_seal_covers_keys_and_values():
    record = with_seal({"a": 1, "b": {"c": [0.1, 2]}})
    assert with_seal(record) == record
    for change in ({"a": 2}, {"b": {"c": [0.1, 3]}}, {"b": {"d": [0.1, 2]}}, {"extra": None}):
        assert with_seal({**record, **change})["seal"] != record["seal"]
    with pytest.raises(TypeError):
        with_seal({"a": object()})


def test_differing_leaves_are_named():
    stored = digests({"w": jnp.ones((2, 3)), "mu.w": jnp.ones((2, 3)), "b": jnp.ones(4)})
    template = {"w": jnp.ones((2, 5)), "trace.w": jnp.ones((2, 3)), "b": jnp.ones(4, jnp.bfloat16)}
    with pytest.raises(StorageError, match="another model or optimizer") as caught:
        check_leaves("checkpoint 7", stored, template)
    for part in ("lacks trace.w", "in addition mu.w", "w (float32:2x3, now float32:2x5)", "float32:4, now bfloat16:4"):
        assert part in str(caught.value)

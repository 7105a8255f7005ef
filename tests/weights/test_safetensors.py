import contextlib
import json
import os
import random
import struct
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from support.bounded import bounded

from jaxrlhf.errors import DataError
from jaxrlhf.weights import safetensors as ours
from jaxrlhf.weights import writer

GOOD = {
    "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]},
    "b": {"dtype": "BF16", "shape": [4], "data_offsets": [24, 32]},
}


def raw_file(path: Path, header: dict | str, data: int = 32, length: int | None = None) -> Path:
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    path.write_bytes(struct.pack("<Q", len(text) if length is None else length) + text + bytes(range(data)))
    return path


def arrays(seed: int = 0) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return {
        "z.weight": rng.standard_normal((5, 7)).astype(np.float32),
        "a.weight": rng.standard_normal((3, 4)).astype(jnp.bfloat16),
        "h.bias": rng.standard_normal(6).astype(np.float16),
        "empty": np.zeros((0, 4), np.float32),
        "scalar": np.array(2.5, np.float64),
        "ids": np.arange(5),
        "flags": np.array([True, False]),
    }


def sources(tensors: dict[str, np.ndarray]) -> list[writer.Source]:
    return [writer.Source(k, v.dtype, v.shape, lambda v=v: v) for k, v in tensors.items()]


def test_reads_what_the_reference_library_writes(tmp_path):
    tensors = arrays()
    safetensors.numpy.save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    entries = ours.scan_folder(tmp_path)
    assert entries.keys() == tensors.keys()
    for name, array in tensors.items():
        found = ours.read(entries[name])
        assert found.dtype == array.dtype
        np.testing.assert_array_equal(found, array)


def test_writes_the_same_bytes_as_the_reference_library(tmp_path):
    tensors = {k: v for k, v in arrays().items() if v.dtype == np.float32}
    writer.write_file(tmp_path / "ours.safetensors", sources(tensors))
    safetensors.numpy.save_file(tensors, tmp_path / "theirs.safetensors", metadata={"format": "pt"})
    assert (tmp_path / "ours.safetensors").read_bytes() == (tmp_path / "theirs.safetensors").read_bytes()


def test_the_reference_library_reads_what_we_write(tmp_path):
    tensors = arrays(1)
    writer.write_file(tmp_path / "x.safetensors", sources(tensors))
    found = safetensors.numpy.load_file(tmp_path / "x.safetensors")
    assert found.keys() == tensors.keys()
    for name, array in tensors.items():
        assert found[name].dtype == array.dtype
        np.testing.assert_array_equal(found[name], array)


def test_shards_keep_to_the_size_and_the_index_names_every_tensor(tmp_path):
    tensors = {f"t{i}": np.full((10 + i,), i, np.float32) for i in range(9)} | {"big": np.zeros(300, np.float32)}
    writer.write(tmp_path, sources(tensors), max_shard_size=150)
    index = json.loads((tmp_path / ours.INDEX).read_text())
    assert index["metadata"]["total_size"] == sum(v.nbytes for v in tensors.values())
    shards = sorted(p.name for p in tmp_path.glob("*.safetensors"))
    assert shards == [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    assert set(index["weight_map"].values()) == set(shards)
    for shard in shards:
        held = safetensors.numpy.load_file(tmp_path / shard)
        assert {k for k, v in index["weight_map"].items() if v == shard} == held.keys()
        assert sum(v.nbytes for v in held.values()) <= 150 or held.keys() == {"big"}
    entries = ours.scan_folder(tmp_path)
    assert all(np.array_equal(ours.read(entries[k]), v) for k, v in tensors.items())


def test_one_shard_has_no_index(tmp_path):
    writer.write(tmp_path, sources(arrays()), max_shard_size=10**9)
    assert [p.name for p in tmp_path.iterdir()] == ["model.safetensors"]


def test_a_valid_file_is_accepted(tmp_path):
    entries = ours.scan(raw_file(tmp_path / "x.safetensors", GOOD))
    assert {k: (v.dtype, v.shape) for k, v in entries.items()} == {
        "a": (np.float32, (2, 3)),
        "b": (jnp.bfloat16, (4,)),
    }
    assert ours.read(entries["b"]).tobytes() == bytes(range(24, 32))


def changed(**fields) -> dict:
    return GOOD | {"b": GOOD["b"] | fields}


@pytest.mark.parametrize(
    ("header", "says"),
    [
        (changed(data_offsets=[20, 28]), "overlap or hole"),
        (changed(data_offsets=[26, 34]), "overlap or hole"),
        (changed(data_offsets=[24, 30], shape=[3]), "cut short"),
        (changed(data_offsets=[24, 40], shape=[8]), "cut short"),
        (changed(data_offsets=[24, 28]), "takes 8 bytes"),
        (changed(data_offsets=[32, 24]), "takes 8 bytes"),
        (changed(data_offsets=[24]), "whole numbers"),
        (changed(data_offsets=[24, 32.0]), "whole numbers"),
        (changed(shape=[-4]), "whole numbers"),
        (changed(shape=[True, 4]), "whole numbers"),
        (changed(shape=[1] * 9), "whole numbers"),
        (changed(shape=[1 << 63, 0], data_offsets=[24, 24]), "whole numbers"),
        (changed(shape="4"), "whole numbers"),
        (changed(dtype="F8_E4M3"), "quantised"),
        (changed(dtype=["F32"]), "is not one of"),
        (changed(extra=1), "exactly dtype"),
        (GOOD | {"b": [1]}, "exactly dtype"),
        (
            json.dumps(GOOD)[:-1] + ', "a": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}',
            "occurs more than once",
        ),
        ('{"a": {"dtype": "F32", "dtype": "F16", "shape": [16], "data_offsets": [0, 32]}}', "occurs more than once"),
        ("[1, 2]", "JSON object"),
        ("{", "not valid JSON"),
        ("[" * 100_000, "not valid JSON"),
        ('{"a": ' + "9" * 10_000 + "}", "not valid JSON"),
    ],
)
def test_invalid_headers_are_refused(tmp_path, header, says):
    file = raw_file(tmp_path / "x.safetensors", header)
    with pytest.raises(DataError, match=says) as caught:
        ours.scan(file)
    assert str(file) in str(caught.value)


def test_wrong_header_lengths_are_refused_before_allocation(tmp_path):
    for length in (10_000, 1 << 62, (1 << 64) - 1):
        with pytest.raises(DataError, match="cut short"):
            ours.scan(raw_file(tmp_path / "x.safetensors", GOOD, length=length))
    file = tmp_path / "sparse.safetensors"
    with file.open("wb") as stream:
        stream.write(struct.pack("<Q", 30_000_000))
        stream.truncate(40_000_000)
    with pytest.raises(DataError, match="25,000,000"):
        ours.scan(file)
    (tmp_path / "short.safetensors").write_bytes(b"\0\0\0")
    with pytest.raises(DataError, match="cut short"):
        ours.scan(tmp_path / "short.safetensors")


@settings(max_examples=300, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_damage_is_refused_or_harmless(tmp_path_factory, seed):
    """Whatever bytes are flipped or cut, a scan ends in DataError or in entries that can be read in full."""
    rng = random.Random(seed)
    file = tmp_path_factory.getbasetemp() / "damaged.safetensors"
    content = bytearray(raw_file(file, GOOD).read_bytes())
    for _ in range(rng.randint(1, 3)):
        content[rng.randrange(len(content))] = rng.randrange(256)
    if rng.random() < 0.3:
        content = content[: rng.randrange(len(content))]
    file.write_bytes(content)
    with bounded(), contextlib.suppress(DataError):
        entries = ours.scan(file)
        assert sum(ours.read(e).nbytes for e in entries.values()) == 32


def write_index(folder: Path, weight_map: object) -> None:
    (folder / ours.INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors",
        "/etc/x.safetensors",
        "sub/x.safetensors",
        "..\\x.safetensors",
        "x.bin",
        ".safetensors",
        "..",
        "x.safetensors\n",
        "",
    ],
)
def test_shards_outside_the_folder_are_refused(tmp_path, shard):
    inside = tmp_path / "model"
    (inside / "sub").mkdir(parents=True)
    for place in (tmp_path, inside, inside / "sub"):
        raw_file(place / "x.safetensors", GOOD)
    write_index(inside, {"a": shard, "b": "x.safetensors"})
    with pytest.raises(DataError, match="plain"):
        ours.scan_folder(inside)


def test_index_and_shards_must_agree(tmp_path):
    raw_file(tmp_path / "one.safetensors", GOOD)
    raw_file(tmp_path / "two.safetensors", {"c": {"dtype": "F32", "shape": [8], "data_offsets": [0, 32]}})
    write_index(tmp_path, {"a": "one.safetensors", "b": "one.safetensors", "c": "two.safetensors"})
    assert ours.scan_folder(tmp_path).keys() == {"a", "b", "c"}
    write_index(
        tmp_path, {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors", "d": "one.safetensors"}
    )
    with pytest.raises(DataError) as caught:
        ours.scan_folder(tmp_path)
    said = str(caught.value)
    assert "b: not in two.safetensors" in said and "d: not in one.safetensors" in said
    assert "b: in one.safetensors, which is not in the index" in said
    write_index(tmp_path, {"a": "one.safetensors", "b": "three.safetensors"})
    with pytest.raises(DataError, match=r"three\.safetensors; complete"):
        ours.scan_folder(tmp_path)
    for broken in ({}, [], None, {"a": 1}):
        write_index(tmp_path, broken)
        with pytest.raises(DataError):
            ours.scan_folder(tmp_path)


def test_shards_may_be_links_as_in_the_cache_of_the_hub(tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "c0ffee"
    blobs.mkdir()
    snapshot.mkdir(parents=True)
    raw_file(blobs / "0123abcd", GOOD)
    (snapshot / "model.safetensors").symlink_to("../../blobs/0123abcd")
    assert ours.scan_folder(snapshot).keys() == {"a", "b"}


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "consolidated.00.pth", "weights.pkl", "tf_model.h5"])
def test_other_formats_are_refused_unopened(tmp_path, name, audit):
    (tmp_path / name).write_bytes(b"cos\nsystem\n(S'touch " + os.fsencode(tmp_path / "owned") + b"'\ntR.")
    (tmp_path / "config.json").write_text("{}")
    with audit("open") as opened, pytest.raises(DataError, match="Convert") as caught:
        ours.scan_folder(tmp_path)
    assert name in str(caught.value) and "save_pretrained" in str(caught.value)
    assert not [args for args in opened if str(args[0]).endswith(name)]
    assert not (tmp_path / "owned").exists()


def test_an_adapter_and_an_empty_folder_are_refused(tmp_path):
    with pytest.raises(DataError, match="nothing"):
        ours.scan_folder(tmp_path)
    raw_file(tmp_path / "adapter_model.safetensors", GOOD)
    with pytest.raises(DataError, match="LoRA"):
        ours.scan_folder(tmp_path)


def test_a_file_that_shrinks_after_the_scan_is_noticed(tmp_path):
    file = raw_file(tmp_path / "x.safetensors", GOOD)
    entry = ours.scan(file)["b"]
    os.truncate(file, file.stat().st_size - 3)
    with pytest.raises(DataError, match="changed while"):
        ours.read(entry)


def test_same_compares_bits_across_chunks(tmp_path, monkeypatch):
    monkeypatch.setattr(ours, "CHUNK", 16)
    x = np.arange(11, dtype=np.float32)
    y, z = x.copy(), x.reshape(1, 11)
    y[10] = np.nextafter(y[10], np.float32(0))
    writer.write_file(tmp_path / "x.safetensors", sources({"x": x, "x2": x.copy(), "y": y, "z": z}))
    e = ours.scan(tmp_path / "x.safetensors")
    assert ours.same(e["x"], e["x2"])
    assert not ours.same(e["x"], e["y"])
    assert not ours.same(e["x"], e["z"])

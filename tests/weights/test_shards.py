"""What a process reads of a model's files when its devices hold only a part of the model."""

import math
import pathlib

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf import config, models, sharding, weights
from jaxrlhf.types import leaf_at
from jaxrlhf.weights import mapping, safetensors, writer
from jaxrlhf.weights.names import tensors

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "models"


@pytest.fixture
def bytes_read(monkeypatch):
    """The sizes of all reads of a test."""
    sizes: list[int] = []
    read = safetensors._read_from

    def counted(stream, entry, begin, raw):
        sizes.append(raw.nbytes)
        read(stream, entry, begin, raw)

    monkeypatch.setattr(safetensors, "_read_from", counted)
    return sizes


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """{shape: (the array, its entry)} of tensors of up to three axes."""
    folder, found = tmp_path_factory.mktemp("files"), {}
    for number, shape in enumerate([(), (7,), (4, 6), (1, 5), (3, 1), (2, 3, 4)]):
        array = np.random.default_rng(number).normal(size=shape).astype(np.float32)
        file = folder / f"{number}.safetensors"
        before = writer.Source("before", np.dtype(np.int8), (number,), lambda n=number: np.zeros(n, np.int8))
        writer.write_file(file, [before, writer.Source("x", array.dtype, shape, lambda a=array: a)])
        found[shape] = array, safetensors.scan(file)["x"]
    return found


@settings(max_examples=100, deadline=None)
@given(data=st.data())
def test_a_part_is_a_slice_of_the_tensor(files, data):
    array, entry = files[data.draw(st.sampled_from([*files]))]
    bounds = [sorted(data.draw(st.tuples(*[st.integers(0, size)] * 2))) for size in array.shape]
    index = tuple(slice(*pair) for pair in bounds)
    part = safetensors.read_part(entry, index)
    np.testing.assert_array_equal(part, array[index])
    assert part.dtype == array.dtype and part.shape == array[index].shape


@pytest.mark.parametrize("index", [(slice(1, 3), slice(None)), (slice(None), slice(2, 4)), (slice(0, 1), slice(5, 6))])
def test_no_other_bytes_are_read(files, bytes_read, index):
    array, entry = files[4, 6]
    safetensors.read_part(entry, index)
    assert sum(bytes_read) == array[index].nbytes
    assert len(bytes_read) == (1 if array[index].shape[1] == 6 else len(array[index]))  # whole rows at once


@pytest.mark.parametrize("name", ["gpt2", "gpt_neox", "llama", "llama-score", "phi3", "qwen2", "qwen3_moe"])
@pytest.mark.parametrize("shape", [config.Mesh(data=1, fsdp=4, tensor=2), config.Mesh(data=4, fsdp=2)])
def test_shards_are_those_of_the_whole_tensor(name, shape, bytes_read):
    folder, mesh = FIXTURES / name, sharding.make_mesh(shape)
    model = weights.load_config(folder)
    shapes = jax.eval_shape(lambda key: models.init(model, key), jax.random.key(0))
    shardings = sharding.shardings(shapes, mesh)
    entries = mapping.match(model, shapes, safetensors.scan_folder(folder), new_head=False, where=str(folder))
    for tensor in tensors(model):
        entry, to = entries[tensor.name], leaf_at(shardings, tensor.path)
        whole = mapping._to_device(safetensors.read(entry), tensor, to)
        bytes_read.clear()
        shards = mapping._read_shards(entry, tensor, to)
        assert shards.sharding == whole.sharding
        np.testing.assert_array_equal(jax.device_get(shards), jax.device_get(whole))
        # all devices are here: each shard is read once, however many of them hold it
        assert sum(bytes_read) == math.prod(shards.shape) * entry.dtype.itemsize

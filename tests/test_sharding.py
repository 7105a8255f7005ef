"""The mesh and the rule table."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from jaxrlhf import config, sharding
from jaxrlhf.errors import ConfigError


def mesh(**shape: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(config.Mesh(**shape))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_the_data_axis_takes_the_remaining_devices():
    assert dict(mesh(data=0, fsdp=2).shape) == {"data": 4, "fsdp": 2, "tensor": 1}
    assert mesh().size == 1


@pytest.mark.parametrize("shape", [{"data": 9}, {"data": 0, "fsdp": 3}, {"fsdp": 4, "tensor": 4}])
def test_mesh_that_does_not_fit_is_refused_with_its_numbers(shape: dict[str, int]):
    with pytest.raises(ConfigError, match=r"does not fit 8 cpu device"):
        mesh(**shape)


def test_rules_split_layers_and_leave_norms_whole():
    both = mesh(fsdp=2, tensor=4)
    assert sharding.spec("policy/layers/attention/q/kernel", (2, 32, 64), both) == P(None, "fsdp", "tensor")
    assert sharding.spec("layers/mlp/down/kernel", (2, 64, 32), both) == P(None, "tensor", "fsdp")
    assert sharding.spec("norm/scale", (32,), both) == P()


def test_axis_that_does_not_divide_is_left_whole():
    assert sharding.spec("embed/embedding", (50257, 32), mesh(fsdp=2, tensor=4)) == P(None, "fsdp")
    assert sharding.spec("layers/mlp/down/kernel", (2, 63, 32), mesh(data=4, tensor=2)) == P()


def test_moments_are_sharded_like_their_parameters():
    import optax

    params = {"layers": {"mlp": {"up": {"kernel": jnp.zeros((2, 8, 16))}}}, "norm": {"scale": jnp.zeros(8)}}
    state = {"policy": optax.adam(1e-3).init(params)}
    placed = sharding.shardings(state, mesh(fsdp=2, tensor=2))
    assert placed["policy"][0].mu["layers"]["mlp"]["up"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert placed["policy"][0].count.spec == P()


def test_rows_that_do_not_divide_are_refused():
    with pytest.raises(ConfigError, match=r"train.batch_size \(6\) must be a multiple"):
        sharding.check_rows(6, mesh(data=2, fsdp=2), "train.batch_size")


def test_arrays_and_their_shapes_move_to_the_host_and_back():
    params = {"kernel": jnp.arange(16.0).reshape(4, 4), "bias": jnp.ones(4)}
    params = sharding.put_rows(params, mesh(data=2))
    expected = jax.device_get(params)
    shapes = abstract(params)

    offloaded = sharding.to_host(params)
    assert all(x.is_deleted() for x in jax.tree.leaves(params))
    assert {x.sharding.memory_kind for x in jax.tree.leaves(offloaded)} == {sharding.HOST}
    assert sharding.to_host(shapes) == abstract(offloaded)
    assert sharding.to_host(offloaded)["kernel"] is offloaded["kernel"]

    restored = sharding.to_device(offloaded)
    assert sharding.to_device(sharding.to_host(shapes)) == abstract(restored) == shapes
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(restored), expected)
    assert not any(x.is_deleted() for x in jax.tree.leaves(offloaded))

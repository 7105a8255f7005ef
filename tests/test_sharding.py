"""The mesh and the rule table."""

import dataclasses
import pathlib
import types
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import PartitionSpec as P
from support.tiny import tiny

from jaxrlhf import config, lora, models, sharding, weights
from jaxrlhf.errors import ConfigError
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.ppo.replay import empty_replay
from jaxrlhf.weights.families import FAMILIES


def mesh(**shape: int) -> jax.sharding.Mesh:
    return sharding.make_mesh(config.Mesh(**shape))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), tree)


def test_one_axis_takes_the_devices_that_the_others_leave():
    assert dict(mesh(data=-1, fsdp=2).shape) == {"replica": 1, "data": 4, "fsdp": 2, "tensor": 1}
    assert dict(mesh(replica=2, fsdp=-1, tensor=2).shape) == {"replica": 2, "data": 1, "fsdp": 2, "tensor": 2}
    assert mesh(replica=-1).shape["replica"] == mesh(tensor=-1).shape["tensor"] == 8
    assert mesh(data=0, fsdp=2).shape == mesh(data=-1, fsdp=2).shape, "0 is the older spelling"
    assert mesh().size == 1


@pytest.mark.parametrize(
    ("shape", "numbers"),
    [
        ({"data": 9}, r"data 9 .* does not fit 8 devices, it needs 9; .*--xla_force_host_platform_device_count"),
        ({"fsdp": 4, "tensor": 4}, "it needs 16"),
        ({"data": -1, "fsdp": 3}, "axes beside data need 3, which does not divide them; .* among 1, 2, 4, 8"),
        ({"data": 0, "fsdp": 16}, "axes beside data need 16"),
        ({"data": -1, "fsdp": -1}, r"mesh.data \(-1\) and mesh.fsdp \(-1\) would each take"),
        ({"tensor": 0}, "mesh.tensor is 0: an axis has at least one device"),
        ({"replica": -2}, "replica"),
    ],
)
def test_mesh_that_does_not_fit_is_refused_with_its_numbers(shape: dict[str, int], numbers: str):
    with pytest.raises(ConfigError, match=numbers):
        mesh(**shape)


@dataclasses.dataclass(frozen=True)
class Tpu:
    """What the arrangement of TPUs reads of a device: 2 x 4 chips a slice."""

    id: int
    device_kind: str = "TPU v5 lite"
    platform: str = "tpu"
    core_on_chip: int = 0

    @property
    def slice_index(self) -> int:
        return self.id // 8

    @property
    def coords(self) -> tuple[int, int, int]:
        return self.id % 2, self.id % 8 // 2, 0


@pytest.mark.parametrize(
    "error", [AssertionError(), RuntimeError("Unknown backend cuda")], ids=["no plugin", "unknown"]
)
def test_a_platform_that_jax_does_not_have_is_refused_with_the_remedy(error, monkeypatch):
    def devices():
        raise error

    monkeypatch.setattr(jax, "devices", devices)
    monkeypatch.setenv("JAX_PLATFORMS", "cuda")
    with pytest.raises(ConfigError, match=r"no device \(JAX_PLATFORMS is cuda: .*pip install"):
        sharding.make_mesh(config.Mesh())


def test_outer_axes_go_across_the_slices_of_a_tpu_and_inner_ones_stay_within():
    devices = [Tpu(i) for i in range(32)]

    def slices(grid: np.ndarray, axis: str) -> set[int]:
        """In how many slices a group of devices along this axis lies."""
        lines = np.moveaxis(grid, sharding.AXES.index(axis), -1).reshape(-1, grid.shape[sharding.AXES.index(axis)])
        return {len({device.slice_index for device in line}) for line in lines}

    grid = sharding.arrange(devices, (4, 1, 2, 4))
    assert sorted(device.id for device in grid.flat) == list(range(32))
    assert slices(grid, "replica") == {4} and slices(grid, "fsdp") == slices(grid, "tensor") == {1}
    grid = sharding.arrange(devices, (2, 2, 2, 4))
    assert slices(grid, "replica") == slices(grid, "data") == {2} and slices(grid, "tensor") == {1}
    assert slices(sharding.arrange(devices, (1, 1, 8, 4)), "fsdp") == {4}
    grid = sharding.arrange(devices[:8], (1, 1, 2, 4))
    assert sorted(device.id for device in grid.flat) == list(range(8))
    assert [device.id for device in grid.flat] != list(range(8)), "along the torus, by jax's own arrangement"
    with pytest.raises(ConfigError, match=r"mesh.tensor \(32\) would cross the 4 TPU slices"):
        sharding.arrange(devices, (1, 1, 1, 32))
    part = sharding.arrange(devices[:6], (1, 1, 3, 2), whole=False)
    assert [device.id for device in part.flat] == list(range(6))


def test_rules_split_layers_and_leave_norms_whole():
    both = mesh(fsdp=2, tensor=4)
    assert sharding.spec("policy/layers/attention/q/kernel", (2, 32, 64), both) == P(None, "fsdp", "tensor")
    assert sharding.spec("layers/mlp/down/kernel", (2, 64, 32), both) == P(None, "tensor", "fsdp")
    assert sharding.spec("norm/scale", (32,), both) == P()


def test_axis_that_does_not_divide_is_left_whole():
    assert sharding.spec("layers/mlp/up/kernel", (2, 32, 63), mesh(fsdp=2, tensor=4)) == P(None, "fsdp")
    assert sharding.spec("layers/mlp/down/kernel", (2, 63, 32), mesh(data=4, tensor=2)) == P()


def test_an_indivisible_vocabulary_is_split_along_the_hidden_size():
    both = mesh(fsdp=2, tensor=4)
    assert sharding.spec("embed/embedding", (50264, 32), both) == P("tensor", "fsdp")
    assert sharding.spec("embed/embedding", (50257, 32), both) == P(None, ("tensor", "fsdp"))
    assert sharding.spec("embed/embedding", (50257, 12), both) == P(None, "tensor")
    assert sharding.spec("lm_head/kernel", (32, 50257), both) == P(("tensor", "fsdp"))
    assert sharding.spec("embed/embedding", (50257, 32), mesh(fsdp=2)) == P(None, "fsdp")


FOLDERS = pathlib.Path(__file__).parent / "fixtures" / "models"


def arrays_of_a_run():
    """Trees of all that a run keeps on its mesh: each family, head, precision, adapters, moments, kept rollouts."""
    families = {folder.name: weights.load_config(folder) for folder in sorted(FOLDERS.iterdir())}
    assert {model.family for model in families.values()} == set(FAMILIES)
    for model in families.values():
        yield jax.eval_shape(lambda model=model: models.init(model, jax.random.key(0)))
    adapted = tiny(tie_embeddings=False, mlp_bias=True, adapters=models.Adapters(4, 8.0, tokens=(3, 4)))
    kinds: tuple[tuple[Any, models.Bits, bool], ...] = (
        ("lm", "int8", False),
        ("linear", "nf4", False),
        ("mlp", "nf4", True),
    )
    for head, bits, double in kinds:
        model = dataclasses.replace(adapted, head=head)

        def packed(model=model, bits: models.Bits = bits, double=double):
            params = models.init(model, jax.random.key(0))
            base = lora.pack(params, bits, double)
            modules = lora.modules_of(params["layers"])
            return {**base, **lora.init(model, base, modules, jax.random.key(1), magnitudes=True)}

        params = jax.eval_shape(packed)
        yield params
        for dtype in ("float32", "bfloat16"):
            chain = make_optimizer(config.Optim(state_dtype=dtype, weight_decay=0.1), 1e-3, 10).chain
            trained = {name: part for name, part in params.items() if name in ("lora", "score")}
            yield {"opt_state": jax.eval_shape(chain.init, trained), "reference": trained}
    mixture = dataclasses.replace(families["qwen3_moe"], adapters=models.Adapters(4, 8.0))

    def with_experts():
        params = models.init(mixture, jax.random.key(0))
        return lora.init(mixture, params, lora.modules_of(params["layers"]), jax.random.key(1), magnitudes=False)

    yield jax.eval_shape(with_experts)
    run = config.PPOConfig(
        ppo=config.PPO(replay=2, batch_size=8, num_mini_batches=1),
        sampling=config.Sampling(renormalise_logprobs=True, top_k=5),
    )
    spec: Any = types.SimpleNamespace(policy=adapted, critic=adapted, trunk="frozen")
    yield {"replay": jax.eval_shape(lambda: empty_replay(run, spec, (6, 7)))}


def test_every_matrix_of_a_run_has_a_rule_and_every_rule_a_matrix_or_bias():
    """Without a rule are vectors, of each layer or each of two labels."""
    used = set()
    for tree in arrays_of_a_run():
        for keys, leaf in jax.tree_util.tree_leaves_with_path(tree):
            path = sharding.path_of(keys)
            pattern, specs = sharding.rule_of(path)
            assert all(len(spec) <= len(leaf.shape) for spec in specs), path
            used |= {pattern}
            sizes = leaf.shape[1:] if "layers/" in path else leaf.shape
            assert pattern or sum(size > 2 for size in sizes) < 2, f"{path} {leaf.shape} would be on every device"
    assert used - {""} == {pattern for pattern, _ in sharding.RULES}, "rules that match nothing"


def test_moments_are_sharded_like_their_parameters():
    import optax

    params = {"layers": {"mlp": {"up": {"kernel": jnp.zeros((2, 8, 16))}}}, "norm": {"scale": jnp.zeros(8)}}
    state = {"policy": optax.adam(1e-3).init(params)}
    placed = sharding.shardings(state, mesh(fsdp=2, tensor=2))
    assert placed["policy"][0].mu["layers"]["mlp"]["up"]["kernel"].spec == P(None, "fsdp", "tensor")
    assert placed["policy"][0].count.spec == P()


def test_queries_and_the_result_of_attention_are_split_alike():
    """Over rows and heads. If the result is not, XLA may gather attention weights in the backward pass: 11 TB in an
    update of a 70B model with LoRA on 16 TPUs."""
    model = dataclasses.replace(tiny(), mesh=mesh(data=-1, fsdp=2, tensor=2))
    params = jax.eval_shape(lambda: models.init(model, jax.random.key(0)))
    tokens = jnp.ones((4, 5), jnp.int32)

    def constraints(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "sharding_constraint":
                yield equation.outvars[0].aval.shape, equation.params["sharding"].spec
            for inner in jaxprs_in_params(equation.params):
                yield from constraints(inner)

    program = jax.make_jaxpr(lambda params: models.forward(params, model, tokens, tokens > 0))(params)
    heads = [spec for shape, spec in constraints(program.jaxpr) if shape == (4, 5, model.num_heads, model.head_dim)]
    rows = ("replica", "data", "fsdp")
    assert heads == [P(rows, None, "tensor", None)] * 2


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

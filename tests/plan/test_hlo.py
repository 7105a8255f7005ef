"""What is read from compiled programs, against programs whose collectives and products are known by hand."""

import gzip
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support import layers

from jaxrlhf.plan import hlo, roofline
from jaxrlhf.plan.hlo import Collective
from jaxrlhf.plan.hlo.collectives import group_of
from jaxrlhf.plan.roofline import Sent


@pytest.fixture(scope="module")
def mesh() -> Mesh:
    return Mesh(np.array(jax.devices()[:8]).reshape(4, 2), ("a", "b"), axis_types=(AxisType.Auto,) * 2)


def read(function, mesh: Mesh, trips: float, *args: tuple[tuple[int, ...], P]) -> hlo.Figures:
    """Figures of a function of float32 arrays of these shapes and shardings."""
    shapes = [jax.ShapeDtypeStruct(s, jnp.float32, sharding=NamedSharding(mesh, spec)) for s, spec in args]
    return hlo.read(jax.jit(function).lower(*shapes).compile().as_text(), mesh.size, trips)


def of_kind(figures: hlo.Figures, kind: str) -> list[tuple[float, tuple[int, ...], float]]:
    return [(c.bytes, c.group, c.times) for c in figures.collectives if c.kind == kind]


def test_collectives_of_each_kind_have_their_bytes_and_groups(mesh):
    """Written out with shard_map: each device has 2 x 16 of 8 x 16 over `a`."""

    def four(x):
        total = jax.lax.psum(x, "a")  # 2 x 16
        whole = jax.lax.all_gather(x, "a", tiled=True)  # 8 x 16
        part = jax.lax.psum_scatter(whole * total[:1], "b", tiled=True)  # 8 x 16 -> 4 x 16
        moved = jax.lax.ppermute(x, "a", [(0, 1), (1, 2), (2, 3), (3, 0)])
        return total.sum() + part.sum() + (moved * total).sum()

    program = jax.shard_map(four, mesh=mesh, in_specs=P("a"), out_specs=P(), check_vma=False)
    figures = read(program, mesh, 1, ((8, 16), P("a")))
    assert of_kind(figures, "all-reduce") == [(4 * 2 * 16, (0, 2, 4, 6), 1)]
    assert of_kind(figures, "all-gather") == [(4 * 8 * 16, (0, 2, 4, 6), 1)]
    assert of_kind(figures, "reduce-scatter") == [(4 * 8 * 16, (0, 1), 1)]
    assert of_kind(figures, "collective-permute") == [(4 * 2 * 16, (0, 2), 1)]


def test_what_scans_repeat_counts_as_often(mesh):
    def step(carry, w):
        return jax.lax.psum(carry @ w, "b"), None

    def inner(x, ws):
        return jax.lax.scan(step, x, ws)[0]

    def outer(x, ws):
        return jax.lax.scan(lambda c, _: (inner(c, ws), None), x, None, length=3)[0]

    program = jax.shard_map(outer, mesh=mesh, in_specs=(P("a"), P()), out_specs=P("a"), check_vma=False)
    figures = read(program, mesh, 1, ((8, 16), P("a")), ((5, 16, 16), P()))
    assert of_kind(figures, "all-reduce") == [(4 * 2 * 16, (0, 1), 15)]
    assert sum(p.times for p in figures.products) == 15
    assert sum(p.times * p.flops for p in figures.products) == 15 * 2 * 2 * 16 * 16
    assert {p.dtype for p in figures.products} == {"float32"}


def test_a_loop_that_ends_by_its_data_runs_the_given_number_of_times(mesh):
    def loop(x):
        def more(state):
            return (state[0] < 9) & (state[1].sum() < 100)

        return jax.lax.while_loop(more, lambda s: (s[0] + 1, jax.lax.psum(s[1], "a")), (0, x))[1]

    program = jax.shard_map(loop, mesh=mesh, in_specs=P("a"), out_specs=P("a"), check_vma=False)
    figures = read(program, mesh, 7, ((8, 16), P("a")))
    assert of_kind(figures, "all-reduce") == [(4 * 2 * 16, (0, 2, 4, 6), 7)]


def test_of_the_branches_of_a_conditional_the_most_expensive_counts(mesh):
    def choose(x):
        return jax.lax.cond(x[0, 0] > 0, lambda: x @ x @ x, lambda: x @ x)

    figures = read(choose, mesh, 1, ((16, 16), P()))
    assert sum(p.times * p.flops for p in figures.products) == 2 * 2 * 16**3


def test_products_are_those_of_one_device(mesh):
    figures = read(lambda x, w: x @ w, mesh, 1, ((64, 32), P("a", None)), ((32, 16), P(None, "b")))
    (product,) = figures.products
    assert product.flops == 2 * 64 * 32 * 16 / 8
    assert product.bytes == 4 * (16 * 32 + 32 * 8 + 16 * 8)
    assert not figures.collectives


FIXTURES = Path(__file__).parents[1] / "fixtures" / "hlo"
"""Programs in the forms of the compilers for accelerators, which that for CPUs does not use."""


def test_the_forms_of_the_gpu_compiler():
    figures = hlo.read((FIXTURES / "gpu.txt").read_text(), 8, 1)
    whole, everyone = 4 * 64 * 64, tuple(range(8))
    assert figures.collectives == [
        Collective("all-gather", whole, everyone, 6),
        Collective("reduce-scatter", whole, everyone, 6),
    ]
    (product,) = figures.products
    assert (product.flops, product.bytes, product.dtype, product.times) == (2 * 64**3, 3 * whole, "float32", 6)


def test_the_forms_of_the_tpu_compiler():
    figures = hlo.read((FIXTURES / "tpu.txt").read_text(), 8, 99)
    assert figures.collectives == [Collective("reduce-scatter", 2 * 64 * 32, (0, 2, 4, 6), 10)]
    assert figures.cycles == 10 * 1000, "not those inside a fusion"
    (product,) = figures.products
    assert (product.flops, product.dtype, product.times) == (2 * 64 * 48 * 32, "bfloat16", 10)


def test_what_runs_beside_the_fusions_of_a_tpu_counts_once_and_not_what_is_on_its_chip():
    """One gather of a weight while four steps of another product, whose weight goes round in a ring, are computed."""
    figures = hlo.read((FIXTURES / "tpu_async.txt").read_text(), 8, 99)
    assert sorted(figures.collectives) == [
        Collective("all-gather", 2 * 64 * 64, tuple(range(8)), 1),
        Collective("collective-permute", 2 * 6 * 32, (0, 1), 4),
    ]
    (product,) = figures.products
    assert (product.flops, product.times, figures.cycles) == (2 * 16 * 48 * 32, 4, 4 * 500)
    assert product.bytes == 2 * 16 * 48 + 2 * 16 * 32, "without those of the weight, which is on the chip"


def test_an_update_on_a_tpu_sends_what_a_hand_count_says():
    """As libtpu 0.0.42.1 compiled it for v5e:2x4, without metadata. It gathers and scatters whole, which takes 7/8 of
    an array from a device, or in rings of 9 steps, of which each sends 1/8."""
    text = gzip.decompress((FIXTURES / "tpu_layers.txt.gz").read_bytes()).decode()
    figures, whole = hlo.read(text, layers.DEVICES, 99), layers.bytes_exchanged()
    assert 7 / 8 * whole <= roofline.traffic(figures, (0,) * layers.DEVICES).near <= 9 / 8 * whole
    positions = layers.ROWS * layers.TOKENS / layers.DEVICES
    weights = layers.LAYERS * sum(math.prod(shape) for shape in layers.WEIGHTS.values())
    down = layers.LAYERS * math.prod(layers.WEIGHTS["down"])
    assert sum(p.flops * p.times for p in figures.products) == 2 * positions * (4 * weights - down)


def test_a_batched_product_as_a_convolution_over_dilated_zeros_has_the_flops_of_the_product():
    """[32, 7, 5] x [32, 5, 3] as XLA's TPU compiler writes it: batch entry i meets only entry i."""
    (product,) = hlo.read((FIXTURES / "batched.txt").read_text(), 1, 1).products
    assert product.flops == 2 * 32 * 7 * 5 * 3


@pytest.mark.parametrize(
    "text, expected",
    [
        ("replica_groups={{1,3},{0,2}}", (1, 3)),
        ("replica_groups=[2,4]<=[8]", (0, 1, 2, 3)),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", (0, 4)),
        ("replica_groups={}", tuple(range(8))),
        ("replica_groups=mesh['x'=4,'y'=2] {'x'}", (0, 2, 4, 6)),
        ("replica_groups=mesh['x'=4,'y'=2] {'x','y'}", tuple(range(8))),
        ("replica_groups=mesh['x'=8] {'x':(1)2}", (0, 4)),
        ("replica_groups=mesh['x'=8] {'x':(2)4}", (0, 1, 2, 3)),
        ("source_target_pairs={{3,1},{1,3}}", (3, 1)),
    ],
)
def test_groups_in_all_spellings(text, expected):
    assert group_of(f", channel_id=1, {text}, dimensions={{0}}", 8) == expected


HOSTS = (0, 0, 0, 0, 1, 1, 1, 1)


@pytest.mark.parametrize(
    "kind, group, near, far",
    [
        ("all-gather", (0, 1, 2, 3), 75, 0),
        ("reduce-scatter", (4, 5), 50, 0),
        ("all-reduce", (0, 1, 2, 3), 150, 0),
        ("all-gather", (0, 4), 0, 50),
        # half of the array comes from the other host, over four networks at once; the rest from the same host
        ("all-gather", tuple(range(8)), 75, 12.5),
        ("all-reduce", tuple(range(8)), 150, 25),
        ("all-reduce", (3,), 0, 0),
        ("collective-permute", (0, 1), 100, 0),
        ("collective-permute", (3, 4), 0, 100),
    ],
)
def test_bytes_that_a_device_sends(kind, group, near, far):
    assert roofline.sent(Collective(kind, 100, group, 1), HOSTS) == Sent(near, far)

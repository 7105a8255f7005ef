"""The inference copy on a mesh: where its weights lie, what a decode step sends, and that responses do not change."""

import dataclasses
import math
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny

from jaxrlhf import models, runtime, sharding
from jaxrlhf.config import Mesh, Sampling
from jaxrlhf.rollout import engine, inference_copy
from jaxrlhf.rollout.cache import cache_shards
from jaxrlhf.rollout.decode import Decoding, generate
from jaxrlhf.rollout.inference_copy import Layout, RolloutDType, convert, inference_model, split_axes
from jaxrlhf.rollout.queue import PromptQueue
from jaxrlhf.types import Prompts

MODEL = tiny(
    vocab_size=1024, hidden_size=64, num_heads=8, num_kv_heads=4, head_dim=8, mlp_size=192, tie_embeddings=False
)
SAMPLING, STOPS, PAD = Sampling(response_length=12), tuple(range(64)), 0
MESHES = [Mesh(data=8), Mesh(fsdp=8), Mesh(fsdp=2, tensor=4)]
EACH_MESH = pytest.mark.parametrize("shape", MESHES, ids=["data8", "fsdp8", "fsdp2-tensor4"])
ROWS, COLUMNS = 16, 8


def prompts(rows=ROWS):
    rng = np.random.default_rng(0)
    mask = np.arange(COLUMNS) >= COLUMNS - rng.integers(1, COLUMNS + 1, rows)[:, None]
    tokens = np.where(mask, rng.integers(64, MODEL.vocab_size, mask.shape), PAD).astype(np.int32)
    return Prompts(tokens, mask, np.arange(rows, dtype=np.int32), np.zeros(rows, np.int32))


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: jnp.where(x == 1, x, 8 * x), models.init(MODEL, jax.random.key(0)))


@pytest.fixture(scope="module")
def expected(params):
    inference, copy = inference_copy.inference_copy(MODEL, params, "float32")
    return generate(copy, inference, prompts(), jax.random.key(1), SAMPLING, STOPS, PAD)


def laid_out(params, shape, layout: Layout = "replicated", dtype: RolloutDType = "float32", model=MODEL):
    """(mesh, model that decodes, copy)."""
    mesh = sharding.make_mesh(shape)
    placed = jax.device_put(params, sharding.shardings(params, mesh))
    inference = inference_model(model, dtype)
    return mesh, inference, convert(placed, model, inference, mesh, split_axes(inference, mesh, layout))


def sent(program):
    """Bytes of the results of the collectives in the loops of a compiled program on one device, and the shapes that
    all-gathers result in."""
    found, body = {}, []
    for line in program.splitlines():
        if start := re.match(r"(?:ENTRY )?%?([\w.\-]+) \(.*\{$", line):
            body = found.setdefault(start[1], [])
        body.append(line)
    inside, waiting = set(), re.findall(r"(?:body|condition)=%?([\w.\-]+)", program)
    while waiting:
        name = waiting.pop()
        if name not in inside:
            inside.add(name)
            waiting += re.findall(r"(?:calls|to_apply|_computation)=%?([\w.\-]+)", "\n".join(found[name]))
    total, gathered = 0, set()
    operation = re.compile(r" = (.*?) (all-\w+(?:-\w+)?|reduce-scatter|collective-permute)(?:-start)?\(")
    for match in filter(None, (operation.search(line) for name in inside for line in found[name])):
        shapes = [tuple(map(int, re.findall(r"\d+", shape))) for shape in re.findall(r"\w+\[([\d,]*)\]", match[1])]
        total += sum(4 * math.prod(shape) for shape in shapes)
        gathered |= set(shapes) if match[2] == "all-gather" else set()
    return total, gathered


def compiled(shape, layout, params):
    mesh, inference, copy = laid_out(params, shape, layout)
    placed = sharding.put_rows(prompts(), mesh)
    traced = generate.trace(copy, inference, placed, jax.random.key(1), SAMPLING, STOPS, PAD)
    return mesh, traced.lower().compile().as_text()


@EACH_MESH
def test_a_decode_step_sends_what_tensor_parallelism_needs(shape, params):
    mesh, program = compiled(shape, "replicated", params)
    total, gathered = sent(program)
    rows, columns = ROWS // sharding.row_shards(mesh), COLUMNS + SAMPLING.response_length
    heads = MODEL.num_kv_heads // shape.tensor
    assert f"f32[{rows},{heads},{columns},{MODEL.head_dim}]" in program, "the cache of a device: its rows and heads"
    state = rows * MODEL.hidden_size * 4  # bytes of the hidden states of a device's rows
    # embedding, attention and MLP of each layer; sampling sends a block of 256 tokens a row, twice, and small change
    needed = (1 + 2 * MODEL.num_layers) * state + 2 * rows * 256 * 4 if shape.tensor > 1 else 0
    assert needed <= total <= needed + 2048
    assert max(map(math.prod, gathered)) <= rows * 256, "no weights and no logits"


def test_the_layout_of_training_sends_more_and_gathers_no_weights(params):
    weights = {x.shape[-2:] for x in jax.tree.leaves(params) if x.ndim > 1}
    for shape in MESHES[1:]:
        more, gathered = sent(compiled(shape, "sharded", params)[1])
        less, _ = sent(compiled(shape, "replicated", params)[1])
        assert more > 2 * less
        assert not gathered & weights


@pytest.mark.parametrize(
    ("shape", "layout"), [*((shape, "replicated") for shape in MESHES), *((shape, "sharded") for shape in MESHES[1:])]
)
def test_responses_are_the_same_on_every_mesh(shape, layout, params, expected):
    mesh, inference, copy = laid_out(params, shape, layout)
    placed = sharding.put_rows(prompts(), mesh)
    rollout = generate(copy, inference, placed, jax.random.key(1), SAMPLING, STOPS, PAD)
    np.testing.assert_array_equal(rollout.tokens, expected.tokens)
    np.testing.assert_allclose(rollout.logprobs, expected.logprobs, atol=1e-5)
    assert len(set(np.asarray(expected.response_mask).sum(axis=1))) > 3


@pytest.mark.parametrize(("shape", "slots"), [*zip(MESHES, (8, 32, 16), strict=True)])
def test_slots_give_the_same_responses_on_every_mesh(shape, slots, params, key, monkeypatch):
    many = prompts(48)
    inference, copy = inference_copy.inference_copy(MODEL, params, "float32")
    whole = generate(copy, inference, many, key, SAMPLING, STOPS, PAD)
    mesh, inference, copy = laid_out(params, shape)
    kept, select = [], engine._select
    monkeypatch.setattr(engine, "_select", lambda *a: kept.append(len(a[1])) or select(*a))
    queue = PromptQueue(many, slots)
    rollout = engine.generate_in_slots(copy, Decoding(inference, SAMPLING, STOPS, PAD), queue, key, mesh)
    np.testing.assert_array_equal(rollout.tokens, whole.tokens)
    np.testing.assert_allclose(rollout.logprobs, whole.logprobs, atol=1e-5)
    shards = sharding.row_shards(mesh)
    assert all(count % shards == 0 for count in kept)
    assert kept or slots // engine.SHRINK < shards, "the last rows are decoded in fewer slots where the mesh can"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
@pytest.mark.parametrize("tied", [True, False])
def test_each_device_holds_its_share_of_the_copy(params, dtype, tied):
    model = dataclasses.replace(MODEL, tie_embeddings=tied)
    if tied:
        params = {k: v for k, v in params.items() if k != "lm_head"}
    for layout, shares in (("replicated", 4), ("sharded", 8)):
        _, _, copy = laid_out(params, Mesh(fsdp=2, tensor=4), layout, dtype, model)
        matrices = [(k, x) for k, x in jax.tree_util.tree_leaves_with_path(copy) if x.ndim > 1]
        assert len(matrices) == 2 * 7 + 1 + ("lm_head" in copy)
        for keys, x in matrices:
            assert x.addressable_shards[0].data.size * shares == x.size, (layout, sharding.path_of(keys))


def test_weights_on_the_left_decode_the_same_on_a_mesh(params, expected, monkeypatch):
    monkeypatch.setattr(runtime, "weights_left", lambda *_: True)
    mesh, inference, copy = laid_out(params, Mesh(fsdp=2, tensor=4))
    assert inference.kernels == "left"
    placed = sharding.put_rows(prompts(), mesh)
    together = generate(copy, inference, placed, jax.random.key(1), SAMPLING, STOPS, PAD)
    np.testing.assert_array_equal(together.tokens, expected.tokens)
    for keys, x in jax.tree_util.tree_leaves_with_path(copy):
        if x.ndim > 1:
            assert x.addressable_shards[0].data.size * 4 == x.size, sharding.path_of(keys)


def test_keys_by_column_decode_the_same_on_a_mesh(params, expected):
    mesh, inference, copy = laid_out(params, Mesh(fsdp=2, tensor=4))
    inference = dataclasses.replace(inference, key_columns=3)
    placed = sharding.put_rows(prompts(), mesh)
    together = generate(copy, inference, placed, jax.random.key(1), SAMPLING, STOPS, PAD)
    np.testing.assert_array_equal(together.tokens, expected.tokens)


def test_int8_copies_decode_the_same_on_a_mesh(params, key):
    inference, copy = inference_copy.inference_copy(MODEL, params, "int8")
    alone = generate(copy, inference, prompts(), key, SAMPLING, STOPS, PAD)
    mesh, inference, copy = laid_out(params, Mesh(fsdp=2, tensor=4), dtype="int8")
    together = generate(copy, inference, sharding.put_rows(prompts(), mesh), key, SAMPLING, STOPS, PAD)
    np.testing.assert_array_equal(together.tokens, alone.tokens)


def test_auto_replicates_what_a_quarter_of_the_memory_holds(monkeypatch):
    mesh, inference = sharding.make_mesh(Mesh(fsdp=2, tensor=4)), inference_model(MODEL, "bfloat16")
    copy = jax.eval_shape(lambda: models.init(inference, jax.random.key(0)))
    each = 2 * sum(x.size for x in jax.tree.leaves(copy)) // 4
    assert split_axes(inference, mesh, "auto") == ("tensor",)  # CPUs do not say what they hold
    for memory, axes in ((4 * each, ("tensor",)), (4 * each - 4, ("fsdp", "tensor"))):
        monkeypatch.setattr(sharding, "device_memory", lambda mesh, memory=memory: memory)
        assert split_axes(inference, mesh, "auto") == axes
        assert split_axes(inference, mesh, "replicated") == ("tensor",)


@pytest.mark.parametrize(("heads", "shares"), [(4, 8), (2, 2)])
def test_keys_and_values_are_split_over_rows_and_the_heads_that_tensor_divides(heads, shares):
    model, mesh = dataclasses.replace(MODEL, num_kv_heads=heads), sharding.make_mesh(Mesh(fsdp=2, tensor=4))
    decoding = Decoding(inference_model(model, "float32"), SAMPLING, STOPS, PAD)
    queue = PromptQueue(prompts(), ROWS)
    *_, (_, (_, _, slots, *_)) = engine.slot_programs({}, decoding, queue, jax.random.key(0), mesh)
    assert cache_shards(model, mesh) == shares
    for x in jax.tree.leaves((slots.cache.k, slots.cache.v)):
        assert math.prod(x.sharding.shard_shape(x.shape)) * shares == x.size

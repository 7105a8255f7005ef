import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny
from support.traced import compilations

from jaxrlhf import memory, models, sharding
from jaxrlhf.config import Mesh, Sampling
from jaxrlhf.errors import ConfigError
from jaxrlhf.rollout import cache, engine
from jaxrlhf.rollout.decode import Decoding, generate
from jaxrlhf.rollout.inference_copy import inference_copy
from jaxrlhf.rollout.queue import PromptQueue
from jaxrlhf.types import Prompts

LLAMA = tiny(vocab_size=19, max_positions=128, sliding_window=9, sliding_layers=(False, True))
STOPS, PAD = (7, 2), 0
SAMPLING = Sampling(response_length=20, temperature=1.1)


@pytest.fixture(scope="module")
def decoder():
    params = jax.tree.map(lambda x: jnp.where(x == 1, x, 15 * x), models.init(LLAMA, jax.random.key(0)))
    return inference_copy(LLAMA, params, "float32")


def prompts_of(lengths, width=40):
    rng = np.random.default_rng(0)
    tokens, mask = np.full((len(lengths), width), PAD, np.int32), np.zeros((len(lengths), width), bool)
    for i, n in enumerate(lengths):
        tokens[i, width - n :], mask[i, width - n :] = rng.integers(0, 19, n), True
    return Prompts(tokens, mask, np.arange(len(lengths), dtype=np.int32) + 5, np.zeros(len(lengths), np.int32))


PROMPTS = prompts_of([3, 40, 1, 17, 25, 5, 30, 4, 16, 2, 33])


def in_slots(params, model, prompts, key, sampling, stop_ids, pad_id, slots, group=1, columns=0, mesh=None):
    queue = PromptQueue(prompts, slots, group, columns)
    return engine.generate_in_slots(params, Decoding(model, sampling, stop_ids, pad_id), queue, key, mesh)


def same(rollout, other):
    for field in dataclasses.fields(rollout):
        ours, theirs = getattr(rollout, field.name), getattr(other, field.name)
        if field.name == "logprobs":
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)


@pytest.mark.parametrize("slots", [1, 3, 8, 11, 100])
def test_responses_do_not_depend_on_the_number_of_slots(decoder, key, slots):
    model, params = decoder
    expected = generate(params, model, PROMPTS, key, SAMPLING, STOPS, PAD)
    lengths = np.asarray(expected.response_mask).sum(1)
    assert len(set(lengths)) > 3, "rows end at different times, so that slots are given on"
    same(in_slots(params, model, PROMPTS, key, SAMPLING, STOPS, PAD, slots=slots), expected)


@pytest.mark.parametrize("slots", [2, 3, 7, 33])
def test_groups_share_a_prefill_without_changing_responses(decoder, key, slots):
    model, params = decoder
    expected = generate(params, model, PROMPTS, key, SAMPLING, STOPS, PAD, 3)
    same(in_slots(params, model, PROMPTS, key, SAMPLING, STOPS, PAD, slots=slots, group=3), expected)


def test_each_prompt_of_a_group_is_prefilled_once(decoder, key, monkeypatch):
    model, params = decoder
    read, admit = [], engine._admit
    monkeypatch.setattr(engine, "_admit", lambda *a: read.append(a[3].tokens.shape) or admit(*a))
    in_slots(params, model, PROMPTS, key, SAMPLING, STOPS, PAD, slots=4, group=4)
    assert sum(shape[0] for shape in read) == len(PROMPTS.index)


def test_slots_return_the_support(decoder, key):
    model, params = decoder
    sampling = dataclasses.replace(SAMPLING, top_k=4, min_length=3, renormalise_logprobs=True)
    expected = generate(params, model, PROMPTS, key, sampling, STOPS, PAD)
    answered = in_slots(params, model, PROMPTS, key, sampling, STOPS, PAD, slots=3)
    kept = np.asarray(expected.response_mask)
    np.testing.assert_array_equal(answered.support[kept], np.asarray(expected.support)[kept])
    same(dataclasses.replace(answered, support=None), dataclasses.replace(expected, support=None))


def test_programs_are_compiled_once_for_all_refills(decoder, key):
    model, params = decoder
    in_slots(params, model, PROMPTS, key, SAMPLING, STOPS, PAD, slots=4)
    before = engine._admit._cache_size(), engine._advance._cache_size(), engine._select._cache_size()
    in_slots(params, model, PROMPTS, jax.random.key(9), SAMPLING, STOPS, PAD, slots=4)
    shorter = jax.tree.map(lambda x: x[[0, 2, 3, 4, 5]], PROMPTS)
    shorter = dataclasses.replace(shorter, tokens=shorter.tokens[:, 8:], mask=shorter.mask[:, 8:])
    in_slots(params, model, shorter, jax.random.key(9), SAMPLING, STOPS, PAD, slots=4, columns=40)
    assert (engine._admit._cache_size(), engine._advance._cache_size(), engine._select._cache_size()) == before


def test_slots_are_sharded_over_a_mesh(decoder, key):
    model, params = decoder
    mesh = sharding.make_mesh(Mesh(data=4))
    expected = generate(params, model, PROMPTS, key, SAMPLING, STOPS, PAD)
    placed = sharding.put_whole(params, mesh)
    same(in_slots(placed, model, PROMPTS, key, SAMPLING, STOPS, PAD, slots=4, mesh=mesh), expected)
    with pytest.raises(ConfigError, match=r"rollout.slots \(3\) must be a multiple"):
        in_slots(placed, model, PROMPTS, key, SAMPLING, STOPS, PAD, slots=3, mesh=mesh)


def test_a_cache_beyond_memory_is_refused_with_the_number_that_fits(decoder, key, monkeypatch):
    model, params = decoder
    each = 2 * 2 * 2 * 4 * 60 * 4  # bytes: keys and values, 2 layers, 2 heads of 4, 60 columns, float32
    monkeypatch.setattr(memory, "free_on_device", lambda: 4 * each)
    in_slots(params, model, PROMPTS, key, SAMPLING, STOPS, PAD, slots=3)
    with pytest.raises(ConfigError, match=r"8 slots of 60 tokens need .* set rollout.slots to 3 or less"):
        in_slots(params, model, PROMPTS, key, SAMPLING, STOPS, PAD, slots=8)
    with pytest.raises(ConfigError, match="rollout.slots is 0"):
        in_slots(params, model, PROMPTS, key, SAMPLING, STOPS, PAD, slots=0)


def one_program_and_chunks(monkeypatch, decoder, prompts, key, sampling, stop_ids=STOPS, group=1, mesh=None):
    """A rollout of `generate`, and that of `generate_in_chunks` in three programs of eight tokens."""
    monkeypatch.setattr(engine, "CHUNK", 8)
    calls, advance = [], engine._advance
    monkeypatch.setattr(engine, "_advance", lambda *given: calls.append(1) or advance(*given))
    model, params = decoder
    expected = generate(params, model, prompts, key, sampling, stop_ids, PAD, group)
    with compilations() as count:
        chunks = engine.generate_in_chunks(params, Decoding(model, sampling, stop_ids, PAD), prompts, key, group, mesh)
    assert count["_admit"] == count["_advance"] == 1, count
    assert len(calls) == 3 and int(np.asarray(expected.response_mask).sum(1).max()) > 16
    return expected, chunks


def identical(rollout, other):
    for field in dataclasses.fields(rollout):
        np.testing.assert_array_equal(getattr(rollout, field.name), getattr(other, field.name), err_msg=field.name)


@pytest.mark.parametrize(("group", "stop_ids"), [(1, STOPS), (3, ())])
def test_chunks_have_the_bits_of_one_program(decoder, key, group, stop_ids, monkeypatch):
    sampling = dataclasses.replace(SAMPLING, top_k=8, renormalise_logprobs=True)
    identical(*one_program_and_chunks(monkeypatch, decoder, PROMPTS, key, sampling, stop_ids, group))


def test_chunks_continue_given_responses(decoder, key, monkeypatch):
    given = np.array([0, 2, 1, 5, 9, 0, 7, 3, 1, 1, 2], np.int32)
    prompts = dataclasses.replace(PROMPTS, given=given)
    identical(*one_program_and_chunks(monkeypatch, decoder, prompts, key, SAMPLING, ()))


@pytest.mark.parametrize("shape", [{"data": 4}, {"fsdp": 2, "tensor": 2}])
def test_chunks_are_sharded_over_a_mesh(decoder, key, shape, monkeypatch):
    model, params = decoder
    mesh = sharding.make_mesh(Mesh(**shape), jax.devices()[:4])
    prompts = jax.tree.map(lambda x: x[:8], PROMPTS)
    placed = model, sharding.put_whole(params, mesh)
    prompts = sharding.put_rows(prompts, mesh)
    expected, chunks = one_program_and_chunks(monkeypatch, placed, prompts, key, SAMPLING, mesh=mesh)
    same(chunks, expected)
    assert chunks.tokens.sharding.is_equivalent_to(expected.tokens.sharding, 2)


def grown(monkeypatch, decoder, prompts, key, sampling, stop_ids=(), group=1, mesh=None):
    """A rollout of `generate`, that of `generate_in_chunks` in programs of four tokens, and the columns of the caches
    that its programs decode with."""
    monkeypatch.setattr(engine, "CHUNK", 4)
    widths, advance = [], engine._advance

    def watched(params, decoding, slots, *others):
        columns = decoding.model.key_columns
        widths.append({x.shape[columns] for x in slots.cache.k} | {x.shape[2] for x in slots.cache.v})
        assert not any(x.is_deleted() for x in jax.tree.leaves(slots))
        return advance(params, decoding, slots, *others)

    monkeypatch.setattr(engine, "_advance", watched)
    model, params = decoder
    expected = generate(params, model, prompts, key, sampling, stop_ids, PAD, group)
    chunks = engine.generate_in_chunks(params, Decoding(model, sampling, stop_ids, PAD), prompts, key, group, mesh)
    assert all(len(each) == 1 for each in widths)
    return expected, chunks, [each.pop() - prompts.tokens.shape[1] for each in widths]


NET = models.DeltaNet(layers=(True, False), key_heads=2, value_heads=4, key_size=6, value_size=4, conv_width=4)
FAMILIES = {
    "windows": LLAMA,
    "delta nets": tiny(
        vocab_size=19, max_positions=128, delta=NET, attention_gate=True, norm="rmsnorm_1p", qk_norm=True
    ),
    "learned positions": tiny(vocab_size=19, max_positions=128, rope=None, norm="layernorm"),
}


@pytest.mark.parametrize("model", FAMILIES.values(), ids=FAMILIES)
def test_a_cache_that_grows_changes_no_response(model, key, monkeypatch):
    """Of 30 tokens, in three parts. A window of nine tokens begins after the columns of the prompt."""
    params = jax.tree.map(lambda x: jnp.where(x == 1, x, 15 * x), models.init(model, jax.random.key(0)))
    decoder = inference_copy(model, params, "float32")
    sampling = Sampling(response_length=30, temperature=1.1, top_k=8, renormalise_logprobs=True)
    expected, chunks, widths = grown(monkeypatch, decoder, PROMPTS, key, sampling, group=2)
    same(chunks, expected)
    assert widths == [12] * 3 + [20] * 2 + [30] * 3, widths


@pytest.mark.parametrize(("drawn", "widths"), [(7, [12] * 2), (13, [12] * 3), (14, [12] * 3 + [20])])
def test_a_cache_grows_only_while_rows_are_busy(drawn, widths, decoder, key, monkeypatch):
    """Of 30 tokens all but `drawn` are given. The first is drawn from the prompt, so a full cache has room for one
    more."""
    given = np.full(len(PROMPTS.index), 30 - drawn, np.int32)
    prompts = dataclasses.replace(PROMPTS, given=given)
    sampling = Sampling(response_length=30, temperature=1.1)
    expected, chunks, found = grown(monkeypatch, decoder, prompts, key, sampling)
    same(chunks, expected)
    assert found == widths, found


@pytest.mark.parametrize("shape", [{"data": 2}, {"fsdp": 1, "tensor": 2}])
def test_a_cache_that_grows_stays_split_over_a_mesh(shape, decoder, key, monkeypatch):
    model, params = decoder
    mesh = sharding.make_mesh(Mesh(**shape), jax.devices()[:2])
    placed = model, sharding.put_whole(params, mesh)
    prompts = sharding.put_rows(jax.tree.map(lambda x: x[:8], PROMPTS), mesh)
    found, pad = [], cache._pad
    monkeypatch.setattr(cache, "_pad", lambda *given: found.append((given[0], pad(*given))) or found[-1][1])
    expected, chunks, widths = grown(monkeypatch, placed, prompts, key, Sampling(response_length=30), mesh=mesh)
    same(chunks, expected)
    assert widths[-1] == 30 and len(found) == 2 * (2 * model.num_layers + 2)
    for before, after in found:
        assert before.is_deleted() and after.sharding == before.sharding
        assert after.ndim < 4 or not after.sharding.is_fully_replicated


def test_rows_that_end_early_and_late_in_a_cache_that_grows(decoder, key, monkeypatch):
    sampling = Sampling(response_length=30, temperature=1.1)
    expected, chunks, widths = grown(monkeypatch, decoder, PROMPTS, key, sampling, (7,))
    lengths = np.asarray(expected.response_mask).sum(1)
    assert lengths.min() < 12 and lengths.max() > 20, lengths
    same(chunks, expected)
    assert widths[-1] == 30


@pytest.mark.parametrize("way", ["at once", "in chunks", "in slots"])
def test_the_layout_of_keys_changes_no_response(way, decoder, key, monkeypatch):
    """In chunks the cache grows from 12 columns for responses to 20."""
    monkeypatch.setattr(engine, "CHUNK", 4)
    (model, params), prompts = decoder, prompts_of([3, 5, 4, 8, 7, 6], 8)

    def rollout(columns):
        laid = dataclasses.replace(model, key_columns=columns)
        decoding = Decoding(laid, SAMPLING, STOPS, PAD)
        shapes = {x.shape for x in jax.eval_shape(lambda: models.empty_cache(laid, 2, 5)).k}
        if way == "at once":
            return shapes, generate(params, laid, prompts, key, SAMPLING, STOPS, PAD)
        if way == "in slots":
            return shapes, engine.generate_in_slots(params, decoding, PromptQueue(prompts, 3), key)
        return shapes, engine.generate_in_chunks(params, decoding, prompts, key)

    (by_row, expected), (by_column, found) = rollout(2), rollout(3)
    heads, width = model.num_kv_heads, model.head_dim
    assert by_row == {(2, heads, 5, width)} and by_column == {(2, heads, width, 5)}
    same(found, expected)

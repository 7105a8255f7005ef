import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from support.tiny import tiny

from jaxrlhf import models
from jaxrlhf.config import Sampling
from jaxrlhf.logprobs import response_states, token_logprobs
from jaxrlhf.rollout import decode, engine
from jaxrlhf.rollout.inference_copy import inference_copy
from jaxrlhf.rollout.sampling import sample
from jaxrlhf.types import Prompts

LLAMA = tiny(vocab_size=11, sliding_window=4, sliding_layers=(False, True), tie_embeddings=False)
GPT2 = dataclasses.replace(
    LLAMA, family="gpt2", rope=None, norm="layernorm", gated_mlp=False, sliding_window=None, sliding_layers=(False,) * 2
)
STOPS = (7, 2)
PAD = 0


def weights(model):
    """Kernels large enough for distributions that are far from flat; norms as they are."""
    return jax.tree.map(lambda x: jnp.where(x == 1, x, 15 * x), models.init(model, jax.random.key(0)))


def generate(params, model, *rest):
    model, params = inference_copy(model, params, model.dtype)
    return decode.generate(params, model, *rest)


def prompts_of(lengths, width=None, index=None, draws=None):
    rng = np.random.default_rng(0)
    width = width or max(lengths)
    tokens, mask = np.full((len(lengths), width), PAD, np.int32), np.zeros((len(lengths), width), bool)
    for i, n in enumerate(lengths):
        tokens[i, width - n :], mask[i, width - n :] = rng.integers(0, 11, n), True
    index = np.arange(len(lengths)) if index is None else index
    draws = np.zeros(len(lengths), int) if draws is None else draws
    return Prompts(*(jnp.asarray(x) for x in (tokens, mask, np.int32(index), np.int32(draws))))


def rows(prompts, order):
    return jax.tree.map(lambda x: x[jnp.asarray(order)], prompts)


def one_by_one(params, model, prompts, key, sampling, stops):
    """The same responses without a cache, a batch, a loop on the device, or padding before the tokens."""

    @jax.jit
    def draw(tokens, length, key):
        hidden = models.forward(params, model, tokens[None], (jnp.arange(len(tokens)) < length)[None])
        return sample(models.lm_logits(params, model, hidden[:, length - 1]), key[None], sampling, None)[:2]

    responses = []
    for tokens, mask, index, which in zip(prompts.tokens, prompts.mask, prompts.index, prompts.sample, strict=True):
        prompt = np.asarray(tokens)[np.asarray(mask)]
        row_key = jax.random.fold_in(jax.random.fold_in(key, index), which)
        room = np.zeros(prompts.tokens.shape[1] + sampling.response_length, np.int32)
        room[: len(prompt)] = prompt
        response = []
        for t in range(sampling.response_length):
            n = len(prompt) + t
            token, logprob = draw(jnp.asarray(room), n, jax.random.fold_in(row_key, t))
            room[n] = token[0]
            response.append((int(token[0]), float(logprob[0])))
            if response[-1][0] in stops:
                break
        responses.append(response)
    return responses


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=lambda m: m.family)
def test_generate_is_forward_and_sample_token_by_token(model, key):
    params, prompts = weights(model), prompts_of([3, 6, 1, 4, 2, 5, 3, 4])
    sampling = Sampling(response_length=5, temperature=1.5, top_k=9, stop_token_ids=(2,))
    rollout = generate(params, model, prompts, key, sampling, (7,), PAD)
    expected = one_by_one(params, model, prompts, key, sampling, STOPS)
    lengths = [len(r) for r in expected]
    assert len(set(lengths)) > 2 and 5 in lengths  # ends of every kind
    for i, response in enumerate(expected):
        tokens, logprobs = zip(*response, strict=True)
        n = len(tokens)
        assert rollout.tokens[i, 6:].tolist() == [*tokens] + [PAD] * (5 - n)
        assert rollout.response_mask[i].tolist() == [True] * n + [False] * (5 - n)
        np.testing.assert_allclose(rollout.logprobs[i], [*logprobs] + [0] * (5 - n), atol=1e-5)
        assert bool(rollout.finished[i]) == (tokens[-1] in STOPS)
    np.testing.assert_array_equal(rollout.tokens[:, :6], prompts.tokens)
    np.testing.assert_array_equal(rollout.mask, np.hstack([prompts.mask, rollout.response_mask]))
    np.testing.assert_array_equal(rollout.index, prompts.index)


@pytest.mark.parametrize("model", [LLAMA, GPT2], ids=lambda m: m.family)
def test_logprobs_as_sampled_are_those_of_training(model, key):
    """Full support at the temperature, whatever was filtered or held back, from another program."""
    params, prompts = weights(model), prompts_of([3, 6, 1, 4])
    sampling = Sampling(response_length=9, temperature=0.7, top_p=0.9, min_length=3)
    rollout = generate(params, model, prompts, key, sampling, STOPS, PAD)
    logprobs, _ = token_logprobs(
        params, model, response_states(params, model, rollout)[:, :-1], rollout.tokens[:, 6:], sampling.temperature
    )
    np.testing.assert_allclose(np.where(rollout.response_mask, logprobs, 0), rollout.logprobs, atol=1e-5)


FILTERED = [
    Sampling(response_length=9, temperature=0.7, top_k=3, renormalise_logprobs=True),
    Sampling(response_length=9, temperature=1.3, top_p=0.8, min_p=0.05, renormalise_logprobs=True),
    Sampling(response_length=9, min_length=3, renormalise_logprobs=True),
]


@pytest.mark.parametrize("sampling", FILTERED, ids=["top_k", "top_p", "min_length"])
def test_the_rollout_contains_the_support(key, sampling):
    """Unpacked, it renormalises the model's own distribution to the sampler's, by brute force and in training."""
    params, prompts = weights(LLAMA), prompts_of([3, 6, 1, 4])
    rollout = generate(params, LLAMA, prompts, key, sampling, STOPS, PAD)
    assert rollout.support.dtype == jnp.uint8 and rollout.support.shape == (4, 9, 2)
    kept = np.unpackbits(np.asarray(rollout.support), axis=-1)
    mask, tokens = np.asarray(rollout.response_mask), np.asarray(rollout.tokens[:, 6:])
    assert not kept[~mask].any() and not kept[..., 11:].any()
    assert mask.any(1).all() and not mask.all()
    hidden = response_states(params, LLAMA, rollout)[:, :-1]
    logits = np.float64(models.lm_logits(params, LLAMA, hidden)) / sampling.temperature
    given = params, LLAMA, hidden, rollout.tokens[:, 6:], sampling.temperature
    (logprobs, entropy), (full, _) = token_logprobs(*given, rollout.support), token_logprobs(*given)
    assert np.isfinite(logprobs).all() and np.isfinite(entropy).all()  # where the support is empty too
    for row, t in zip(*np.nonzero(mask), strict=True):
        inside = np.flatnonzero(kept[row, t])
        if sampling.top_k:
            assert set(inside) == set(np.argsort(logits[row, t])[-3:])
        if sampling.min_length:
            assert set(inside) == set(range(11)) - (set(STOPS) if t < 3 else set())
        p = np.exp(logits[row, t, inside] - np.logaddexp.reduce(logits[row, t, inside]))
        expected = np.log(p[list(inside).index(tokens[row, t])])
        np.testing.assert_allclose([rollout.logprobs[row, t], logprobs[row, t]], [expected] * 2, atol=1e-5)
        np.testing.assert_allclose(entropy[row, t], -(p * np.log(p)).sum(), atol=1e-5)
    assert (np.asarray(logprobs - full)[mask] > 0.01).any()


def test_without_renormalisation_no_support_is_made(key):
    sampling = Sampling(response_length=4, top_k=3)
    model, params = inference_copy(LLAMA, weights(LLAMA), "float32")

    def program(sampling):
        return decode.generate.lower(params, model, prompts_of([3]), key, sampling, STOPS, PAD).as_text()

    assert "ui8" not in program(sampling)
    assert "ui8" in program(dataclasses.replace(sampling, renormalise_logprobs=True))
    assert generate(weights(LLAMA), LLAMA, prompts_of([3]), key, sampling, STOPS, PAD).support is None


def same_rows(rollout, other, order, padding=0):
    np.testing.assert_array_equal(other.tokens[:, padding:], rollout.tokens[jnp.asarray(order)])
    np.testing.assert_array_equal(other.response_mask, rollout.response_mask[jnp.asarray(order)])
    np.testing.assert_allclose(other.logprobs, rollout.logprobs[jnp.asarray(order)], atol=1e-5)


def test_a_response_depends_on_its_prompt_and_key_alone(key):
    params, lengths = weights(LLAMA), [3, 6, 1, 4, 2, 5, 6, 6]
    sampling = Sampling(response_length=8)

    def run(prompts):
        return generate(params, LLAMA, prompts, key, sampling, STOPS, PAD)

    prompts = prompts_of(lengths)
    rollout = run(prompts)
    order = [5, 0, 7, 2, 1, 6, 3, 4]
    same_rows(rollout, run(rows(prompts, order)), order)
    same_rows(rollout, run(rows(prompts, [4, 1, 6])), [4, 1, 6])
    same_rows(rollout, run(prompts_of(lengths, width=11)), range(8), padding=5)


def test_keys_differ_by_prompt_sample_and_run(key):
    params, sampling = weights(LLAMA), Sampling(response_length=12, temperature=1.5)

    def run(prompts, key):
        return np.asarray(generate(params, LLAMA, prompts, key, sampling, (), PAD).tokens[:, 4:])

    one = prompts_of([4] * 3, index=[0, 0, 1], draws=[0, 1, 0])
    one = dataclasses.replace(one, tokens=jnp.tile(one.tokens[:1], (3, 1)))
    first = run(one, key)
    assert len({tuple(row) for row in first}) == 3
    np.testing.assert_array_equal(run(one, key), first)
    assert (run(one, jax.random.key(1)) != first).any(axis=1).all()


def test_masks_come_from_ends_and_not_from_ids(key):
    """A pad id that was sampled is a token; one that is also a stop token ends the row and stays inside the mask."""
    params, prompts = weights(LLAMA), prompts_of([3] * 32)
    sampling = Sampling(response_length=10, temperature=3.0)
    free = generate(params, LLAMA, prompts, key, sampling, (), PAD)
    assert free.response_mask.all() and not free.finished.any() and (free.tokens[:, 3:] == PAD).any()
    stopped = generate(params, LLAMA, prompts, key, sampling, (PAD,), PAD)
    columns = free.tokens[:, 3:], stopped.tokens[:, 3:], stopped.response_mask, stopped.finished
    for before, after, mask, finished in zip(*map(np.asarray, columns), strict=True):
        ends = np.flatnonzero(before == PAD)
        length = ends[0] + 1 if len(ends) else 10
        assert finished == bool(len(ends)) and mask.tolist() == [True] * length + [False] * (10 - length)
        np.testing.assert_array_equal(after, np.where(mask, before, PAD))
    assert stopped.finished.any()


def test_no_stop_token_before_the_minimum_length(key):
    params, prompts = weights(LLAMA), prompts_of([3] * 16)
    everything = tuple(range(10))  # all stop but one token
    rollout = generate(params, LLAMA, prompts, key, Sampling(response_length=6, min_length=4), everything, PAD)
    response, lengths = np.asarray(rollout.tokens[:, 3:]), np.asarray(rollout.response_mask).sum(1)
    assert (response[:, :4] == 10).all() and (lengths >= 5).all() and (lengths == 5).any()


def test_decoding_stops_when_every_row_has_ended(key, monkeypatch):
    steps = []

    def counted(*arguments):
        jax.debug.callback(lambda: steps.append(1))
        return sample(*arguments)

    monkeypatch.setattr(decode, "sample", counted)
    static = ("model", "sampling", "stop_ids", "pad_id")
    run = jax.jit(lambda *a, **k: decode.generate.__wrapped__(*a, **k), static_argnames=static)
    model, params = inference_copy(LLAMA, weights(LLAMA), "float32")
    arguments = {"model": model, "sampling": Sampling(response_length=30), "stop_ids": (1, 2, 3, 4, 5), "pad_id": PAD}
    rollout = run(params, prompts=prompts_of([3] * 4), key=key, **arguments)
    jax.effects_barrier()
    longest = int(rollout.response_mask.sum(1).max())
    assert rollout.finished.all() and len(steps) == longest < 30


def test_one_token_responses(key):
    params, prompts = weights(LLAMA), prompts_of([2, 3])
    rollout = generate(params, LLAMA, prompts, key, Sampling(response_length=1), tuple(range(11)), PAD)
    assert rollout.response_mask.all() and rollout.finished.all() and rollout.tokens.shape == (2, 4)


def test_nothing_recompiles_for_new_data(key):
    sampling = Sampling(response_length=5, temperature=0.9)
    before = decode.generate._cache_size()
    for seed in range(3):
        params = jax.tree.map(lambda x, s=seed: (1 + s) * x, weights(LLAMA))
        generate(params, LLAMA, prompts_of([1 + seed, 4]), jax.random.key(seed), sampling, STOPS, PAD)
    assert decode.generate._cache_size() == before + 1


def test_a_mesh_changes_nothing(key):
    mesh = jax.make_mesh((4, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    params, prompts = weights(LLAMA), prompts_of([3, 6, 1, 4, 2, 5, 6, 6])
    sampling = Sampling(response_length=8, top_p=0.95, renormalise_logprobs=True)
    expected = generate(params, LLAMA, prompts, key, sampling, STOPS, PAD)

    def place(leaf):
        last = "tensor" if leaf.ndim > 1 and leaf.shape[-1] % 2 == 0 else None
        return jax.device_put(leaf, NamedSharding(mesh, PartitionSpec(*[None] * (leaf.ndim - 1), last)))

    over_rows = NamedSharding(mesh, PartitionSpec("data"))
    rollout = generate(
        jax.tree.map(place, params), LLAMA, jax.device_put(prompts, over_rows), key, sampling, STOPS, PAD
    )
    same_rows(expected, rollout, range(8))
    np.testing.assert_array_equal(rollout.support, expected.support)


def test_bfloat16_decodes_and_keeps_float32_logprobs(key):
    model = dataclasses.replace(LLAMA, dtype="bfloat16")
    params, prompts = weights(LLAMA), prompts_of([3, 6, 1, 4])
    rollout = generate(params, model, prompts, key, Sampling(response_length=8), STOPS, PAD)
    assert rollout.logprobs.dtype == jnp.float32
    exact, _ = token_logprobs(
        params, LLAMA, response_states(params, LLAMA, rollout)[:, :-1], rollout.tokens[:, 6:], 1.0
    )
    np.testing.assert_allclose(np.where(rollout.response_mask, exact, 0), rollout.logprobs, atol=0.1)


def test_a_group_equals_repeated_prompts(key):
    """Read once or written out: the same rows, drawn with the same keys."""
    params, prompts, sampling = weights(LLAMA), prompts_of([3, 6, 1], draws=[0, 2, 1]), Sampling(response_length=8)
    shared = generate(params, LLAMA, prompts, key, sampling, STOPS, PAD, 3)
    written = rows(prompts, [0, 0, 0, 1, 1, 1, 2, 2, 2])
    written = dataclasses.replace(written, sample=written.sample + jnp.array([0, 1, 2] * 3))
    rollout = generate(params, LLAMA, written, key, sampling, STOPS, PAD)
    same_rows(rollout, shared, range(9))
    np.testing.assert_array_equal(shared.sample, written.sample)
    assert len({tuple(row) for row in np.asarray(shared.tokens[:3])}) == 3


def test_trim_drops_unused_columns(key):
    params = weights(LLAMA)
    long = generate(params, LLAMA, prompts_of([3, 4]), key, Sampling(response_length=32), tuple(range(9)), PAD)
    longest = int(long.response_mask.sum(1).max())
    assert longest <= 8
    cut = decode.trim(long)
    size = cut.response_mask.shape[1]
    assert longest <= size < 2 * longest and cut.tokens.shape == (2, 4 + size)
    np.testing.assert_array_equal(cut.tokens, long.tokens[:, : 4 + size])
    np.testing.assert_array_equal(cut.mask, long.mask[:, : 4 + size])
    assert int(cut.response_mask.sum()) == int(long.response_mask.sum())
    full = generate(params, LLAMA, prompts_of([3, 4]), key, Sampling(response_length=5), (), PAD)
    assert decode.trim(full) is full


EACH_LAYOUT = pytest.mark.parametrize("columns", [2, 3], ids=["keys by row", "keys by column"])


@EACH_LAYOUT
def test_a_tick_of_the_engine_copies_no_cache(columns, key):
    """In float32. XLA for CPUs rewrites a bfloat16 cache at every tick: docs/performance.md says what that costs."""
    model = dataclasses.replace(LLAMA, head_dim=32, num_kv_heads=4, sliding_window=None, sliding_layers=(False,) * 2)
    model, params = inference_copy(model, models.init(model, key), "float32")
    model = dataclasses.replace(model, key_columns=columns)
    sampling = Sampling(response_length=512)
    decoding = decode.Decoding(model, sampling, STOPS, PAD)
    slots = decode.empty_slots(decoding, 16, 512)
    compiled = engine._advance.lower(params, decoding, slots, np.int32(9), 512).compile()
    one = slots.cache.k[0].nbytes
    assert compiled.memory_analysis().temp_size_in_bytes < one / 2, "of four arrays as large as this one"


@EACH_LAYOUT
def test_the_cache_is_updated_in_place(columns, key):
    """The loop holds one cache: memory beyond arguments and results is less than two, and no step copies one."""
    model = dataclasses.replace(LLAMA, head_dim=32, num_kv_heads=4, sliding_window=None, sliding_layers=(False,) * 2)
    model, params = inference_copy(model, models.init(model, key), "float32")
    model = dataclasses.replace(model, key_columns=columns)
    compiled = decode.generate.lower(
        params, model, prompts_of([8] * 16), key, Sampling(response_length=120), STOPS, PAD
    ).compile()
    cache = 2 * model.num_layers * 16 * 4 * 128 * 32 * 4
    assert cache < compiled.memory_analysis().temp_size_in_bytes < 2 * cache
    shapes = "f32[16,4,128,32]", "f32[16,4,32,128]"
    text = compiled.as_text()
    assert (shapes[1] in text) == (columns == 3)
    copies = [line for line in text.splitlines() if " copy(" in line and any(shape in line for shape in shapes)]
    assert not [line for line in copies if "while/body" in line], copies

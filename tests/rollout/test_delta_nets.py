"""Generation with layers whose cache is a recurrent state."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.tiny import tiny

from jaxrlhf import memory, models, sharding
from jaxrlhf.config import Mesh, Sampling
from jaxrlhf.errors import ConfigError
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.rollout import engine, stream
from jaxrlhf.rollout.cache import check_slots
from jaxrlhf.rollout.decode import Decoding, generate
from jaxrlhf.rollout.inference_copy import convert, inference_copy, inference_model
from jaxrlhf.rollout.queue import PromptQueue
from jaxrlhf.types import Prompts

NET = models.DeltaNet(layers=(True, False), key_heads=2, value_heads=4, key_size=6, value_size=4, conv_width=4)
MODEL = tiny(delta=NET, attention_gate=True, norm="rmsnorm_1p", qk_norm=True, max_positions=1024)
STOPS, PAD, WIDTH = (7, 2), 0, 24
SAMPLING = Sampling(response_length=16, temperature=1.1)


@pytest.fixture(scope="module")
def params():
    return jax.tree.map(lambda x: jnp.where(x == 1, x, 15 * x), models.init(MODEL, jax.random.key(0)))


def prompts_of(lengths):
    rng = np.random.default_rng(0)
    tokens, mask = np.full((len(lengths), WIDTH), PAD, np.int32), np.zeros((len(lengths), WIDTH), bool)
    for i, n in enumerate(lengths):
        tokens[i, WIDTH - n :], mask[i, WIDTH - n :] = rng.integers(0, 29, n), True
    return Prompts(tokens, mask, np.arange(len(lengths), dtype=np.int32) + 5, np.zeros(len(lengths), np.int32))


PROMPTS = prompts_of([3, 24, 1, 17, 5, 9])


def same(rollout, other):
    for field in dataclasses.fields(rollout):
        ours, theirs = getattr(rollout, field.name), getattr(other, field.name)
        if field.name == "logprobs":
            np.testing.assert_allclose(ours, theirs, atol=1e-5)
        else:
            np.testing.assert_array_equal(ours, theirs, err_msg=field.name)


def test_slots_groups_and_meshes_change_no_response(params, key):
    model, copy = inference_copy(MODEL, params, "float32")
    expected = generate(copy, model, PROMPTS, key, SAMPLING, STOPS, PAD, 2)
    assert len(set(np.asarray(expected.response_mask).sum(1))) > 3, "rows end at different times"
    decoding = Decoding(model, SAMPLING, STOPS, PAD)
    same(engine.generate_in_slots(copy, decoding, PromptQueue(PROMPTS, 4, 2), key), expected)
    # the sampler's log-probs are those that a policy computes of the whole sequence
    tokens, mask = jnp.asarray(expected.tokens), jnp.asarray(expected.mask)

    @jax.jit
    def of_whole(params):
        hidden = models.forward(params, MODEL, tokens, mask)[:, WIDTH - 1 : -1]
        return token_logprobs(params, MODEL, hidden, tokens[:, WIDTH:], SAMPLING.temperature)[0]

    at = np.asarray(expected.response_mask)
    np.testing.assert_allclose(np.asarray(of_whole(params))[at], np.asarray(expected.logprobs)[at], atol=1e-4)
    mesh = sharding.make_mesh(Mesh(data=2, tensor=2))
    placed = sharding.place(jax.device_get(params), sharding.shardings(params, mesh))
    spread = convert(placed, MODEL, inference_model(MODEL, "float32"), mesh, ("tensor",))
    same(engine.generate_in_slots(spread, decoding, PromptQueue(PROMPTS, 4, 2), key, mesh), expected)


def test_a_stream_begins_anew_where_its_state_cannot_go_back(params):
    model, copy = inference_copy(MODEL, params, "float32")
    source = stream.Stream(copy, Decoding(model, SAMPLING, STOPS, PAD))

    def expected(prompt, index):
        tokens = np.full((1, 60), PAD, np.int32)
        tokens[0, 60 - len(prompt) :] = prompt
        prompts = Prompts(tokens, np.arange(60)[None] >= 60 - len(prompt), np.array([index]), np.zeros(1, np.int32))
        rollout = generate(copy, model, prompts, jax.random.key(5), SAMPLING, STOPS, PAD)
        return np.asarray(rollout.tokens)[0, 60:][np.asarray(rollout.response_mask)[0]].tolist()

    first = [5, 9, 11, 20, 3]
    longer = [*first, *expected(first, 0), 4, 8, 15]
    for index, prompt in enumerate([first, longer, first, longer[:9], [*longer[:9], 1]]):
        found = [t for new in source.generate(prompt, jax.random.key(5), index=index, limit=64) for t in new]
        assert found == expected(prompt, index), index


@pytest.mark.parametrize("dtype", ["bfloat16", "int8"])
def test_smaller_copies_stay_close(params, dtype):
    smaller = jax.tree.map(lambda x: x / 4, params)
    tokens, mask = jnp.asarray(PROMPTS.tokens), jnp.asarray(PROMPTS.mask)
    positions = jnp.maximum(jnp.cumsum(mask, axis=1, dtype=jnp.int32) - 1, 0)

    @partial(jax.jit, static_argnums=1)
    def hidden(copy, model):
        cache = models.empty_cache(model, *tokens.shape)
        return models.forward_cached(copy, model, tokens, mask, positions, cache, 0)[0]

    exact, rough = (hidden(*reversed(inference_copy(MODEL, smaller, kind))) for kind in ("float32", dtype))
    difference = np.linalg.norm((exact - rough)[mask]) / np.linalg.norm(exact[mask])
    assert 0 < difference < 0.05


def test_states_are_counted_where_a_cache_must_fit(monkeypatch):
    each = 2 * 2 * 4 * 40 * 4 + 4 * (3 * NET.channels + 4 * 6 * 4)  # one layer of each kind
    monkeypatch.setattr(memory, "free_on_device", lambda: 4 * each)
    check_slots(MODEL, 4, 40)
    with pytest.raises(ConfigError, match="5 slots of 40 tokens need"):
        check_slots(MODEL, 5, 40)
    monkeypatch.setattr(memory, "free_on_device", lambda: 4 * each - 1)
    with pytest.raises(ConfigError, match="4 slots of 40 tokens need"):
        check_slots(MODEL, 4, 40)

"""Streams: their tokens are those of a batch of one, whatever was read before, with few compiled programs."""

import dataclasses

import jax
import numpy as np
import pytest

from jaxrlhf import weights
from jaxrlhf.config import Sampling
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.models import for_length
from jaxrlhf.rollout import decode, stream
from jaxrlhf.rollout.decode import Decoding
from jaxrlhf.rollout.inference_copy import inference_copy

PAD, STOP = 0, 2


@pytest.fixture(scope="module")
def model(tiny_model):
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(3))
    sharper = jax.tree.map(lambda x: 3 * x, params)  # no two tokens are nearly as likely
    return inference_copy(model, sharper, "float32")


def expected(model, prompt, sampling, index):
    row = PromptRow(tokens=prompt, text="", columns={}, index=index)
    prompts = batching.prompts([row], PAD, 40)
    rollout = decode.generate(model[1], model[0], prompts, jax.random.key(5), sampling, (STOP,), PAD)
    return np.asarray(rollout.tokens)[0, 40:][np.asarray(rollout.response_mask)[0]].tolist()


def streamed(source, prompt, index, limit=64):
    return [token for new in source.generate(prompt, jax.random.key(5), index=index, limit=limit) for token in new]


@pytest.mark.parametrize(
    "sampling",
    [Sampling(response_length=12, greedy=True), Sampling(response_length=12, temperature=0.9, top_k=20, min_length=3)],
)
def test_tokens_are_those_of_generate_whatever_was_read_before(model, sampling):
    source = stream.Stream(model[1], Decoding(model[0], sampling, (STOP,), PAD))
    rng = np.random.default_rng(0)
    first = rng.integers(3, 40, 5).tolist()
    response = expected(model, first, sampling, 0)
    longer = [*first, *response, *rng.integers(3, 40, 17).tolist()]  # as in a conversation
    other = [*first[:3], *rng.integers(3, 40, 30).tolist()]
    for index, prompt in enumerate([first, longer, first, other, longer[:9], first]):
        assert streamed(source, prompt, index) == expected(model, prompt, sampling, index), index


def test_a_conversation_that_outgrows_the_original_length_is_read_again(model):
    """Keys in the cache were rotated for a short sequence."""
    config, params = model
    planes = config.head_dim // 2
    factors = {"short_factor": (1.0,) * planes, "long_factor": tuple(2.0 + i for i in range(planes))}
    rope = dataclasses.replace(config.rope, kind="longrope", factor=4.0, original_max_positions=20, **factors)
    config, sampling = dataclasses.replace(config, rope=rope), Sampling(response_length=8, greedy=True)
    source = stream.Stream(params, Decoding(config, sampling, (STOP,), PAD))
    first = [5, 9, 11, 7, 30]
    longer = [*first, *range(10, 30)]
    for index, prompt in enumerate([first, longer, first]):
        fixed = for_length(config, len(prompt) + 8)
        assert (fixed.rope.length > 20) == (prompt == longer)
        assert streamed(source, prompt, index) == expected((fixed, params), prompt, sampling, index), index


def test_a_stream_that_was_left_or_limited_continues_correctly(model):
    sampling = Sampling(response_length=12, greedy=True)
    source = stream.Stream(model[1], Decoding(model[0], sampling, (), PAD))
    prompt = [5, 9, 11]
    whole = streamed(source, prompt, 0)
    assert len(whole) == 12
    assert streamed(source, prompt, 0, limit=7) == whole[:7]
    assert next(iter(source.generate(prompt, jax.random.key(5), limit=64))) == whole[:1]
    assert streamed(source, [*prompt, *whole[:4]], 0)[:8] == whole[4:]


def test_programs_do_not_grow_with_the_number_of_responses(model, monkeypatch):
    monkeypatch.setattr(stream, "COLUMNS", 64)
    monkeypatch.setattr(stream, "PIECES", (4, 16))
    sampling = Sampling(response_length=8, top_p=0.95)
    source = stream.Stream(model[1], Decoding(model[0], sampling, (STOP,), PAD))
    programs = (stream._read, stream._first_token, stream._advance)
    before = sum(program._cache_size() for program in programs)
    for turn in range(30):
        streamed(source, [3 + (turn + i) % 40 for i in range(1 + turn)], turn)
    assert sum(program._cache_size() for program in programs) - before == 4
    streamed(source, list(range(3, 43)) + [7] * 17, 31)  # 57 + 16 columns: twice the cache
    assert sum(program._cache_size() for program in programs) - before <= 8

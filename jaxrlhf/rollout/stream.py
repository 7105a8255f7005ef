"""Generation of one response at a time, a few tokens per call, in a key-value cache that outlives the response.

For conversations: of a prompt that begins with what was read before, only the rest is read (with delta nets, if it
begins with all of that). Columns of the cache are positions. Its size is doubled when it is full and text is read in
pieces of two sizes, so the number of compiled programs grows with the logarithm of the longest prompt and not with the
number of responses.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxrlhf.models import ModelConfig, empty_cache, for_length, forward_cached
from jaxrlhf.rollout.decode import Decoding, draw_tokens, empty_slots, widened
from jaxrlhf.types import KVCache, Params, Slots

PIECES = (16, 128)
"""Tokens that are read at once."""
TOKENS = 4
"""Tokens drawn per call."""
COLUMNS = 512
"""Columns of the first cache."""


class Stream:
    """Responses of a model, one after another. `params` and `decoding.model` are as `inference_copy` returns them."""

    def __init__(self, params: Params, decoding: Decoding) -> None:
        self._params, self._decoding = params, decoding
        self._read: list[int] = []  # the tokens in the cache
        self._cache = empty_cache(decoding.model, 1, COLUMNS)

    def generate(self, prompt: Sequence[int], key: Array, *, index: int = 0, limit: int) -> Iterator[list[int]]:
        """Yield the tokens of a response as they are drawn, a few at a time, the stop token included.

        They are those that `decode.generate` draws for a prompt of this `index`, up to rounding. At most `limit` tokens
        are drawn, and at most `response_length`; prompt and response must fit in the model's context. A caller may stop
        at any time.
        """
        length = min(limit, self._decoding.sampling.response_length)
        model = for_length(self._decoding.model, len(prompt) + length)
        if model != self._decoding.model:  # the cache holds keys rotated for another length
            self._decoding, self._read = dataclasses.replace(self._decoding, model=model), []
        slots = self._start([*prompt], jax.random.fold_in(jax.random.fold_in(key, index), 0))
        tokens: list[int] = []
        while True:
            count, ended, drawn = jax.device_get((slots.count[0], slots.ended[0], slots.tokens[0]))
            new = drawn[len(tokens) : count].tolist()
            tokens += new
            self._cache, self._read = slots.cache, [*prompt, *tokens[:-1]]  # the last token has not been read
            yield new
            if ended or count == length:
                return
            slots = _advance(self._params, self._decoding, slots, np.int32(min(TOKENS, length - len(tokens))))

    def _start(self, prompt: list[int], key: Array) -> Slots:
        """Read the prompt and draw the first token."""
        columns = before = self._cache.valid.shape[1]
        while columns < len(prompt) + max(self._decoding.sampling.response_length, PIECES[-1]):
            columns *= 2
        cache = widened(self._cache, columns - before, self._decoding.model) if columns > before else self._cache
        start = next((i for i, pair in enumerate(zip(prompt, self._read, strict=False)) if pair[0] != pair[1]), None)
        start = min(len(prompt), len(self._read)) if start is None else start
        start = min(start, len(prompt) - 1)  # the last token's hidden state is needed
        if self._decoding.model.delta is not None and start < len(self._read):
            start = 0  # a recurrent state cannot forget its last tokens alone
        hidden = None
        while start < len(prompt):
            size = next((size for size in PIECES if size >= len(prompt) - start), PIECES[-1])
            piece = prompt[start : start + size]
            padded = np.array([piece + [self._decoding.pad_id] * (size - len(piece))], np.int32)
            model = self._decoding.model
            hidden, cache = _read(self._params, model, cache, padded, np.int32(len(piece)), np.int32(start))
            start += size
        assert hidden is not None
        return _first_token(self._params, self._decoding, cache, hidden, np.int32(len(prompt)), key)


@partial(jax.jit, static_argnames="model", donate_argnames="cache")
def _read(
    params: Params, model: ModelConfig, cache: KVCache, tokens: Int[Array, "1 T"], count: Array, start: Array
) -> tuple[Float[Array, "1 D"], KVCache]:
    """Read the first `count` of `tokens` at position `start`; what the cache has from there on is forgotten. Returns
    the hidden state of the last token read."""
    columns = jnp.arange(cache.valid.shape[1])
    states = jax.tree.map(lambda x: jnp.where(start == 0, 0, x), cache.states)
    cache = dataclasses.replace(cache, valid=cache.valid & (columns < start), states=states)
    offsets = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.minimum(start + offsets, model.max_positions - 1)
    hidden, cache = forward_cached(params, model, tokens, offsets < count, positions, cache, start)
    return hidden[:, count - 1], cache


@partial(jax.jit, donate_argnames="cache")
def _first_token(params: Params, decoding: Decoding, cache: KVCache, hidden: Array, length: Array, key: Array) -> Slots:
    slots = dataclasses.replace(
        empty_slots(decoding, 1, 0),
        ended=jnp.zeros(1, bool),
        prompt_length=length[None],
        keys=key[None],
        cache=cache,
    )
    return draw_tokens(params, decoding, slots, hidden)


@partial(jax.jit, donate_argnames="slots")
def _advance(params: Params, decoding: Decoding, slots: Slots, tokens: Array) -> Slots:
    """Draw up to `tokens` tokens."""

    def step(slots: Slots) -> Slots:
        token = jnp.take_along_axis(slots.tokens, slots.count[:, None] - 1, axis=1)
        position = slots.prompt_length + slots.count - 1
        hidden, cache = forward_cached(
            params, decoding.model, token, slots.busy[:, None], position[:, None], slots.cache, position[0]
        )
        slots = dataclasses.replace(slots, cache=cache, clock=slots.clock + 1)
        return draw_tokens(params, decoding, slots, hidden[:, 0])

    end = slots.clock + tokens
    return lax.while_loop(lambda slots: slots.busy[0] & (slots.clock < end), step, slots)

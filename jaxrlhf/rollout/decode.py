"""Autoregressive generation: one prefill, then a loop that draws one token per row and step.

`generate` runs a whole batch as one program. engine.py calls the same parts as separate programs, which end after a
number of tokens, and refills the slots of finished rows with waiting prompts.
"""

import dataclasses
import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Float, Int

from jaxrlhf.config import Sampling
from jaxrlhf.config.base import constant
from jaxrlhf.models import ModelConfig, empty_cache, forward_cached, lm_logits, place
from jaxrlhf.rollout.sampling import sample
from jaxrlhf.traced import settings
from jaxrlhf.types import KVCache, Params, Prompts, Rollout, Slots, map_layers


@settings()
@dataclass(frozen=True)
class Decoding:
    """The model and the options of drawing tokens from it, for which generation programs are compiled."""

    model: ModelConfig
    sampling: Sampling
    stop_ids: tuple[int, ...]
    pad_id: int


@partial(jax.jit, static_argnames=("model", "stop_ids", "pad_id", "group"))
def generate(
    params: Params,
    model: ModelConfig,
    prompts: Prompts,
    key: Array,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    pad_id: int,
    group: int = 1,
) -> Rollout:
    """Generate up to `sampling.response_length` (R) tokens for every prompt.

    Args:
        params: parameters and `model` as `inference_copy` returns them.
        prompts: left-padded, at least one token each. With `prompts.given`, a prompt ends with the first tokens of its
            response: their columns of the response are not filled, and at most R - given tokens
            are generated.
        stop_ids: tokens that end a response, in addition to `sampling.stop_token_ids`. The stop token is part of the
            response; `pad_id` follows it, with a false mask. Masks depend on stop tokens only: `pad_id` may be sampled
            like any other token, and it may be a stop token.
        group: responses per prompt (n). Each prompt is prefilled once; rows n*i .. n*i + n - 1 are samples
            `prompts.sample` .. `prompts.sample` + n - 1 of prompt i.

    Token t of a response is drawn with fold_in(fold_in(fold_in(key, index), sample), t). So in float32 a response
    depends neither on the rest of the batch nor on its order, unless a rounding error falls on the boundary between two
    tokens. With `sampling.renormalise_logprobs`, `support` of the rollout marks the tokens that could be drawn.
    """
    decoding = Decoding(model, sampling, stop_ids, pad_id)
    slots = start(params, decoding, prompts, key, group)
    length, batch = sampling.response_length, len(slots.count)
    slots = dataclasses.replace(slots, cache=widened(slots.cache, length, model))
    slots = advance(params, decoding, slots, batch, prompts.tokens.shape[1])
    return as_rollout(jnp, prompts, group, slots.tokens, slots.logprobs, slots.count, slots.ended, slots.support)


def widened(cache: KVCache, more: int, model: ModelConfig) -> KVCache:
    """The cache with `more` empty columns."""

    def pad(x: Array, axis: int = 2) -> Array:
        return jnp.pad(x, [(0, more if i == axis else 0) for i in range(4)])

    return dataclasses.replace(
        cache,
        k=map_layers(partial(pad, axis=model.key_columns), cache.k),
        v=map_layers(pad, cache.v),
        positions=jnp.pad(cache.positions, ((0, 0), (0, more))),
        valid=jnp.pad(cache.valid, ((0, 0), (0, more))),
    )


def by_rows(function: Callable[[Array], Array], cache: KVCache) -> KVCache:
    """Apply a function of arrays whose first axis is rows to a cache."""
    return KVCache(
        k=map_layers(function, cache.k),
        v=map_layers(function, cache.v),
        positions=function(cache.positions),
        valid=function(cache.valid),
        states=jax.tree.map(function, cache.states),
    )


def as_rollout(
    xp: Any, prompts: Prompts, group: int, tokens: Any, logprobs: Any, count: Any, ended: Any, support: Any = None
) -> Rollout:
    """Rollout of `group` rows per prompt from fields of their `Slots`; `xp` is the module of the arrays, jnp or np."""
    prompts = jax.tree.map(lambda x: xp.repeat(x, group, axis=0), prompts)
    rows, length = tokens.shape
    columns = xp.arange(length)
    mask = columns < count[:, None]
    if prompts.given is not None:
        mask &= columns >= prompts.given[:, None]
    return Rollout(
        tokens=xp.concatenate([prompts.tokens, tokens], axis=1),
        mask=xp.concatenate([prompts.mask, mask], axis=1),
        response_mask=mask,
        logprobs=logprobs,
        finished=ended,
        index=prompts.index,
        sample=prompts.sample + xp.arange(rows, dtype=np.int32) % group,
        support=support,
    )


def rollout_shapes(decoding: Decoding, prompts: Prompts, group: int) -> Rollout:
    """The shapes of what `generate` returns for prompts, arrays or shapes."""

    def rollout(prompts: Prompts) -> Rollout:
        slots = empty_slots(decoding, len(prompts.index) * group, 0)
        return as_rollout(jnp, prompts, group, slots.tokens, slots.logprobs, slots.count, slots.ended, slots.support)

    return jax.eval_shape(rollout, prompts)


def empty_slots(decoding: Decoding, batch: int, prompt_columns: int, room: int | None = None) -> Slots:
    """`batch` free slots, with cache space for prompts of `prompt_columns` tokens and `room` (None: all) of the
    response."""
    length = decoding.sampling.response_length
    support_shape = batch, length, math.ceil(decoding.model.vocab_size / 8)
    return Slots(
        clock=jnp.int32(0),
        count=jnp.zeros(batch, jnp.int32),
        ended=jnp.ones(batch, bool),
        prompt_length=jnp.zeros(batch, jnp.int32),
        keys=jax.random.split(jax.random.key(0), batch),
        tokens=jnp.full((batch, length), decoding.pad_id, jnp.int32),
        logprobs=jnp.zeros((batch, length), jnp.float32),
        support=jnp.zeros(support_shape, jnp.uint8) if decoding.sampling.renormalise_logprobs else None,
        cache=empty_cache(decoding.model, batch, prompt_columns + (length if room is None else room)),
    )


def start(params: Params, decoding: Decoding, prompts: Prompts, key: Array, group: int) -> Slots:
    """Prefill the prompts and draw the first token of `group` rows of each. The cache has the prompts' columns only."""
    batch, width = prompts.tokens.shape
    positions = jnp.maximum(jnp.cumsum(prompts.mask, axis=1, dtype=jnp.int32) - 1, 0)
    cache = empty_cache(decoding.model, batch, width)
    hidden, cache = forward_cached(params, decoding.model, prompts.tokens, prompts.mask, positions, cache, 0)
    repeat = partial(jnp.repeat, repeats=group, axis=0)
    prompts, hidden, cache = jax.tree.map(repeat, prompts), repeat(hidden[:, -1]), by_rows(repeat, cache)
    rows = batch * group
    samples = prompts.sample + jnp.arange(rows) % group
    given = jnp.zeros(rows, jnp.int32) if prompts.given is None else prompts.given
    slots = dataclasses.replace(
        empty_slots(decoding, rows, 0),
        count=given,
        ended=jnp.zeros(rows, bool),
        prompt_length=jnp.sum(prompts.mask, axis=1, dtype=jnp.int32) - given,
        keys=jax.vmap(lambda i, s: jax.random.fold_in(jax.random.fold_in(key, i), s))(prompts.index, samples),
        cache=cache,
    )
    return draw_tokens(params, decoding, slots, hidden)


def draw_tokens(params: Params, decoding: Decoding, slots: Slots, hidden: Float[Array, "B D"]) -> Slots:
    """Draw the next token of every busy row from its last hidden state."""
    model, sampling = decoding.model, decoding.sampling
    stops = jnp.array(sorted({*decoding.stop_ids, *sampling.stop_token_ids}), jnp.int32)
    allowed = None
    if len(stops) and not constant(sampling.min_length, 0):
        too_short = (slots.count < sampling.min_length)[:, None]
        allowed = ~(too_short & jnp.isin(jnp.arange(model.vocab_size), stops))
    keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.count)
    tokens, logprobs, support = sample(lm_logits(params, model, hidden), keys, sampling, allowed)
    busy, rows = slots.busy, jnp.arange(len(tokens))
    column = jnp.where(busy, slots.count, sampling.response_length)  # out of bounds for idle rows: nothing is written

    def split(array: Array) -> Array:  # left to choose, XLA keeps some whole on every device and gathers each token
        return place(array, model, "rows", *[None] * (array.ndim - 1))

    def write(array: Array, values: Array) -> Array:
        return split(array.at[rows, column].set(values, mode="drop"))

    packed = slots.support
    if packed is not None and support is not None:
        packed = write(packed, jnp.packbits(support, axis=1))
    return dataclasses.replace(
        slots,
        count=split(slots.count + busy),
        ended=split(slots.ended | (busy & jnp.isin(tokens, stops))),
        tokens=write(slots.tokens, tokens),
        logprobs=write(slots.logprobs, logprobs),
        support=packed,
    )


def advance(
    params: Params,
    decoding: Decoding,
    slots: Slots,
    enough: Int[Array, ""] | int,
    prompt_columns: int,
    limit: int | None = None,
) -> Slots:
    """Draw tokens, `limit` at most for a row, until at least `enough` rows are idle. The cache may have fewer than R
    columns after the `prompt_columns` as long as the clock stays below their number, which is not checked."""
    length = decoding.sampling.response_length

    def step(slots: Slots) -> Slots:
        """Feed each row's last token and draw its next one. Idle rows do not change."""
        token = jnp.take_along_axis(slots.tokens, jnp.maximum(slots.count - 1, 0)[:, None], axis=1)
        positions = (slots.prompt_length + slots.count - 1)[:, None]
        column = prompt_columns + slots.clock % length
        hidden, cache = forward_cached(
            params, decoding.model, token, slots.busy[:, None], positions, slots.cache, column
        )
        slots = dataclasses.replace(slots, cache=cache, clock=slots.clock + 1)
        return draw_tokens(params, decoding, slots, hidden[:, 0])

    end = None if limit is None else slots.clock + limit

    def unfinished(slots: Slots) -> Array:
        waiting = jnp.sum(~slots.busy) < enough
        return waiting if end is None else waiting & (slots.clock < end)

    return lax.while_loop(unfinished, step, slots)


def trim(rollout: Rollout) -> Rollout:
    """Drop trailing response columns that no row uses, halving R as often as possible.

    R is halved rather than cut to the longest response to bound the number of shapes: every program that takes a
    rollout is compiled once per shape.
    """
    columns = rollout.response_mask.shape[1]
    size, longest = columns, int(jnp.max(jnp.sum(rollout.mask[:, -columns:], axis=1)))
    while size % 2 == 0 and size // 2 >= longest:
        size //= 2
    if size == columns:
        return rollout
    width = rollout.tokens.shape[1] - columns + size
    return dataclasses.replace(
        rollout,
        tokens=rollout.tokens[:, :width],
        mask=rollout.mask[:, :width],
        response_mask=rollout.response_mask[:, :size],
        logprobs=rollout.logprobs[:, :size],
        support=None if rollout.support is None else rollout.support[:, :size],
        turn_rewards=None if rollout.turn_rewards is None else rollout.turn_rewards[:, :size],
    )

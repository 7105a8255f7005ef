"""Autoregressive generation: one prefill, then a loop that draws one token per row and step.

`generate` runs a whole batch as one program. engine.py calls the same parts as separate programs and refills the slots
of finished rows with waiting prompts.
"""

import dataclasses
import math
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from jaxrlhf.config import Sampling
from jaxrlhf.models import ModelConfig, empty_cache, forward_cached, lm_logits
from jaxrlhf.rollout.sampling import sample
from jaxrlhf.types import KVCache, Params, Prompts, Rollout, Slots


@partial(jax.jit, static_argnames=("model", "sampling", "stop_ids", "pad_id", "group"))
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
        prompts: left-padded, at least one token each.
        stop_ids: tokens that end a response, in addition to `sampling.stop_token_ids`. The stop token is part of the
            response; `pad_id` follows it, with a false mask. Masks depend on stop tokens only: `pad_id` may be sampled
            like any other token, and it may be a stop token.
        group: responses per prompt (n). Each prompt is prefilled once; rows n*i .. n*i + n - 1 are samples
            `prompts.sample` .. `prompts.sample` + n - 1 of prompt i.

    Token t of a row is drawn with fold_in(fold_in(fold_in(key, index), sample), t). In float32 a response therefore
    depends neither on the rest of the batch nor on its order, unless a rounding error falls on the boundary between two
    tokens. With `sampling.renormalise_logprobs`, `support` of the rollout marks the tokens that could be drawn.
    """
    length = sampling.response_length
    hidden, cache = prefill(params, model, prompts)
    padding = ((0, 0), (0, 0), (0, length), (0, 0))
    cache = KVCache(
        k=tuple(jnp.pad(k, padding) for k in cache.k),
        v=tuple(jnp.pad(v, padding) for v in cache.v),
        positions=jnp.pad(cache.positions, ((0, 0), (0, length))),
        valid=jnp.pad(cache.valid, ((0, 0), (0, length))),
    )
    prompts, hidden, cache = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), (prompts, hidden, cache))
    batch = prompts.index.shape[0]
    samples = prompts.sample + jnp.arange(batch) % group
    slots = dataclasses.replace(
        empty_slots(model, batch, 0, sampling, pad_id),
        ended=jnp.zeros(batch, bool),
        prompt_length=jnp.sum(prompts.mask, axis=1, dtype=jnp.int32),
        keys=row_keys(key, prompts.index, samples),
        cache=cache,
    )
    slots = draw_tokens(params, model, slots, hidden, sampling, stop_ids)
    slots = advance(params, model, slots, batch, sampling, stop_ids)
    mask = jnp.arange(length) < slots.count[:, None]
    return Rollout(
        tokens=jnp.concatenate([prompts.tokens, slots.tokens], axis=1),
        mask=jnp.concatenate([prompts.mask, mask], axis=1),
        response_mask=mask,
        logprobs=slots.logprobs,
        finished=slots.ended,
        index=prompts.index,
        sample=samples,
        support=slots.support,
    )


def row_keys(key: Array, index: Int[Array, " B"], samples: Int[Array, " B"]) -> Array:
    """Random key of each row [B], determined by `key`, its prompt index and its sample number."""
    return jax.vmap(lambda i, s: jax.random.fold_in(jax.random.fold_in(key, i), s))(index, samples)


def empty_slots(model: ModelConfig, batch: int, prompt_columns: int, sampling: Sampling, pad_id: int) -> Slots:
    """`batch` free slots, with cache space for prompts of `prompt_columns` tokens."""
    length = sampling.response_length
    support_shape = batch, length, math.ceil(model.vocab_size / 8)
    return Slots(
        clock=jnp.int32(0),
        count=jnp.zeros(batch, jnp.int32),
        ended=jnp.ones(batch, bool),
        prompt_length=jnp.zeros(batch, jnp.int32),
        keys=jax.random.split(jax.random.key(0), batch),
        tokens=jnp.full((batch, length), pad_id, jnp.int32),
        logprobs=jnp.zeros((batch, length), jnp.float32),
        support=jnp.zeros(support_shape, jnp.uint8) if sampling.renormalise_logprobs else None,
        cache=empty_cache(model, batch, prompt_columns + length),
    )


def prefill(params: Params, model: ModelConfig, prompts: Prompts) -> tuple[Float[Array, "B D"], KVCache]:
    """Last hidden state of each prompt and a cache of its P columns."""
    batch, width = prompts.tokens.shape
    positions = jnp.maximum(jnp.cumsum(prompts.mask, axis=1, dtype=jnp.int32) - 1, 0)
    cache = empty_cache(model, batch, width)
    hidden, cache = forward_cached(params, model, prompts.tokens, prompts.mask, positions, cache, 0)
    return hidden[:, -1], cache


def draw_tokens(
    params: Params,
    model: ModelConfig,
    slots: Slots,
    hidden: Float[Array, "B D"],
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Slots:
    """Draw the next token of every busy row from its last hidden state."""
    stops = jnp.array(sorted({*stop_ids, *sampling.stop_token_ids}), jnp.int32)
    allowed = None
    if len(stops) and sampling.min_length:
        too_short = (slots.count < sampling.min_length)[:, None]
        allowed = ~(too_short & jnp.isin(jnp.arange(model.vocab_size), stops))
    keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.count)
    tokens, logprobs, support = sample(lm_logits(params, model, hidden), keys, sampling, allowed)
    busy, rows = slots.busy, jnp.arange(len(tokens))
    column = jnp.where(busy, slots.count, sampling.response_length)  # out of bounds for idle rows: nothing is written

    def write(array: Array, values: Array) -> Array:
        return array.at[rows, column].set(values, mode="drop")

    packed = slots.support
    if packed is not None and support is not None:
        packed = write(packed, jnp.packbits(support, axis=1))
    return dataclasses.replace(
        slots,
        count=slots.count + busy,
        ended=slots.ended | (busy & jnp.isin(tokens, stops)),
        tokens=write(slots.tokens, tokens),
        logprobs=write(slots.logprobs, logprobs),
        support=packed,
    )


def advance(
    params: Params,
    model: ModelConfig,
    slots: Slots,
    enough: Int[Array, ""] | int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Slots:
    """Draw tokens until at least `enough` rows are idle."""
    length = sampling.response_length
    prompt_columns = slots.cache.valid.shape[1] - length

    def step(slots: Slots) -> Slots:
        """Feed each row's last token and draw its next one. Idle rows do not change."""
        token = jnp.take_along_axis(slots.tokens, jnp.maximum(slots.count - 1, 0)[:, None], axis=1)
        positions = (slots.prompt_length + slots.count - 1)[:, None]
        column = prompt_columns + slots.clock % length
        hidden, cache = forward_cached(params, model, token, slots.busy[:, None], positions, slots.cache, column)
        slots = dataclasses.replace(slots, cache=cache, clock=slots.clock + 1)
        return draw_tokens(params, model, slots, hidden[:, 0], sampling, stop_ids)

    return lax.while_loop(lambda slots: jnp.sum(~slots.busy) < enough, step, slots)


def trim(rollout: Rollout) -> Rollout:
    """Drop trailing response columns that no row uses, halving R as often as possible.

    R is halved rather than cut to the longest response to bound the number of shapes: every program that takes a
    rollout is compiled once per shape.
    """
    columns = rollout.response_mask.shape[1]
    size, longest = columns, int(jnp.max(jnp.sum(rollout.response_mask, axis=1)))
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
    )

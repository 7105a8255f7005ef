"""Prompts in, responses out: a prefill, and a loop that draws a token for every row until enough rows have ended.

`generate` answers a batch in one program. `engine.py` runs the same parts as programs of their own, and gives the place
of a row that has ended to the next prompt.
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
    """Continue every prompt by at most `sampling.response_length` tokens (R). `params` are those of `inference_copy`.

    A row ends with the first token out of `stop_ids` (or `sampling.stop_token_ids`). That token is part of the
    response; what follows is `pad_id` under a false mask. Masks come from this alone: a `pad_id` that was sampled is a
    token like any other, and it may be a stop token. Prompts are left-padded and have at least one token.

    With `group` n, each prompt is read once and answered n times: rows n*i .. n*i + n - 1 are samples `prompts.sample`
    .. `prompts.sample` + n - 1 of prompt i. With `sampling.renormalise_logprobs` the rollout says which tokens could be
    drawn, in `support`.

    Token t of a row is drawn with fold_in(fold_in(fold_in(key, index), sample), t): in float32, up to a rounding error
    that falls on the edge between two tokens, a response depends neither on the rest of the batch nor on its order.
    """
    length = sampling.response_length
    hidden, cache = prefill(params, model, prompts)
    room = ((0, 0), (0, 0), (0, length), (0, 0))
    cache = KVCache(
        k=tuple(jnp.pad(k, room) for k in cache.k),
        v=tuple(jnp.pad(v, room) for v in cache.v),
        positions=jnp.pad(cache.positions, ((0, 0), (0, length))),
        valid=jnp.pad(cache.valid, ((0, 0), (0, length))),
    )
    prompts, hidden, cache = jax.tree.map(lambda x: jnp.repeat(x, group, axis=0), (prompts, hidden, cache))
    batch = prompts.index.shape[0]
    slots = dataclasses.replace(
        empty_slots(model, batch, 0, sampling, pad_id),
        limit=jnp.full(batch, length),
        ended=jnp.zeros(batch, bool),
        prompt_length=jnp.sum(prompts.mask, axis=1, dtype=jnp.int32),
        keys=row_keys(key, prompts.index, prompts.sample + jnp.arange(batch) % group),
        cache=cache,
    )
    slots = draw(params, model, slots, hidden, sampling, stop_ids)
    slots = advance(params, model, slots, length, batch, sampling, stop_ids)
    mask = jnp.arange(length) < slots.count[:, None]
    return Rollout(
        tokens=jnp.concatenate([prompts.tokens, slots.tokens], axis=1),
        mask=jnp.concatenate([prompts.mask, mask], axis=1),
        response_mask=mask,
        logprobs=slots.logprobs,
        finished=slots.ended,
        index=prompts.index,
        sample=prompts.sample + jnp.arange(batch) % group,
        support=slots.support,
    )


def row_keys(key: Array, index: Int[Array, " B"], which: Int[Array, " B"]) -> Array:
    """The random key of each row [B], a function of its prompt and its sample number alone."""
    return jax.vmap(lambda i, s: jax.random.fold_in(jax.random.fold_in(key, i), s))(index, which)


def empty_slots(model: ModelConfig, batch: int, prompt_columns: int, sampling: Sampling, pad_id: int) -> Slots:
    """`batch` slots that nobody occupies, with room for prompts of `prompt_columns` tokens."""
    length = sampling.response_length
    bits = batch, length, math.ceil(model.vocab_size / 8)
    return Slots(
        clock=jnp.int32(0),
        count=jnp.zeros(batch, jnp.int32),
        limit=jnp.zeros(batch, jnp.int32),
        ended=jnp.ones(batch, bool),
        prompt_length=jnp.zeros(batch, jnp.int32),
        keys=jax.random.split(jax.random.key(0), batch),
        tokens=jnp.full((batch, length), pad_id, jnp.int32),
        logprobs=jnp.zeros((batch, length), jnp.float32),
        support=jnp.zeros(bits, jnp.uint8) if sampling.renormalise_logprobs else None,
        cache=empty_cache(model, batch, prompt_columns + length),
    )


def prefill(params: Params, model: ModelConfig, prompts: Prompts) -> tuple[Float[Array, "B D"], KVCache]:
    """The hidden state that predicts each prompt's first response token, and a cache of the prompts' P columns."""
    batch, width = prompts.tokens.shape
    positions = jnp.maximum(jnp.cumsum(prompts.mask, axis=1, dtype=jnp.int32) - 1, 0)
    cache = empty_cache(model, batch, width)
    hidden, cache = forward_cached(params, model, prompts.tokens, prompts.mask, positions, cache, 0)
    return hidden[:, -1], cache


def draw(
    params: Params,
    model: ModelConfig,
    slots: Slots,
    hidden: Float[Array, "B D"],
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Slots:
    """The next token of every busy row, from the hidden state before it."""
    stops = jnp.array(sorted({*stop_ids, *sampling.stop_token_ids}), jnp.int32)
    allowed = None
    if len(stops) and sampling.min_length:
        early = (slots.count < sampling.min_length)[:, None]
        allowed = ~(early & jnp.isin(jnp.arange(model.vocab_size), stops))
    keys = jax.vmap(jax.random.fold_in)(slots.keys, slots.count)
    tokens, logprobs, support = sample(lm_logits(params, model, hidden), keys, sampling, allowed)
    busy, rows = slots.busy, jnp.arange(len(tokens))
    column = jnp.where(busy, slots.count, sampling.response_length)  # a column that is not there: nothing is written

    def put(x: Array, values: Array) -> Array:
        return x.at[rows, column].set(values, mode="drop")

    kept = slots.support
    if kept is not None and support is not None:
        kept = put(kept, jnp.packbits(support, axis=1))
    return dataclasses.replace(
        slots,
        count=slots.count + busy,
        ended=slots.ended | (busy & jnp.isin(tokens, stops)),
        tokens=put(slots.tokens, tokens),
        logprobs=put(slots.logprobs, logprobs),
        support=kept,
    )


def advance(
    params: Params,
    model: ModelConfig,
    slots: Slots,
    steps: Int[Array, ""] | int,
    enough: Int[Array, ""] | int,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
) -> Slots:
    """Draw tokens until `enough` rows are not busy, and for at most `steps` ticks."""
    length = sampling.response_length
    prompt_columns = slots.cache.valid.shape[1] - length

    def tick(state: tuple[Array, Slots]) -> tuple[Array, Slots]:
        """Read each row's last token into the cache, draw the next. Rows that have ended change nothing."""
        done, slots = state
        token = jnp.take_along_axis(slots.tokens, jnp.maximum(slots.count - 1, 0)[:, None], axis=1)
        positions = (slots.prompt_length + slots.count - 1)[:, None]
        hidden, cache = forward_cached(
            params,
            model,
            token,
            slots.busy[:, None],
            positions,
            slots.cache,
            prompt_columns + slots.clock % length,
        )
        slots = dataclasses.replace(slots, cache=cache, clock=slots.clock + 1)
        return done + 1, draw(params, model, slots, hidden[:, 0], sampling, stop_ids)

    def going(state: tuple[Array, Slots]) -> Array:
        done, slots = state
        idle = jnp.sum(~slots.busy)
        return (done < steps) & (idle < enough)

    return lax.while_loop(going, tick, (jnp.int32(0), slots))[1]


def trim(rollout: Rollout) -> Rollout:
    """The rollout without the response columns that no row has reached, R halved as often as that allows.

    Halved and not cut to the longest, so that few shapes occur: whatever takes a rollout is compiled for each.
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

"""Prompts in, responses out: one jitted program of a prefill and a decode loop that leaves when every row has ended."""

import math
from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array

from jaxrlhf.config import Sampling
from jaxrlhf.models import KVCache, ModelConfig, empty_cache, forward_cached, lm_logits, unstack
from jaxrlhf.rollout.sampling import sample
from jaxrlhf.types import Params, Prompts, Rollout


class _Loop(NamedTuple):
    t: Array  # int32 []   response tokens drawn so far
    tokens: Array  # int32 [B, R]
    mask: Array  # bool [B, R]
    logprobs: Array  # f32 [B, R]
    finished: Array  # bool [B]
    support: Array | None  # uint8 [B, R, ceil(V / 8)]
    cache: KVCache


@partial(jax.jit, static_argnames=("model", "sampling", "stop_ids", "pad_id"))
def generate(
    params: Params,
    model: ModelConfig,
    prompts: Prompts,
    key: Array,
    sampling: Sampling,
    stop_ids: tuple[int, ...],
    pad_id: int,
) -> Rollout:
    """Continue every prompt by at most `sampling.response_length` tokens (R).

    A row ends with the first token out of `stop_ids` (or `sampling.stop_token_ids`). That token is part of the
    response; what follows is `pad_id` under a false mask. Masks come from this alone: a `pad_id` that was sampled is a
    token like any other, and it may be a stop token. Prompts are left-padded and have at least one token.

    With `sampling.renormalise_logprobs` the rollout says which tokens could be drawn, in `support`.

    Token t of a row is drawn with fold_in(fold_in(fold_in(key, index), sample), t): in float32, up to a rounding error
    that falls on the edge between two tokens, a response depends neither on the rest of the batch nor on its order.
    """
    batch, width = prompts.tokens.shape
    length = sampling.response_length
    stops = tuple(sorted({*stop_ids, *sampling.stop_token_ids}))
    params = unstack(params, model)
    row_keys = jax.vmap(lambda i, s: jax.random.fold_in(jax.random.fold_in(key, i), s))(prompts.index, prompts.sample)
    prompt_lengths = jnp.sum(prompts.mask, axis=1, dtype=jnp.int32)

    def extend(loop: _Loop, hidden: Array) -> _Loop:
        """Draw token t from the hidden state [B, D] before it."""
        keys = jax.vmap(jax.random.fold_in, (0, None))(row_keys, loop.t)
        logits = lm_logits(params, model, hidden)
        tokens, logprobs, support = sample(logits, keys, sampling, _allowed(loop.t, stops, sampling, model.vocab_size))
        going = ~loop.finished
        stopped = jnp.isin(tokens, jnp.array(stops, jnp.int32))

        def put(x, column):
            return jax.lax.dynamic_update_slice_in_dim(x, column[:, None], loop.t, axis=1)

        return _Loop(
            t=loop.t + 1,
            tokens=put(loop.tokens, jnp.where(going, tokens, pad_id)),
            mask=put(loop.mask, going),
            logprobs=put(loop.logprobs, jnp.where(going, logprobs, 0.0)),
            finished=loop.finished | stopped,
            support=None if support is None else put(loop.support, jnp.packbits(support & going[:, None], axis=1)),
            cache=loop.cache,
        )

    def step(loop: _Loop) -> _Loop:
        """Read token t - 1 into the cache, draw token t. Rows that have ended read padding and change nothing."""
        before = loop.t - 1
        token, real = (jax.lax.dynamic_slice_in_dim(x, before, 1, axis=1) for x in (loop.tokens, loop.mask))
        positions = prompt_lengths[:, None] + before
        hidden, cache = forward_cached(params, model, token, real, positions, loop.cache, width + before)
        return extend(loop._replace(cache=cache), hidden[:, 0])

    positions = jnp.maximum(jnp.cumsum(prompts.mask, axis=1, dtype=jnp.int32) - 1, 0)
    cache = empty_cache(model, batch, width + length, model.dtype)
    hidden, cache = forward_cached(params, model, prompts.tokens, prompts.mask, positions, cache, 0)
    bits = batch, length, math.ceil(model.vocab_size / 8)
    loop = _Loop(
        t=jnp.int32(0),
        tokens=jnp.full((batch, length), pad_id, jnp.int32),
        mask=jnp.zeros((batch, length), bool),
        logprobs=jnp.zeros((batch, length), jnp.float32),
        finished=jnp.zeros(batch, bool),
        support=jnp.zeros(bits, jnp.uint8) if sampling.renormalise_logprobs else None,
        cache=cache,
    )
    loop = jax.lax.while_loop(lambda x: (x.t < length) & ~jnp.all(x.finished), step, extend(loop, hidden[:, -1]))
    return Rollout(
        tokens=jnp.concatenate([prompts.tokens, loop.tokens], axis=1),
        mask=jnp.concatenate([prompts.mask, loop.mask], axis=1),
        response_mask=loop.mask,
        logprobs=loop.logprobs,
        finished=loop.finished,
        index=prompts.index,
        sample=prompts.sample,
        support=loop.support,
    )


def _allowed(t: Array, stops: tuple[int, ...], sampling: Sampling, vocabulary: int) -> Array | None:
    """No stop token among the first `min_length` tokens."""
    if not stops or not sampling.min_length:
        return None
    return (t >= sampling.min_length) | ~jnp.isin(jnp.arange(vocabulary), jnp.array(stops))

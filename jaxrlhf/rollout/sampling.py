"""Next-token sampling: temperature, top-k, top-p and min-p filters, and an exact inverse-CDF draw.

Filters are applied in the order of transformers: banned tokens, temperature, top-k, top-p among the tokens that top-k
kept, min-p. One difference: tokens that tie at the top-k or top-p threshold are all kept, where transformers keeps ties
in top-k but cuts through them, by sort order, in top-p. Tokens tie when their float32 probabilities are equal.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrlhf.config import Sampling
from jaxrlhf.config.base import constant
from jaxrlhf.errors import ConfigError

BLOCK = 256
"""Tokens per block of the inverse CDF, about sqrt(V): both of its levels then cost the same."""


def check_sampling(sampling: Sampling, vocabulary: int) -> None:
    """Raise ConfigError for options that do not fit a model with `vocabulary` tokens."""
    if sampling.top_k > vocabulary:
        raise ConfigError(
            f"sampling.top_k is {sampling.top_k}, but the model has {vocabulary} tokens; 0 switches top-k off"
        )
    unknown = [token for token in sampling.stop_token_ids if token >= vocabulary]
    if unknown:
        raise ConfigError(f"sampling.stop_token_ids: {unknown[0]} is not a token; token ids are 0 to {vocabulary - 1}")


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling, allowed: Bool[Array, "#B V"] | None
) -> tuple[Int[Array, " B"], Float[Array, " B"], Bool[Array, "B V"] | None]:
    """Draw one token per row from the row's logits and key.

    `allowed` bans tokens before any filter (None: no ban). With `sampling.greedy` the most likely allowed token is
    taken, the first of equals.

    Returns:
        (token, log-probability, support). The log-probability is that of softmax(logits / temperature) over the whole
        vocabulary, before bans and filters, and the support is None. With `sampling.renormalise_logprobs` the support
        marks the tokens left by bans and filters, and the log-probability is normalised over them: it is that of the
        distribution drawn from. `token_logprobs` returns the same value for the same token and support.
    """
    scaled = logits * (1 / sampling.temperature)
    candidates = scaled if allowed is None else jnp.where(allowed, scaled, -jnp.inf)
    top = jnp.max(candidates, axis=1, keepdims=True)
    odds = apply_filters(jnp.exp(candidates - top), sampling)
    if sampling.greedy:
        # not jnp.argmax, for which XLA has no fast CPU code
        tokens = jnp.min(jnp.where(candidates == top, jnp.arange(odds.shape[1]), odds.shape[1] - 1), axis=1)
        total = jnp.sum(odds, axis=1)
    else:
        tokens, total = inverse_cdf(odds, jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys))
    filtered = any(filters_of(sampling)) or allowed is not None
    if filtered and not sampling.renormalise_logprobs:
        normaliser = jax.nn.logsumexp(scaled, axis=1)
    else:  # normalised over the tokens drawn from, whose sum is known
        normaliser = top[:, 0] + jnp.log(total)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=1)[:, 0]
    return tokens.astype(jnp.int32), chosen - normaliser, odds > 0 if sampling.renormalise_logprobs else None


def filters_of(sampling: Sampling) -> tuple[bool, bool, bool]:
    """True for each of top-k, top-p and min-p that may remove tokens."""
    return not constant(sampling.top_k, 0), not constant(sampling.top_p, 1), not constant(sampling.min_p, 0)


def apply_filters(odds: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """Set `odds` (probabilities, each row divided by its largest) to 0 for tokens removed by top-k, top-p and min-p.

    A token is kept if fewer than top_k tokens are more likely, if the more likely ones together hold less than top_p of
    the mass left by top-k, and if it is at least min_p times as likely as the most likely one, which is always kept.
    """
    top_k, top_p, min_p = filters_of(sampling)
    if top_k:
        threshold = _threshold(odds, lambda above: jnp.sum(above, axis=1) >= sampling.top_k)
        odds = jnp.where(_bits(odds) > threshold[:, None], odds, 0)
    if top_p:
        mass = sampling.top_p * jnp.sum(odds, axis=1)
        threshold = _threshold(odds, lambda above: jnp.sum(jnp.where(above, odds, 0), axis=1) >= mass)
        odds = jnp.where(_bits(odds) > threshold[:, None], odds, 0)
    if min_p:
        odds = jnp.where(odds >= sampling.min_p, odds, 0)
    return odds


def _threshold(odds: Array, enough: Callable[[Array], Array]) -> Array:
    """Largest x (float bits, [B]) for which the tokens with odds > x are `enough`, else 0, by bisection without a sort.

    Floats in [0, 1] have 30-bit patterns in the order of their values. 30 passes are exact, as `enough` can only become
    false as x grows: sums of one shape round monotonically.
    """
    bits = _bits(odds)

    def refine(i, threshold):
        higher = threshold | (1 << (29 - i))
        return jnp.where(enough(bits > higher[:, None]), higher, threshold)

    return jax.lax.fori_loop(0, 30, refine, jnp.zeros(odds.shape[0], jnp.int32))


def _bits(odds: Array) -> Array:
    return jax.lax.bitcast_convert_type(odds, jnp.int32)


def inverse_cdf(
    odds: Float[Array, "B V"], uniforms: Float[Array, "B 2"]
) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Draw a token per row in two levels, a block of tokens and a token in it; returns tokens and the sums of `odds`.

    A float32 uniform has 23 random bits, which over 150,000 tokens would distort a probability of 1e-5 by a percent;
    over the few hundred entries of a level they are enough. A token with odds 0 is never drawn.
    """
    batch, size = odds.shape
    blocks = jnp.pad(odds, ((0, 0), (0, -size % BLOCK))).reshape(batch, -1, BLOCK)
    sums = jnp.sum(blocks, axis=2)
    block = _first_above(sums, uniforms[:, 0])
    weights = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _first_above(weights, uniforms[:, 1]), jnp.sum(sums, axis=1)


def _first_above(weights: Array, uniform: Array) -> Array:
    """Index of the first entry whose cumulative weight exceeds uniform * total.

    Entries of weight 0 are skipped, as rounding in a parallel cumulative sum may increase it there. If rounding leaves
    no entry, the heaviest is taken.
    """
    cumulative = jnp.cumsum(weights, axis=1)
    reached = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weights > 0)
    return jnp.where(jnp.any(reached, axis=1), jnp.argmax(reached, axis=1), jnp.argmax(weights, axis=1))

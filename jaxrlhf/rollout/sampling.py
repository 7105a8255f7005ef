"""Drawing the next token: temperature, filters, and an exact draw by inverse CDF.

Filters come in the order of transformers: banned tokens out, temperature, top-k, top-p on what top-k left, min-p. Where
they differ: tokens that tie at the edge of top-k or top-p are all kept (transformers keeps ties in top-k and cuts
through them, by sort order, in top-p). Tokens tie when their float32 probabilities are equal.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrlhf.config import Sampling
from jaxrlhf.errors import ConfigError

BLOCK = 256  # about the square root of V: the two levels of the inverse CDF then cost the same


def check_sampling(sampling: Sampling, vocabulary: int) -> None:
    """Refuse what a model with `vocabulary` tokens cannot do. Raises ConfigError."""
    if sampling.top_k > vocabulary:
        raise ConfigError(f"sampling.top_k is {sampling.top_k}, the model has {vocabulary} tokens; 0 switches it off")
    beyond = [token for token in sampling.stop_token_ids if token >= vocabulary]
    if beyond:
        raise ConfigError(f"sampling.stop_token_ids: {beyond[0]} is not a token; the model's are 0 to {vocabulary - 1}")


def sample(
    logits: Float[Array, "B V"], keys: Key[Array, " B"], sampling: Sampling, allowed: Bool[Array, "#B V"] | None
) -> tuple[Int[Array, " B"], Float[Array, " B"], Bool[Array, "B V"] | None]:
    """One token per row, its log-probability, and its support; a function of the row's logits and key alone.

    The log-probability is that of softmax(logits / temperature) over the whole vocabulary, before any filter, and the
    support is None. With `sampling.renormalise_logprobs`, the support is the tokens that bans and filters left, and the
    log-probability is over those: that of the distribution drawn from. Either is what `token_logprobs` gives for the
    same token and support. `allowed` bans tokens (None: none) ahead of every filter. With `sampling.greedy` the
    likeliest allowed token is taken, of equals the first.
    """
    scaled = logits / sampling.temperature
    candidates = scaled if allowed is None else jnp.where(allowed, scaled, -jnp.inf)
    top = jnp.max(candidates, axis=1, keepdims=True)
    odds = filtered(jnp.exp(candidates - top), sampling)
    if sampling.greedy:
        # argmax by hand: XLA's has no fast code on CPUs
        tokens = jnp.min(jnp.where(candidates == top, jnp.arange(odds.shape[1]), odds.shape[1] - 1), axis=1)
        total = jnp.sum(odds, axis=1)
    else:
        tokens, total = draw(odds, jax.vmap(lambda key: jax.random.uniform(key, (2,)))(keys))
    if not sampling.renormalise_logprobs and (_filters(sampling) or allowed is not None):
        normaliser = jax.nn.logsumexp(scaled, axis=1)
    else:  # what was drawn from is what the log-probability is over: its sum is known
        normaliser = top[:, 0] + jnp.log(total)
    chosen = jnp.take_along_axis(scaled, tokens[:, None], axis=1)[:, 0]
    return tokens.astype(jnp.int32), chosen - normaliser, odds > 0 if sampling.renormalise_logprobs else None


def _filters(sampling: Sampling) -> bool:
    return bool(sampling.top_k or sampling.top_p < 1 or sampling.min_p)


def filtered(odds: Float[Array, "B V"], sampling: Sampling) -> Float[Array, "B V"]:
    """`odds` (probabilities, each row divided by its largest) with 0 for the tokens that the filters remove.

    A token stays if fewer than top_k tokens are likelier, if the likelier ones together hold less than top_p of what
    top-k left, and if it is at least min_p times as likely as the likeliest. The likeliest token always stays.
    """
    if 0 < sampling.top_k < odds.shape[1]:
        edge = _edge(odds, lambda above: jnp.sum(above, axis=1) >= sampling.top_k)
        odds = jnp.where(_bits(odds) > edge[:, None], odds, 0)
    if sampling.top_p < 1:
        enough = sampling.top_p * jnp.sum(odds, axis=1)
        edge = _edge(odds, lambda above: jnp.sum(jnp.where(above, odds, 0), axis=1) >= enough)
        odds = jnp.where(_bits(odds) > edge[:, None], odds, 0)
    if sampling.min_p > 0:
        odds = jnp.where(odds >= sampling.min_p, odds, 0)
    return odds


def _edge(odds: Array, enough: Callable[[Array], Array]) -> Array:
    """The largest x (as float bits, [B]) such that the tokens with odds > x are enough, else 0: bisection, no sort.

    The bit patterns of floats in [0, 1] have 30 bits and the order of the floats. Exact in 30 passes, because `enough`
    can only turn false as x grows: sums of the same shape round monotonically.
    """
    bits = _bits(odds)

    def refine(i, edge):
        higher = edge | (1 << (29 - i))
        return jnp.where(enough(bits > higher[:, None]), higher, edge)

    return jax.lax.fori_loop(0, 30, refine, jnp.zeros(odds.shape[0], jnp.int32))


def _bits(odds: Array) -> Array:
    return jax.lax.bitcast_convert_type(odds, jnp.int32)


def draw(odds: Float[Array, "B V"], uniforms: Float[Array, "B 2"]) -> tuple[Int[Array, " B"], Float[Array, " B"]]:
    """Inverse CDF in two levels, and the sum of the odds: the first part of a row's random number picks a block of
    tokens, the second a token in it.

    A float32 has 23 random bits. Spread over 150 000 tokens they would misstate each probability of 1e-5 by a percent;
    over one of two levels with some hundred entries each they do not. A token with odds 0 is never drawn.
    """
    batch, size = odds.shape
    blocks = jnp.pad(odds, ((0, 0), (0, -size % BLOCK))).reshape(batch, -1, BLOCK)
    sums = jnp.sum(blocks, axis=2)
    block = _first_above(sums, uniforms[:, 0])
    inside = jnp.take_along_axis(blocks, block[:, None, None], axis=1)[:, 0]
    return block * BLOCK + _first_above(inside, uniforms[:, 1]), jnp.sum(sums, axis=1)


def _first_above(weights: Array, uniform: Array) -> Array:
    """The first entry whose cumulative weight exceeds uniform * total.

    A parallel cumulative sum may creep up over an entry of weight 0, by rounding: such entries are passed over.
    Should rounding leave none, the heaviest is taken.
    """
    cumulative = jnp.cumsum(weights, axis=1)
    reached = (cumulative > uniform[:, None] * cumulative[:, -1:]) & (weights > 0)
    return jnp.where(jnp.any(reached, axis=1), jnp.argmax(reached, axis=1), jnp.argmax(weights, axis=1))

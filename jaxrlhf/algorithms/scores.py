"""Shaping of sequence scores before they become rewards: normalisation, scale, clipping and length penalties."""

import functools
from typing import NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.advantages import VARIANCE_FLOOR
from jaxrlhf.algorithms.masked import Scalar
from jaxrlhf.config import Scores
from jaxrlhf.config.base import constant


class ScoreStats(NamedTuple):
    """Running statistics of the scores (Welford): number, mean, and sum of squared deviations from the mean."""

    seen: Float[Array, ""]
    mean: Float[Array, ""]
    squares: Float[Array, ""]

    def add(self, scores: Float[Array, " B"]) -> "ScoreStats":
        """Add the finite scores of a batch (Chan, Golub and LeVeque 1983, eq. 2.1)."""
        chex.assert_rank(scores, 1)
        finite = jnp.isfinite(scores)
        n = jnp.sum(finite).astype(jnp.float32)
        mean = jnp.sum(jnp.where(finite, scores, 0.0)) / jnp.maximum(n, 1)
        squares = jnp.sum(jnp.square(jnp.where(finite, scores - mean, 0.0)))
        total = jnp.maximum(self.seen + n, 1)
        shift = mean - self.mean
        return ScoreStats(
            self.seen + n,
            self.mean + shift * n / total,
            self.squares + squares + jnp.square(shift) * self.seen * n / total,
        )

    def normalise(self, scores: Float[Array, " B"]) -> Float[Array, " B"]:
        """(score - mean) / standard deviation."""
        chex.assert_rank(scores, 1)
        variance = self.squares / jnp.maximum(self.seen - 1, 1)
        return (scores - self.mean) / jnp.sqrt(variance + VARIANCE_FLOOR)


def no_stats() -> ScoreStats:
    """Statistics of no scores."""
    return ScoreStats(*(jnp.zeros((), jnp.float32) for _ in ScoreStats._fields))


def overlong_penalty(lengths: Float[Array, " B"], longest: int, buffer: Scalar, penalty: Scalar) -> Float[Array, " B"]:
    """Soft penalty (<= 0) on responses close to the length limit (https://arxiv.org/abs/2503.14476, eq. 13).

    0 up to `longest` - `buffer` tokens, then linear down to -`penalty` at `longest`.
    """
    chex.assert_rank(lengths, 1)
    over = (lengths - (longest - buffer)) / jnp.maximum(buffer, 1)
    return jnp.zeros_like(lengths) if constant(buffer, 0) else -penalty * jnp.clip(over, 0.0, 1.0)


def missing_eos_penalty(finished: Bool[Array, " B"], penalty: Scalar) -> Float[Array, " B"]:
    """-`penalty` for responses that were truncated, 0 for finished ones."""
    chex.assert_rank(finished, 1)
    return jnp.where(finished, 0.0, -penalty)


@functools.partial(jax.jit, static_argnames="longest")
def shaped(
    scores: Float[Array, " B"],
    mask: Bool[Array, "B R"],
    finished: Bool[Array, " B"],
    stats: ScoreStats,
    *,
    config: Scores,
    longest: int,
) -> tuple[Float[Array, " B"], ScoreStats]:
    """Shape the scores as `config` says; returns them and the updated statistics. `longest` is the response limit.

    The scores of rows without real tokens are not part of the statistics.
    """
    chex.assert_rank(mask, 2)
    chex.assert_shape([scores, finished], mask.shape[:1])
    if config.normalise == "running":
        stats = stats.add(jnp.where(masked.rows(mask), scores, jnp.nan))
    if config.normalise != "none":
        scores = stats.normalise(scores)
    scores = scores * config.scale + config.shift
    if config.clip is not None:
        scores = jnp.clip(scores, -config.clip, config.clip)
    lengths = jnp.sum(mask, axis=1).astype(jnp.float32)
    scores += overlong_penalty(lengths, longest, config.overlong_buffer, config.overlong_penalty)
    return scores + missing_eos_penalty(finished, config.missing_eos_penalty), stats

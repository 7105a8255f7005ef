"""What becomes of a sequence's score before it is a reward. `ScoreStats` is all that has a memory."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms.advantages import VARIANCE_FLOOR
from jaxrlhf.config import Scores


class ScoreStats(NamedTuple):
    """Scores seen so far, as their number, mean and sum of squared deviations (Welford): nothing cancels."""

    seen: Float[Array, ""]
    mean: Float[Array, ""]
    squares: Float[Array, ""]

    def add(self, scores: Float[Array, " B"]) -> "ScoreStats":
        """With the scores of one more batch (Chan, Golub and LeVeque 1983, eq. 2.1) that are finite."""
        good = jnp.isfinite(scores)
        n = jnp.sum(good).astype(jnp.float32)
        mean = jnp.sum(jnp.where(good, scores, 0.0)) / jnp.maximum(n, 1)
        squares = jnp.sum(jnp.square(jnp.where(good, scores - mean, 0.0)))
        total = jnp.maximum(self.seen + n, 1)
        apart = mean - self.mean
        return ScoreStats(
            self.seen + n,
            self.mean + apart * n / total,
            self.squares + squares + jnp.square(apart) * self.seen * n / total,
        )

    def normalise(self, scores: Float[Array, " B"]) -> Float[Array, " B"]:
        """(score - mean) / deviation."""
        variance = self.squares / jnp.maximum(self.seen - 1, 1)
        return (scores - self.mean) / jnp.sqrt(variance + VARIANCE_FLOOR)


def no_stats() -> ScoreStats:
    """Nothing seen yet."""
    return ScoreStats(*(jnp.zeros((), jnp.float32) for _ in ScoreStats._fields))


def overlong(lengths: Float[Array, " B"], longest: int, buffer: int, penalty: float) -> Float[Array, " B"]:
    """What a response costs for coming near its limit, <= 0 (https://arxiv.org/abs/2503.14476, eq. 13), in tokens.

    0 up to `longest` - `buffer`, then falling to -`penalty` at `longest`.
    """
    over = (lengths - (longest - buffer)) / jnp.maximum(buffer, 1)
    return -penalty * jnp.clip(over, 0.0, 1.0) if buffer else jnp.zeros_like(lengths)


def unfinished(finished: Bool[Array, " B"], penalty: float) -> Float[Array, " B"]:
    """What a response costs that ran out of room, <= 0."""
    return jnp.where(finished, 0.0, -penalty)


@functools.partial(jax.jit, static_argnames=("config", "longest"))
def shaped(
    scores: Float[Array, " B"],
    mask: Bool[Array, "B R"],
    finished: Bool[Array, " B"],
    stats: ScoreStats,
    *,
    config: Scores,
    longest: int,
) -> tuple[Float[Array, " B"], ScoreStats]:
    """The scores as `config` shapes them, and the statistics with them in. `longest` is the response's limit."""
    if config.normalise == "running":
        stats = stats.add(scores)
    if config.normalise != "none":
        scores = stats.normalise(scores)
    scores = scores * config.scale + config.shift
    if config.clip is not None:
        scores = jnp.clip(scores, -config.clip, config.clip)
    lengths = jnp.sum(mask, axis=1).astype(jnp.float32)
    scores += overlong(lengths, longest, config.overlong_buffer, config.overlong_penalty)
    return scores + unfinished(finished, config.missing_eos_penalty), stats

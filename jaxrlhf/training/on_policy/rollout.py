"""Rollouts with their scores, and the shaping of scores before they become rewards."""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.algorithms.scores import ScoreStats, shaped
from jaxrlhf.config import GRPOConfig, PPOConfig
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.errors import RewardError
from jaxrlhf.rewards.compose import Scored
from jaxrlhf.rollout.text import shortened
from jaxrlhf.training.session import Metrics
from jaxrlhf.types import Experience, GroupExperience, Rollout


class ScoredRollout(NamedTuple):
    """A rollout with its completions and scores."""

    rows: Sequence[PromptRow]  # one for each response
    completions: list[str]
    rollout: Rollout
    scored: Scored
    metrics: Metrics  # timings, and the number of tokens generated
    greedy: tuple[Rollout, np.ndarray] | None = None
    """ReMax: the greedy response to each row's prompt and its score, f32 [B], nan if unscored."""

    def samples(self) -> list[dict[str, Any]]:
        """Records for the samples log."""
        rows = zip(self.rows, self.completions, self.scored.as_list(), strict=True)
        return [{"prompt": row.text, "completion": text, "score": score} for row, text, score in rows]

    def distributions(self) -> dict[str, np.ndarray]:
        """Scores, and response lengths in tokens, of all responses [B], for histograms."""
        lengths = np.asarray(sharding.fetch(self.rollout.response_mask)).sum(-1)
        return {"scores": self.scored.totals, "response_length": lengths}

    def result(self, metrics: Metrics, experience: Experience | GroupExperience) -> dict[str, Any]:
        """The result of `ppo_step` and `grpo_step`: completions, scores, the experience, and `metrics` as Python
        numbers."""
        numbers = {k: float(v) for k, v in sharding.fetch(metrics).items()}
        return {
            "generated_texts": self.completions,
            "rewards": self.scored.as_list(),
            "experience": experience,
            "policy_loss": numbers["loss/policy_avg"],
            **numbers,
        }


def leave_out_unscored(rollout: Rollout, scores: np.ndarray, pad_id: int, mesh: jax.sharding.Mesh) -> Rollout:
    """The rollout with an empty response where the score, f32 [B], is nan: it has no part in losses, statistics and
    metrics of the update. Raises RewardError if no response has a score."""
    unscored = np.isnan(scores)
    if unscored.all():
        raise RewardError(
            f"none of the {len(scores)} responses of this update has a score, so there is nothing to learn from: all "
            "components of the reward with a weight returned None, or failed with on_error: skip"
        )
    if not unscored.any():
        return rollout
    rollout, kept = sharding.fetch(rollout), ~unscored
    return sharding.put_rows(
        shortened(rollout, rollout.response_mask & kept[:, None], rollout.finished & kept, pad_id), mesh
    )


def score_metrics(scores: np.ndarray) -> Metrics:
    """Metrics of raw scores f32 [B], nan where a response has none."""
    return {
        "objective/raw_scores": float(np.mean(scores, where=~np.isnan(scores))),
        "objective/unscored": float(np.mean(np.isnan(scores))),
    }


def shape_scores(
    config: PPOConfig | GRPOConfig,
    mesh: jax.sharding.Mesh,
    rollout: Rollout,
    scores: np.ndarray,
    stats: ScoreStats,
    *,
    count: bool = True,
) -> tuple[jax.Array, ScoreStats]:
    """Raw scores f32 [B] after `config.scores` (normalisation, scale, clip, penalties), on the mesh, and the
    statistics, to which they are added if they `count`."""
    section = config.scores
    if not count and section.normalise == "running":
        section = dataclasses.replace(section, normalise="reference")  # the same formula, with fixed statistics
    raw = sharding.put_rows(np.asarray(scores, np.float32), mesh)
    longest = config.sampling.response_length
    final, stats = shaped(raw, rollout.response_mask, rollout.finished, stats, config=section, longest=longest)
    on_host = sharding.fetch(stats)
    if not all(np.isfinite(value) for value in on_host):
        raise RewardError(
            f"the statistics of scores.normalise overflow: scores reach {np.nanmax(np.abs(scores)):.3g}, and their "
            "squares have to fit into float32; lower the weight of the component that gives them"
        )
    return sharding.put_rows(final, mesh), sharding.put_whole(on_host, mesh)


def reference_stats(batches: Iterable[Scored], stats: ScoreStats) -> ScoreStats:
    """`stats` with the scores of the reference's responses, for `scores.normalise: reference`. Raises RewardError for
    errors of the reward, and if there are no scores or all are equal. Unscored responses do not count."""
    for scored in batches:
        if scored.notes:
            raise RewardError(
                f"scores.normalise is 'reference', and its samples were not all scored: {scored.notes[0]}"
            )
        stats = stats.add(jnp.asarray(scored.scores))
    if not float(stats.seen):
        raise RewardError("scores.normalise is 'reference', but no response of the reference has a score")
    if float(stats.squares) <= 1e-12 * float(stats.seen):
        raise RewardError(
            f"scores.normalise is 'reference', but all {int(stats.seen)} responses of the reference score "
            f"{float(stats.mean):g}: there is no deviation to divide by; use 'running', or 'none'"
        )
    return stats


def pad_rollout(
    rollout: Rollout, token_scores: np.ndarray | None, width: tuple[int, int], pad_id: int, mesh: jax.sharding.Mesh
) -> tuple[Rollout, np.ndarray | None]:
    """The rollout on the mesh, and the scores of its tokens [B, R], padded to `width` (P, R)."""
    right = width[1] - rollout.response_mask.shape[1]
    padded = sharding.put_rows(padded_rollout(sharding.fetch(rollout), width, pad_id), mesh)
    return padded, None if token_scores is None else np.pad(token_scores, [(0, 0), (0, right)])


def padded_rollout(rollout: Rollout, width: tuple[int, int], pad_id: int) -> Rollout:
    """A rollout of NumPy arrays, padded to `width` (P, R)."""
    (prompt, response), columns = width, rollout.response_mask.shape[1]
    left, right = prompt - (rollout.tokens.shape[1] - columns), response - columns

    def pad(x: Any, before: int = 0, value: int = 0) -> Any:
        return np.pad(x, [(0, 0), (before, right), *[(0, 0)] * (x.ndim - 2)], constant_values=value)

    return dataclasses.replace(
        rollout,
        tokens=pad(rollout.tokens, left, pad_id),
        mask=pad(rollout.mask, left),
        response_mask=pad(rollout.response_mask),
        logprobs=pad(rollout.logprobs),
        support=None if rollout.support is None else pad(rollout.support),
    )

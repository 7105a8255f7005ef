"""Rollouts of group-relative updates: zero-variance groups replaced, unscored responses, ReMax's greedy responses."""

from collections.abc import Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.rewards.compose import Scored
from jaxrlhf.training.on_policy.rollout import ScoredRollout, pad_rollout
from jaxrlhf.training.on_policy.trainer import OnPolicyTrainer
from jaxrlhf.training.session import Session

REFILL_SEED = 2**32  # added to the run's seed: above every seed, so the prompts of refills have an order of their own
FIRST_REFILL = 2  # `use` of `OnPolicyTrainer.key`
GREEDY = 1  # greedy decoding draws no random number with it


def rollout_with_refills(
    trainer: OnPolicyTrainer, rows: Sequence[PromptRow], step: int, session: Session | None, refills: int
) -> ScoredRollout:
    """Scored responses to `rows`, where zero-variance groups are replaced by other groups from up to `refills` further
    rollouts (dynamic sampling, https://arxiv.org/abs/2503.14476).

    Prompts of refills come in an order of their own, so each prompt of the run still comes once per epoch. Metrics of
    the reward are those of the first rollout: the others are a selection.
    """
    group, components = trainer.config.settings.group, decoupled(trainer)
    batch = trainer.generate_and_score(rows, step, session)
    replaced = rollouts = 0
    for number in range(refills):
        wanted = zero_variance_groups(batch, group, components)
        if not len(wanted):
            break
        more_rows = trainer.prompts(step * refills + number, trainer.config.seed + REFILL_SEED)
        more = trainer.generate_and_score(more_rows, step, session, use=FIRST_REFILL + number)
        groups = np.arange(len(more_rows) // group)
        usable = np.setdiff1d(groups, zero_variance_groups(more, group, components))[: len(wanted)]
        batch = _replace_groups(trainer, batch, wanted[: len(usable)], more, usable)
        replaced, rollouts = replaced + len(usable), rollouts + 1
    return batch._replace(metrics=batch.metrics | {"groups/refills": rollouts, "groups/replaced": replaced})


def decoupled(trainer: OnPolicyTrainer) -> list[str]:
    """The components of the reward whose advantages are computed apart (GDPO); none for other methods."""
    return list(trainer.scorer.summed) if trainer.config.grpo.recipe.advantage == "decoupled" else []


def zero_variance_groups(batch: ScoredRollout, group: int, components: Sequence[str] = ()) -> np.ndarray:
    """Indices of the groups, of `group` rows each, whose raw scores are all equal, those of each of the `components` if
    there are any. Unscored responses do not count."""
    columns = [batch.scored.components[name] for name in components] or [batch.scored.totals]
    scores = np.stack(columns).reshape(len(columns), -1, group)
    unscored = np.isnan(scores)
    highest = scores.max(axis=2, initial=-np.inf, where=~unscored)
    lowest = scores.min(axis=2, initial=np.inf, where=~unscored)
    return np.flatnonzero(np.all(highest <= lowest, axis=0))


def rollout_with_greedy(
    trainer: OnPolicyTrainer, rows: Sequence[PromptRow], step: int, session: Session | None
) -> ScoredRollout:
    """Scored responses to `rows`, and the scored greedy response to each prompt, generated once per prompt (ReMax)."""
    group = trainer.config.settings.group
    batch = trainer.generate_and_score(rows, step, session)
    prompts = rows[::group]
    padding = -len(prompts) % sharding.row_shards(trainer.mesh)  # so many that devices split them evenly
    padded = [*prompts, *[prompts[-1]] * padding]
    greedy = trainer.generate_and_score(padded, step, session, use=GREEDY, greedy=True)
    of_row = np.repeat(np.arange(len(prompts)), group)
    rollout = jax.tree.map(lambda x: x[of_row], sharding.fetch(greedy.rollout))
    scores = greedy.scored.totals[of_row]
    metrics = _add_costs(batch, greedy)
    if not np.isnan(scores).all():
        metrics["objective/greedy_scores"] = float(np.nanmean(scores))
    return batch._replace(greedy=(sharding.put_rows(rollout, trainer.mesh), scores), metrics=metrics)


def _add_costs(batch: ScoredRollout, more: ScoredRollout) -> dict[str, Any]:
    """The metrics of `batch` with the seconds and the generated tokens of `more` added."""
    added = {key: value for key, value in more.metrics.items() if key.endswith(("_seconds", "/generated"))}
    return {key: value + added.get(key, 0) for key, value in batch.metrics.items()}


def _replace_groups(
    trainer: OnPolicyTrainer, batch: ScoredRollout, old: np.ndarray, more: ScoredRollout, new: np.ndarray
) -> ScoredRollout:
    """`batch` with its groups `old` replaced by the groups `new` of `more`."""
    group, count = trainer.config.settings.group, len(batch.rows)
    source = np.arange(count)  # of each row, in the concatenation of both
    for to, start in zip(old, new, strict=True):
        source[to * group : (to + 1) * group] = count + start * group + np.arange(group)
    widths = [
        (part.rollout.tokens.shape[1] - part.rollout.response_mask.shape[1], part.rollout.response_mask.shape[1])
        for part in (batch, more)
    ]
    width = max(p for p, _ in widths), max(r for _, r in widths)
    pad_id, mesh = trainer.tokenizer.pad_id, trainer.mesh
    rollouts = [sharding.fetch(pad_rollout(part.rollout, None, width, pad_id, mesh)[0]) for part in (batch, more)]

    def merge(first: Any, second: Any) -> np.ndarray:
        return np.concatenate([first, second])[source]

    rows, completions = [*batch.rows, *more.rows], [*batch.completions, *more.completions]
    scored, other = batch.scored, more.scored
    return ScoredRollout(
        rows=[rows[i] for i in source],
        completions=[completions[i] for i in source],
        rollout=sharding.put_rows(jax.tree.map(merge, *rollouts), mesh),
        scored=Scored(
            scores=merge(scored.totals, other.totals),
            token_scores=None,
            components={name: merge(values, other.components[name]) for name, values in scored.components.items()},
            metrics=scored.metrics,
            notes=(*scored.notes, *other.notes),
        ),
        metrics=_add_costs(batch, more),
    )

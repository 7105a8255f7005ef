"""The rollouts of a group-relative update: refills in place of flat groups, responses without a score, and the greedy
responses of ReMax."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.rewards.compose import Scored
from jaxrlhf.training.on_policy.run import Answers, Online
from jaxrlhf.training.ppo.replay import widened
from jaxrlhf.types import Rollout

OTHER = 2**32  # above every seed: the order of the prompts that refills draw
FIRST_REFILL = 2  # `use` of `Online.key`
GREEDY = 1  # no random number is drawn with it


def refilled(online: Online, step: int, stop: Callable[[], None], refills: int) -> Answers:
    """The answers of update number `step`; groups whose scores are all equal give way to those of other prompts that
    are not, of up to `refills` further rollouts.

    Those prompts come in an order of their own, so each prompt still comes once per epoch. What the rewards log is of
    the first rollout: the others are a selection.
    """
    made = online.answer(online.rows(step), step, stop)
    replaced = rollouts = 0
    for number in range(refills):
        wanted = flat_groups(made, online.group)
        if not len(wanted):
            break
        rows = online.drawn(step * refills + number, online.config.seed + OTHER)
        more = online.answer(rows, step, stop, use=FIRST_REFILL + number)
        found = np.setdiff1d(np.arange(len(rows) // online.group), flat_groups(more, online.group))[: len(wanted)]
        made = _replaced(online, made, wanted[: len(found)], more, found)
        replaced, rollouts = replaced + len(found), rollouts + 1
    if refills:
        made = made._replace(metrics=made.metrics | {"groups/refills": rollouts, "groups/replaced": replaced})
    return made


def flat_groups(answers: Answers, group: int) -> np.ndarray:
    """The numbers of the groups, `group` rows each, whose scores are all equal, before `scores` shapes them. Responses
    that nobody had an opinion on are left out."""
    scores, unscored = (x.reshape(-1, group) for x in (answers.scored.totals, answers.scored.unscored))
    most, least = np.where(unscored, -np.inf, scores).max(axis=1), np.where(unscored, np.inf, scores).min(axis=1)
    return np.flatnonzero(most <= least)


def set_apart(online: Online, answers: Answers) -> Rollout:
    """The rollout, with responses that nobody had an opinion on as groups of their own, named below 0: what is not
    known is no baseline for the others, and is not learnt from."""
    rollout, unscored = answers.rollout, answers.scored.unscored
    if not unscored.any():
        return rollout
    index = np.where(unscored, -1 - np.arange(len(unscored)), jax.device_get(rollout.index)).astype(np.int32)
    return dataclasses.replace(rollout, index=sharding.put_rows(index, online.mesh))


def with_greedy(online: Online, rows: Sequence[PromptRow], step: int, stop: Callable[[], None]) -> Answers:
    """The answers to `rows` as prompts of update number `step`, and the greedy one to each prompt, made once."""
    answers = online.answer(rows, step, stop)
    prompts = rows[:: online.group]
    shares = sharding.row_shards(online.mesh)
    asked = [*prompts, *[prompts[-1]] * (-len(prompts) % shares)]  # so many that devices split them evenly
    made = online.answer(asked, step, stop, use=GREEDY, greedy=True)
    of_row = np.repeat(np.arange(len(prompts)), online.group)
    rollout = jax.tree.map(lambda x: x[of_row], jax.device_get(made.rollout))
    worth = made.scored.totals[of_row]
    timings = {key: value for key, value in made.metrics.items() if key.endswith("_seconds")}
    return answers._replace(
        greedy=(sharding.put_rows(rollout, online.mesh), worth),
        metrics={key: value + timings.get(key, 0.0) for key, value in answers.metrics.items()}
        | {"objective/greedy_scores": float(np.mean(worth))},
        scored=answers.scored._replace(notes=(*answers.scored.notes, *made.scored.notes)),
    )


def _replaced(online: Online, answers: Answers, old: np.ndarray, more: Answers, new: np.ndarray) -> Answers:
    """`answers` with groups `new` of `more` in the place of groups `old`."""
    group, count = online.group, len(answers.rows)
    source = np.arange(count)
    for to, start in zip(old, new, strict=True):
        source[to * group : (to + 1) * group] = count + start * group + np.arange(group)
    rooms = _room(answers.rollout), _room(more.rollout)
    width = max(rooms[0][0], rooms[1][0]), max(rooms[0][1], rooms[1][1])
    parts = [jax.device_get(widened(a.rollout, None, width, online.tokenizer.pad_id, online.mesh)[0])
             for a in (answers, more)]  # fmt: skip
    rollout = jax.tree.map(lambda a, b: np.concatenate([a, b])[source], *parts)

    def both(first: Any, second: Any) -> np.ndarray:
        return np.concatenate([first, second])[source]

    scored, other = answers.scored, more.scored
    everything = [*answers.rows, *more.rows]
    said = [*answers.texts, *more.texts]
    return Answers(
        rows=[everything[i] for i in source],
        texts=[said[i] for i in source],
        rollout=sharding.put_rows(rollout, online.mesh),
        scored=Scored(
            both(scored.totals, other.totals),
            None,
            {name: both(values, other.components[name]) for name, values in scored.components.items()},
            scored.metrics,
            (*scored.notes, *other.notes),
            both(scored.unscored, other.unscored),
        ),
        metrics=answers.metrics
        | {key: value + answers.metrics[key] for key, value in more.metrics.items() if key.endswith("_seconds")},
    )


def _room(rollout: Rollout) -> tuple[int, int]:
    """(P, R)."""
    length = rollout.response_mask.shape[1]
    return rollout.tokens.shape[1] - length, length

"""Completions of the same prompts during a run, from which a reader sees how the policy changes."""

from collections.abc import Callable, Sequence
from typing import Any

from jaxrlhf.config import GRPOConfig, PPOConfig
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.errors import RewardError
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.training.session import Session
from jaxrlhf.types import Rollout

TIMES = 4  # at most that the prompts are completed again


class FixedPrompts:
    """The prompts of the first update, completed again with its random key at the end of a run and at one sample step
    in each quarter of it. Only the policy differs from the first update's rollout, which is written as step 0, and no
    further program is compiled. A run with held-out prompts has its validation for that.

    Scored by reward models alone: other rewards are not called for a log, as they may keep count, cost or ask.
    """

    def __init__(self, config: PPOConfig | GRPOConfig, scorer: Scorer, total_steps: int, *, validated: bool) -> None:
        self._config, self._scorer, self._total_steps = config.logging, scorer, total_steps
        self.enabled = config.logging.sample_every > 0 and not validated

    def due(self, step: int) -> bool:
        """Return True if the prompts are to be completed again after update number `step` (from 1), whose samples are
        logged."""
        every, total = self._config.sample_every, self._total_steps
        before, now = (TIMES * number // total for number in (max(step - every, 0), step))
        return self.enabled and (step == total or before != now)

    def log(
        self,
        session: Session,
        step: int,
        rows: Sequence[PromptRow],
        generate: Callable[[Sequence[PromptRow], int], tuple[Rollout, list[str]]],
    ) -> None:
        """Complete the first update's `rows` after update number `step`. `generate(rows, 0)` uses its random key."""
        rollout, completions = generate(rows, 0)
        scores = None
        if len(self._scorer.models) == len(self._scorer.components):
            try:
                scores = self._scorer.score_rows(rows, completions, rollout, step).as_list()
            except RewardError as error:
                session.note(f"the completions of the first prompts have no score: {error}")
        samples: list[dict[str, Any]] = [
            {"prompt": row.text, "completion": text} for row, text in zip(rows, completions, strict=True)
        ]
        for sample, score in zip(samples, scores or (), strict=False):
            sample["score"] = score
        self.write(session, step, rows, samples)

    def write(self, session: Session, step: int, rows: Sequence[PromptRow], samples: Sequence[dict[str, Any]]) -> None:
        """Write the samples of the first update's `rows`, one for each prompt, made after `step` updates. The console
        shows those of the updates."""
        first = {row.text: i for i, row in reversed([*enumerate(rows)])}
        chosen = sorted(first.values())[: self._config.num_samples]
        session.logger.samples(step, [samples[i] for i in chosen], show=False)

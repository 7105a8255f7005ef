"""GRPO and related methods: PPO's loop without a critic, with the responses to a prompt as each other's baseline."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.config import GRPOConfig
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.environments.episodes import Environment
from jaxrlhf.training.grpo.rollouts import decoupled, rollout_with_greedy, rollout_with_refills
from jaxrlhf.training.grpo.state import initial_state
from jaxrlhf.training.grpo.update import GRPOSpec, annotate, filled, update
from jaxrlhf.training.on_policy.rollout import (
    ScoredRollout,
    leave_out_unscored,
    pad_rollout,
    score_metrics,
    shape_scores,
)
from jaxrlhf.training.on_policy.trainer import OnPolicyTrainer
from jaxrlhf.training.on_policy.update import without_moments
from jaxrlhf.training.session import Metrics, Session
from jaxrlhf.types import GroupExperience, Rollout


class GRPOTrainer(OnPolicyTrainer[GRPOConfig]):
    """Train `config.model` to maximise a reward by `config.grpo.method`.

    `reward(prompts, completions, **columns) -> list[float | None]` replaces `config.reward.function`. It runs in this
    process, which cannot time it out; a function named in the config runs in a process of its own. The same holds for
    `environment`, an object that replaces `config.environment.function`.
    `.train()` runs `config`; `.grpo_step(prompts)` is one update on prompts of your own; `.save_pretrained(directory)`.
    Errors in the config, the data or the models are raised here, before training begins.
    """

    programs = annotate, update
    spec: GRPOSpec

    def __init__(
        self,
        config: GRPOConfig,
        reward: Callable[..., Sequence[float | None]] | None = None,
        environment: Environment | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        super().__init__(config, reward, environment, fresh=fresh)
        self.state, self.frozen, self.spec, self.reference_hash = initial_state(
            config, self.sampler, self.scorer, self.teacher, self.total_steps, self.keys
        )

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last update's metrics."""
        with self._open_session() as session:
            for step in session.steps():
                if self.validator.should_stop_early(session):
                    break
                with session.interruptible(step):
                    batch, _, metrics = self._update(
                        self.prompts(step), step, session, refills=self.config.grpo.refills
                    )
                self._end_update(session, step + 1, metrics | self._progress(batch, step), batch)
            return self._finish(session)

    def grpo_step(self, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Any]:
        """One update on `grpo.num_generations` responses to each of `prompts`: generate, score, annotate, train.
        `columns` go to the reward function, one value per prompt. Zero-variance groups are not replaced.

        Returns `generated_texts` and `rewards`, those of a prompt side by side, `policy_loss`, `experience` (for
        `inspect`), and every other metric of the update by its logged name. Each new number of prompts compiles once.
        """
        batch, experience, metrics = self._update(*self._start_step(prompts, columns))
        return batch.result(metrics, experience)

    def learn(
        self,
        rollout: Rollout,
        scores: np.ndarray,
        step: int,
        greedy: tuple[Rollout, np.ndarray] | None = None,
        components: np.ndarray | None = None,
        *,
        fill: bool = False,
    ) -> tuple[GroupExperience, Metrics]:
        """Compute the advantages of a rollout with scores f32 [B] and train on it: update number `step`. Returns the
        experience and the metrics. `greedy` is the greedy response to each row's prompt and its score, for ReMax,
        and `components` f32 [B, K] the scores of each component of the reward, in the order of `Scorer.summed`, for
        GDPO. A response whose score is nan, or that of its greedy response, is left out. The experience has the
        policy's log-probs before the update if a program computes them, and with `fill` always."""
        config, state = self.config, without_moments(self.state.value)
        scores = scores if greedy is None else np.where(np.isnan(greedy[1]), np.nan, scores)
        rollout = leave_out_unscored(rollout, scores, self.tokenizer.pad_id, self.mesh)
        columns = rollout.response_mask.shape[1]
        if columns < len(self.spec.rejected):
            width = rollout.tokens.shape[1] - columns, len(self.spec.rejected)
            rollout, _ = pad_rollout(rollout, None, width, self.tokenizer.pad_id, self.mesh)
        final_scores, stats = shape_scores(config, self.mesh, rollout, scores, state.score_stats)
        baseline = shape_scores(config, self.mesh, *greedy, stats, count=False)[0] if greedy else None
        frozen = {role: sharding.to_device(part) for role, part in self.frozen.items()}
        if components is not None:
            components = sharding.put_rows(np.asarray(components, np.float32), self.mesh)
        experience, metrics = annotate(state, frozen, rollout, final_scores, baseline, components, spec=self.spec)
        seen = experience
        if fill and not self.spec.annotates_policy and not self.spec.returns_logprobs:
            seen = filled(state, frozen, experience, spec=self.spec)
        if config.reference.offload:  # it leaves the device before moments and gradients come
            jax.block_until_ready(experience)
        frozen = {role: self.frozen[role] for role in self.spec.update_roles}
        state = dataclasses.replace(self.state.ready, score_stats=stats)
        self.state.value, after = update(state, frozen, experience, self.key(step, 1), spec=self.spec)
        if self.spec.returns_logprobs:
            seen = dataclasses.replace(seen, old_logprobs=after.pop("old_logprobs_rows"))
        rate = after.pop("policy/learning_rate")
        return seen, metrics | after | score_metrics(scores) | {"learning_rate": rate}

    def annotate_arguments(self, rollout: Rollout) -> tuple[Any, ...]:
        size, components = self.config.grpo.batch_size, len(self.spec.reward_weights)
        scores = sharding.put_rows(np.zeros(size, np.float32), self.mesh)
        baseline = scores if self.config.grpo.recipe.advantage == "greedy" else None
        apart = sharding.put_rows(np.zeros((size, components), np.float32), self.mesh) if components else None
        return without_moments(self.state.template), self.frozen, rollout, scores, baseline, apart

    def _update(
        self, rows: Sequence[PromptRow], step: int, session: Session | None = None, *, refills: int = 0
    ) -> tuple[ScoredRollout, GroupExperience, Metrics]:
        """Update number `step` on a response to each row's prompt; zero-variance groups are replaced from up to
        `refills` further rollouts."""
        if refills:
            batch = rollout_with_refills(self, rows, step, session, refills)
        elif self.config.grpo.recipe.advantage == "greedy":
            batch = rollout_with_greedy(self, rows, step, session)
        else:
            batch = self.generate_and_score(rows, step, session)
        record = self._token_record(session, step + 1, batch)
        self._await_programs(session, batch.rollout)
        names = decoupled(self)
        components = np.stack([batch.scored.components[name] for name in names], axis=1) if names else None
        experience, metrics = self.learn(
            batch.rollout, batch.scored.totals, step, batch.greedy, components, fill=session is None
        )
        if session and record:
            session.log_tokens(step + 1, record.after(self.params, experience, step + 1))
        return batch, experience, metrics | batch.scored.metrics

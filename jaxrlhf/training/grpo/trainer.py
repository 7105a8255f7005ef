"""GRPO and related methods: PPO's loop without a critic, with the responses to a prompt as each other's baseline."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.algorithms.scores import ScoreStats
from jaxrlhf.config import GRPOConfig
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.training import pretrained
from jaxrlhf.training.grpo.rollouts import isolate_unscored, rollout_with_greedy, rollout_with_refills
from jaxrlhf.training.grpo.state import initial_state
from jaxrlhf.training.grpo.update import annotate, update
from jaxrlhf.training.on_policy.checks import check_models_context
from jaxrlhf.training.on_policy.policy import pad_rollout, policy_params, reference_params, without_moments
from jaxrlhf.training.on_policy.run import OnPolicyRun, ScoredRollout
from jaxrlhf.training.session import Metrics, Session
from jaxrlhf.types import GroupExperience, Params, Rollout


class GRPOTrainer:
    """Train `config.model` to maximise a reward by `config.grpo.method`.

    `reward(prompts, completions, **columns) -> list[float | None]` replaces `config.reward.function`. It runs in this
    process, which cannot time it out; a function named in the config runs in a process of its own.
    `.train()` runs `config`; `.grpo_step(prompts)` is one update on prompts of your own; `.save_pretrained(directory)`.
    Errors in the config, the data or the models are raised here, before training begins.
    """

    def __init__(
        self,
        config: GRPOConfig,
        reward: Callable[..., Sequence[float | None]] | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        self.config = config
        self.run = run = OnPolicyRun(
            "grpo", config, config.grpo, reward, group=config.grpo.num_generations, fresh=fresh
        )
        self.mesh, self.tokenizer, self.data, self.model = run.mesh, run.tokenizer, run.data, run.model
        self.sampler, self.scorer, self.total_steps = run.sampler, run.scorer, run.total_steps
        check_models_context(
            self.scorer.models_reading_rollouts(critic=False), run.longest, config.sampling.response_length
        )
        policy = run.load()
        self.state, self.frozen, self.spec, self._reference_hash = initial_state(
            config, self.sampler, policy, self.total_steps, run.role_keys[1]
        )
        run.check_memory(policy)

    @property
    def params(self) -> Params:
        """The policy's current parameters, base model and adapters."""
        return policy_params(self.state.value.params, self.frozen)

    @property
    def reference(self) -> Params | None:
        """The reference's current parameters, on the device; None if nothing uses a reference."""
        if "reference" not in self.frozen:
            return None
        return sharding.to_device(reference_params(self.state.value, self.frozen))

    def describe(self) -> str:
        """Model, data and length of `.train()`, and the first prompt as the model sees it."""
        return self.run.describe()

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last update's metrics."""
        run, validator = self.run, self.run.validator
        with run.session(self.state, self._reference_hash) as session:
            run.calibrate_scores(self.state, self.params)
            if validator.rows:
                validator.start(session, int(self.state.value.step), self.params, lambda: self.reference)
            for step in session.steps():
                if validator.should_stop_early(session):
                    break
                with session.save_on_reward_error(step):
                    batch, metrics = self._update(run.prompts(step), step, session, refills=self.config.grpo.refills)
                metrics, evaluation = metrics | run.progress(batch, step), {}
                if validator.due(step + 1, self.total_steps):
                    evaluation = validator.run(session, step + 1, metrics, self.params, lambda: self.reference)
                session.log(step + 1, metrics | evaluation)
                run.log_samples(session, step + 1, batch)
                session.save_if_due(step + 1, evaluation)
            last = session.finish()
            session.restore_best()
            run.results = run.record_of(session, int(self.state.value.step))
            session.note(f"exported to {self.save_pretrained(session.directory / 'export')}")
        return last

    def grpo_step(self, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Any]:
        """One update on `grpo.num_generations` responses to each of `prompts`: generate, score, annotate, train.
        `columns` go to the reward function, one value per prompt. Zero-variance groups are not replaced.

        Returns `generated_texts` and `rewards`, those of a prompt side by side, `policy_loss`, and every other metric
        of the update by its logged name. Each new number of prompts compiles once.
        """
        step = int(self.state.value.step)
        rows = self.run.prompts_of(prompts, columns, step)
        self.run.calibrate_scores(self.state, self.params)
        batch, metrics = self._update(rows, step)
        return self.run.step_result(batch, metrics)

    def learn(
        self, rollout: Rollout, scores: np.ndarray, step: int, greedy: tuple[Rollout, np.ndarray] | None = None
    ) -> tuple[GroupExperience, Metrics]:
        """Compute the advantages of a rollout with scores f32 [B] and train on it: update number `step`. Returns the
        experience and the metrics. `greedy` is the greedy response to each row's prompt and its score, for ReMax."""
        experience, stats, metrics = self._annotate(rollout, scores, greedy)
        state = dataclasses.replace(self.state.ready, score_stats=stats)
        frozen = {"policy": self.frozen["policy"]}  # annotation has used the reference
        self.state.value, after = update(state, frozen, experience, self.run.key(step, 1), spec=self.spec)
        rate = after.pop("policy/learning_rate")
        return experience, metrics | after | {
            "learning_rate": rate,
            "objective/raw_scores": float(np.mean(scores)),
        }

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the policy with its tokenizer in Hugging Face layout; adapters alone unless `merge_lora`."""
        return pretrained.save(
            directory,
            self.model,
            self.params,
            self.config,
            self.tokenizer,
            step=int(self.state.value.step),
            results=self.run.results,
            merge_lora=merge_lora,
        )

    def _update(
        self, rows: Sequence[PromptRow], step: int, session: Session | None = None, *, refills: int = 0
    ) -> tuple[ScoredRollout, Metrics]:
        """Update number `step` on a response to each row's prompt; zero-variance groups are replaced from up to
        `refills` further rollouts."""
        if refills:
            batch = rollout_with_refills(self.run, self.params, rows, step, session, refills)
        elif self.config.grpo.recipe.advantage == "greedy":
            batch = rollout_with_greedy(self.run, self.params, rows, step, session)
        else:
            batch = self.run.generate_and_score(self.params, rows, step, session)
        rollout = isolate_unscored(batch, self.mesh)
        _, metrics = self.learn(rollout, batch.scored.totals, step, batch.greedy)
        return batch, metrics | batch.scored.metrics

    def _annotate(
        self, rollout: Rollout, scores: np.ndarray, greedy: tuple[Rollout, np.ndarray] | None
    ) -> tuple[GroupExperience, ScoreStats, Metrics]:
        """The experience of a rollout, the statistics with its scores, and metrics."""
        columns, state = rollout.response_mask.shape[1], without_moments(self.state.value)
        if columns < len(self.spec.rejected):
            width = rollout.tokens.shape[1] - columns, len(self.spec.rejected)
            rollout, _ = pad_rollout(rollout, None, width, self.tokenizer.pad_id, self.mesh)
        final_scores, stats = self.run.shape_scores(rollout, scores, state.score_stats)
        baseline = None
        if greedy:
            baseline = self.run.shape_scores(*greedy, stats, count=False)[0]
        frozen = {role: sharding.to_device(part) for role, part in self.frozen.items()}
        experience, metrics = annotate(state, frozen, rollout, final_scores, baseline, spec=self.spec)
        if self.config.reference.offload:  # it leaves the device before moments and gradients come
            jax.block_until_ready(experience)
        return experience, stats, metrics

"""PPO: each update generates, scores, annotates and trains."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.algorithms.scores import ScoreStats
from jaxrlhf.config import PPOConfig
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.training import pretrained
from jaxrlhf.training.on_policy.checks import check_models_context
from jaxrlhf.training.on_policy.policy import pad_rollout, policy_params, reference_params, without_moments
from jaxrlhf.training.on_policy.run import OnPolicyRun, ScoredRollout
from jaxrlhf.training.ppo import checks
from jaxrlhf.training.ppo.critic import critic_params
from jaxrlhf.training.ppo.replay import update_with_replay
from jaxrlhf.training.ppo.state import initial_state
from jaxrlhf.training.ppo.update import annotate, update
from jaxrlhf.training.session import Metrics, Session
from jaxrlhf.types import Experience, Params, Rollout


class PPOTrainer:
    """Train `config.model` to maximise a reward, with a KL penalty to its initial state.

    `reward(prompts, completions, **columns) -> list[float | None]` replaces `config.reward.function`. It runs in this
    process, which cannot time it out; a function named in the config runs in a process of its own.
    `.train()` runs `config`; `.ppo_step(prompts)` is one update on prompts of your own; `.save_pretrained(directory)`.
    Errors in the config, the data or the models are raised here, before training begins.
    """

    def __init__(
        self,
        config: PPOConfig,
        reward: Callable[..., Sequence[float | None]] | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        self.config = config
        self.run = run = OnPolicyRun("ppo", config, config.ppo, reward, group=1, fresh=fresh)
        self.mesh, self.tokenizer, self.data, self.model = run.mesh, run.tokenizer, run.data, run.model
        self.sampler, self.scorer, self.total_steps = run.sampler, run.scorer, run.total_steps
        checks.check_run(config, self.model, self.scorer, self.total_steps)
        from_reward = config.critic.init == "reward"
        check_models_context(
            self.scorer.models_reading_rollouts(from_reward), run.longest, config.sampling.response_length
        )
        policy = run.load(critic_source=self.scorer.model if from_reward else None)
        reward_model = self.scorer.model and (self.scorer.model.model, self.scorer.model.params)
        self.state, self.frozen, self.spec, self._reference_hash = initial_state(
            config, self.sampler, policy, reward_model, self.total_steps, run.role_keys
        )
        run.check_memory(policy)

    @property
    def params(self) -> Params:
        """The policy's current parameters, base model and adapters."""
        return policy_params(self.state.value.params, self.frozen)

    @property
    def reference(self) -> Params:
        """The reference's current parameters, on the device."""
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
                    batch, metrics = self._update(run.prompts(step), step, session)
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

    def ppo_step(self, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Any]:
        """One update on `prompts`: generate, score, annotate, train. `columns` go to the reward function, one value per
        prompt.

        Returns `generated_texts`, `rewards` (the score of each), `policy_loss`, `value_loss`, and every other metric of
        the update by its logged name. The number of prompts must be a multiple of `ppo.num_mini_batches` (and of the
        micro-batch size, if one is set); each new number compiles once.
        """
        checks.check_step(self.config, prompts)
        step = int(self.state.value.step)
        rows = self.run.prompts_of(prompts, columns, step)
        self.run.calibrate_scores(self.state, self.params)
        batch, metrics = self._update(rows, step)
        result = self.run.step_result(batch, metrics)
        return result | {"value_loss": result["loss/value_avg"]}

    def generate(self, rows: Sequence[PromptRow], step: int) -> tuple[Rollout, list[str]]:
        """Responses of the current policy and their completions; `step` picks the random keys."""
        return self.sampler.generate(self.params, rows, self.run.key(step, 0))

    def learn(
        self, rollout: Rollout, scores: np.ndarray, step: int, token_scores: np.ndarray | None = None
    ) -> tuple[Experience, Metrics]:
        """Annotate a rollout with scores f32 [B], and f32 [B, R] of single tokens, and train on it: update number
        `step`. Returns the experience and the metrics."""
        experience, stats, metrics = self._annotate(rollout, scores, token_scores)
        state = dataclasses.replace(self.state.ready, score_stats=stats)
        frozen = {role: self.frozen[role] for role in ("policy", "critic")}  # annotation has used the reference
        train = update_with_replay if self.config.ppo.replay else update
        self.state.value, after = train(state, frozen, experience, self.run.key(step, 1), spec=self.spec)
        rate = after.pop("policy/learning_rate")
        return experience, metrics | after | {
            "learning_rate": rate,
            "objective/raw_scores": float(np.mean(scores)),
        }

    def save_pretrained(
        self, directory: str | Path, role: Literal["policy", "critic"] = "policy", *, merge_lora: bool = False
    ) -> Path:
        """Write the policy, or the critic as a model that scores text, with its tokenizer in Hugging Face layout;
        adapters alone unless `merge_lora`."""
        model, params, source = self.model, self.params, self.config.model
        if role == "critic":
            model, params = self.spec.critic, critic_params(self.state.value.params, self.frozen, self.spec.trunk)
            if self.config.critic.init == "reward":
                assert self.scorer.model is not None
                reward = self.scorer.model
                source = dataclasses.replace(source, path=reward.path, revision=reward.revision, merged_path="")
        return pretrained.save(
            directory,
            model,
            params,
            dataclasses.replace(self.config, model=source),
            self.tokenizer,
            step=int(self.state.value.step),
            results=self.run.results,
            merge_lora=merge_lora,
        )

    def _update(
        self, rows: Sequence[PromptRow], step: int, session: Session | None = None
    ) -> tuple[ScoredRollout, Metrics]:
        """Update number `step` on a response to each prompt."""
        batch = self.run.generate_and_score(self.params, rows, step, session)
        _, metrics = self.learn(batch.rollout, batch.scored.scores, step, batch.scored.token_scores)
        return batch, metrics | batch.scored.metrics

    def _annotate(
        self, rollout: Rollout, scores: np.ndarray, token_scores: np.ndarray | None
    ) -> tuple[Experience, ScoreStats, Metrics]:
        """The experience of a rollout, the statistics with its scores, and metrics."""
        config = self.config
        if config.ppo.replay:
            width = self.sampler.columns, config.sampling.response_length
            rollout, token_scores = pad_rollout(rollout, token_scores, width, self.tokenizer.pad_id, self.mesh)
        state = without_moments(self.state.value)
        final_scores, stats = self.run.shape_scores(rollout, scores, state.score_stats)
        if token_scores is not None:
            token_scores = sharding.put_rows(np.asarray(token_scores, np.float32), self.mesh)
        frozen = {**self.frozen, "reference": sharding.to_device(self.frozen["reference"])}
        experience, metrics = annotate(state, frozen, rollout, final_scores, token_scores, spec=self.spec)
        if config.reference.offload:  # it leaves the device before moments and gradients come
            jax.block_until_ready(experience)
        return experience, stats, metrics

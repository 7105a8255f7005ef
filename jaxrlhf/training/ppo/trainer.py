"""PPO: each update generates, scores, annotates and trains."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.config import PPOConfig
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.environments.episodes import Environment
from jaxrlhf.errors import ConfigError
from jaxrlhf.training.on_policy.rollout import (
    ScoredRollout,
    leave_out_unscored,
    pad_rollout,
    score_metrics,
    shape_scores,
)
from jaxrlhf.training.on_policy.trainer import OnPolicyTrainer
from jaxrlhf.training.on_policy.update import take_rows, without_moments
from jaxrlhf.training.ppo.critic import critic_params
from jaxrlhf.training.ppo.replay import update_with_replay
from jaxrlhf.training.ppo.state import initial_state
from jaxrlhf.training.ppo.update import PPOSpec, annotate, update
from jaxrlhf.training.session import Metrics, Session
from jaxrlhf.types import Experience, Rollout


class PPOTrainer(OnPolicyTrainer[PPOConfig]):
    """Train `config.model` to maximise a reward, with a KL penalty to its initial state.

    `reward(prompts, completions, **columns) -> list[float | None]` replaces `config.reward.function`. It runs in this
    process, which cannot time it out; a function named in the config runs in a process of its own. The same holds for
    `environment`, an object that replaces `config.environment.function`.
    `.train()` runs `config`; `.ppo_step(prompts)` is one update on prompts of your own; `.save_pretrained(directory)`.
    Errors in the config, the data or the models are raised here, before training begins.
    """

    programs = annotate, update
    spec: PPOSpec

    def __init__(
        self,
        config: PPOConfig,
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
                    batch, _, metrics = self._update(self.prompts(step), step, session)
                self._end_update(session, step + 1, metrics | self._progress(batch, step), batch)
            return self._finish(session)

    def ppo_step(self, prompts: Sequence[str], **columns: Sequence[Any]) -> dict[str, Any]:
        """One update on `prompts`: generate, score, annotate, train. `columns` go to the reward function, one value per
        prompt.

        Returns `generated_texts`, `rewards` (the score of each, None without one), `policy_loss`, `value_loss`,
        `experience` (for `inspect`), and every other metric of the update by its logged name. The number of prompts
        must be a multiple of `ppo.num_mini_batches` (and of the micro-batch size, if one is set); each new number
        compiles once.
        """
        ppo = self.config.ppo
        if ppo.replay and len(prompts) * ppo.group != ppo.batch_size:
            needed = ppo.batch_size // ppo.group
            raise ConfigError(f"ppo_step got {len(prompts)} prompts; with ppo.replay it needs {needed}")
        batch, experience, metrics = self._update(*self._start_step(prompts, columns))
        result = batch.result(metrics, experience)
        return result | {"value_loss": result["loss/value_avg"]}

    def learn(
        self,
        rollout: Rollout,
        scores: np.ndarray,
        step: int,
        token_scores: np.ndarray | None = None,
    ) -> tuple[Experience, Metrics]:
        """Annotate a rollout with scores f32 [B], and f32 [B, R] of single tokens, and train on it: update number
        `step`. Returns the experience and the metrics. A response whose score is nan is left out."""
        config, state, ppo = self.config, without_moments(self.state.value), self.config.ppo
        rollout = leave_out_unscored(rollout, scores, self.tokenizer.pad_id, self.mesh)
        if config.ppo.replay:
            width = self.sampler.columns, config.sampling.response_length
            rollout, token_scores = pad_rollout(rollout, token_scores, width, self.tokenizer.pad_id, self.mesh)
        final_scores, stats = shape_scores(config, self.mesh, rollout, scores, state.score_stats)
        if token_scores is not None:
            token_scores = sharding.put_rows(np.asarray(token_scores, np.float32), self.mesh)
        frozen = {role: sharding.to_device(part) for role, part in self.frozen.items()}
        experience, metrics = annotate(state, frozen, rollout, final_scores, token_scores, spec=self.spec)
        if config.reference.offload:  # it leaves the device before moments and gradients come
            jax.block_until_ready(experience)
        frozen = {role: self.frozen[role] for role in self.spec.update_roles}
        state = dataclasses.replace(self.state.ready, score_stats=stats)
        train = update_with_replay if config.ppo.replay else update
        self.state.value, after = train(state, frozen, experience, self.key(step, 1), spec=self.spec)
        known = {key.removesuffix("_rows"): values for key, values in take_rows(after).items()}
        experience = dataclasses.replace(
            experience, **known, token_scores=None, gamma=ppo.gamma, lam=ppo.lam, lam_alpha=ppo.lam_alpha
        )
        rate = after.pop("policy/learning_rate")
        return experience, metrics | after | score_metrics(scores) | {"learning_rate": rate}

    def annotate_arguments(self, rollout: Rollout) -> tuple[Any, ...]:
        state, size = self.state.template, self.config.ppo.batch_size
        if state.replay is not None:  # rollouts are padded to the width of the kept ones
            one = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[1:], x.dtype), state.replay.rollout)
            rollout = jax.tree.map(lambda x: sharding.rows_shape(x, self.mesh), one)
        scores, of_tokens = np.zeros(size, np.float32), None
        if self.scorer.per_token:
            of_tokens = np.zeros(rollout.response_mask.shape, np.float32)
        return without_moments(state), self.frozen, rollout, *sharding.put_rows((scores, of_tokens), self.mesh)

    def save_pretrained(
        self, directory: str | Path, role: Literal["policy", "critic"] = "policy", *, merge_lora: bool = False
    ) -> Path:
        """Write the policy, or the critic as a model that scores text, with its tokenizer in Hugging Face layout;
        adapters alone unless `merge_lora`."""
        if role == "policy":
            return super().save_pretrained(directory, merge_lora=merge_lora)
        config, reward = self.config, self.scorer.model
        if config.critic.init == "reward":
            assert reward is not None
            source = dataclasses.replace(config.model, path=reward.path, revision=reward.revision, merged_path="")
            config = dataclasses.replace(config, model=source)
        params = critic_params(self.state.value.params, self.frozen, self.spec.trunk)
        return self._save(directory, self.spec.critic, params, config, merge_lora)

    def _update(
        self, rows: Sequence[PromptRow], step: int, session: Session | None = None
    ) -> tuple[ScoredRollout, Experience, Metrics]:
        """Update number `step` on a response to each prompt."""
        batch = self.generate_and_score(rows, step, session)
        record = self._token_record(session, step + 1, batch)
        self._await_programs(session, batch.rollout)
        experience, metrics = self.learn(batch.rollout, batch.scored.scores, step, batch.scored.token_scores)
        if session and record:
            session.log_tokens(step + 1, record.after(self.params, experience, step + 1))
        return batch, experience, metrics | batch.scored.metrics

"""The parts of an on-policy run that PPO and GRPO share: prompts, sampler, reward, held-out prompts."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding, weights
from jaxrlhf.algorithms.scores import ScoreStats, shaped
from jaxrlhf.config import GRPO, PPO, GRPOConfig, PPOConfig
from jaxrlhf.data.datasets import PromptRow, columns, prompt_rows, prompts_from_texts
from jaxrlhf.data.loader import rows_at
from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.rewards.compose import Scored, Scorer
from jaxrlhf.rewards.sources.model import RewardModel
from jaxrlhf.training import setup
from jaxrlhf.training.abstract import is_abstract
from jaxrlhf.training.on_policy import checks
from jaxrlhf.training.on_policy.alarms import Watch
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.on_policy.validation import Validator
from jaxrlhf.training.session import Metrics, Session, open_session
from jaxrlhf.training.state import State
from jaxrlhf.types import Params, Rollout

CALIBRATION = 2**31 - 1  # folded into the run's key in place of an update's number


class ScoredRollout(NamedTuple):
    """A rollout with its completions and scores."""

    rows: Sequence[PromptRow]  # one for each response
    completions: list[str]
    rollout: Rollout
    scored: Scored
    metrics: Metrics  # timings
    greedy: tuple[Rollout, np.ndarray] | None = None  # ReMax: greedy response to each prompt, score f32 [B]

    def samples(self) -> list[dict[str, Any]]:
        """Records for the samples log."""
        rows = zip(self.rows, self.completions, self.scored.totals, strict=True)
        return [{"prompt": row.text, "completion": text, "score": float(score)} for row, text, score in rows]


class OnPolicyRun:
    """Prompts, sampler, reward and validation of a run of `method`, whose section of `config` is `settings`, with
    `group` responses to each prompt. It holds no trained state.

    Raises ConfigError for contradictions of the config, the data and the model descriptions, before weights are read.
    """

    def __init__(
        self,
        method: str,
        config: PPOConfig | GRPOConfig,
        settings: PPO | GRPO,
        reward: Callable[..., Sequence[float | None]] | None,
        *,
        group: int,
        fresh: bool,
    ) -> None:
        self.method, self.config, self.settings = method, config, settings
        self.group, self._fresh = group, fresh
        if config.sampling.greedy:
            raise ConfigError(f"sampling.greedy is true, but {method} needs random samples; leave it false")
        self.mesh = sharding.make_mesh(config.mesh)
        _, self.run_key, *role_keys = setup.keys(config.seed)
        self.role_keys = role_keys[0], role_keys[1]
        """Keys for the critic and for adapters."""
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.data = prompt_rows(config.data, self.tokenizer) if config.data.path else None
        self.model = setup.model_config(config.model, self.tokenizer, "lm", config.lora)
        prompts = [*self.data.train, *self.data.validation] if self.data else []
        self.longest = max((len(row.tokens) for row in prompts), default=0)
        """Tokens of the longest known prompt."""
        self.sampler = Sampler(
            config.sampling,
            config.rollout,
            self.model,
            self.tokenizer,
            self.mesh,
            self.longest,
            settings.batch_size,
            group,
        )
        self.scorer = Scorer(config.reward, self.tokenizer, reward, mesh=self.mesh, directory=Path(config.run_dir))
        self.total_steps = self._total_steps()
        checks.check_run(method, config, settings, self.mesh)
        self.validator = Validator(
            config,
            self.data.validation if self.data else [],
            settings.annotation_rows(settings.batch_size),
            self.sampler,
            self.scorer,
            self.run_key,
        )
        self.results: dict[str, float] = {}
        """The record of the exported state, for the model card."""

    def load(self, critic_source: RewardModel | None = None) -> Params:
        """Load the policy and the reward models; returns the policy's parameters.

        A reward model that is adapters over the same base model shares its arrays, but for `critic_source`, whose
        adapters a critic trains.
        """
        self.check_reward()  # before anything large is read
        config = self.config
        policy = setup.load_model(config, self.tokenizer, self.mesh, "lm")
        folder = weights.resolve(config.model.path, config.model.revision, weights=False)
        base, merged = weights.base_and_adapters(folder)
        if config.lora.enabled and not merged:
            for model in self.scorer.models.values():
                if model is not critic_source:
                    model.share_base_params(base, policy)
        self.scorer.load()
        return policy

    def check_memory(self, policy: Params) -> None:
        """Raise ConfigError for more slots than there is memory for, once all models are loaded."""
        if not is_abstract(policy):
            self.sampler.check_memory()

    def describe(self) -> str:
        """Model, data and length of a run, and the first prompt as the model sees it."""
        self.check_reward()
        updates = f"{self.total_steps} updates of {self.settings.batch_size} completions"
        first = ["first prompt:", self.data.train[0].text] if self.data else []
        return "\n".join([self._about(), updates, *self.human_workload(), *first])

    @contextlib.contextmanager
    def session(self, state: State, reference_hash: str) -> Iterator[Session]:
        """Open the run directory, restore `state` from the newest checkpoint, and watch for alarms."""
        if not self.data:
            raise ConfigError(
                f"data.path is empty: give a file of prompts, or call {self.method}_step with prompts of your own"
            )
        self.check_reward()
        identity = self._identity(reference_hash)
        with open_session(self.config, self.total_steps, state, identity, fresh=self._fresh) as session:
            for line in (self._about(), *self.human_workload()):
                session.note(line)
            self.scorer.pause_while_asking(session.logger.paused)
            session.resume()
            session.watch = Watch(
                self.config.alarms, self.settings.batch_size, session.records(), kl_option=self._kl_option()
            )
            yield session

    def key(self, step: int, use: int) -> jax.Array:
        """The random key of update number `step` for a use: 0 the rollout, 1 the update, from 2 on further rollouts."""
        return jax.random.fold_in(jax.random.fold_in(self.run_key, step), use)

    def prompts(self, step: int, seed: int | None = None) -> list[PromptRow]:
        """The prompts of update number `step`, each repeated `group` times, in the order that `seed` (default: the
        run's) gives."""
        assert self.data
        rows, config = self.data.train, self.config
        number = self.settings.batch_size // self.group
        order = rows_at(step, number, len(rows), config.seed if seed is None else seed, config.data.shuffle)
        return repeat_rows([rows[i] for i in order], self.group)

    def prompts_of(self, texts: Sequence[str], columns: dict[str, Sequence[Any]], step: int) -> list[PromptRow]:
        """Prompts given in Python as those of update number `step`, each repeated `group` times; `columns` go to the
        reward, one value per prompt. Raises ConfigError if an update cannot take so many."""
        checks.check_step(self.method, self.config, self.settings, self.mesh, self.group, texts, step, self.total_steps)
        return repeat_rows(prompts_from_texts(texts, columns, self.config.data, self.tokenizer), self.group)

    def generate_and_score(
        self,
        policy: Params,
        rows: Sequence[PromptRow],
        step: int,
        session: Session | None = None,
        *,
        use: int = 0,
        greedy: bool = False,
    ) -> ScoredRollout:
        """A scored response to each prompt; `use` picks the random key, as in `key`. Inside a `session`, the run
        stops after either phase if it was asked to."""
        jax.block_until_ready(policy)  # the update before is not part of the rollout's time
        started = time.monotonic()
        rollout, completions = self.sampler.generate(policy, rows, self.key(step, use), greedy=greedy)
        if session:
            session.stop_if_asked(step)
        generated = time.monotonic()
        scored = self.score(rows, completions, rollout, step + 1)
        for note in scored.notes:
            session.note(note) if session else warnings.warn(note, stacklevel=4)
        if session:
            session.stop_if_asked(step)
        seconds, tokens = generated - started, int(np.sum(jax.device_get(rollout.response_mask)))
        metrics = {
            "perf/rollout_seconds": seconds,
            "perf/reward_seconds": time.monotonic() - generated,
            "perf/response_tokens_per_second": tokens / seconds,
        }
        return ScoredRollout(rows, completions, rollout, scored, metrics)

    def score(
        self, rows: Sequence[PromptRow], completions: list[str], rollout: Rollout, step: int | None = None
    ) -> Scored:
        """Scores of the completions; `step` (from 1) is passed to the reward."""
        messages = [row.messages for row in rows]
        return self.scorer.score([row.text for row in rows], completions, rollout, columns(rows), step, messages)

    def shape_scores(
        self, rollout: Rollout, scores: np.ndarray, stats: ScoreStats, *, count: bool = True
    ) -> tuple[jax.Array, ScoreStats]:
        """Raw scores f32 [B] after `config.scores` (normalisation, scale, clip, penalties), on the mesh, and the
        statistics, to which they are added if they `count`."""
        config, mesh = self.config, self.mesh
        section = config.scores
        if not count and section.normalise == "running":
            section = dataclasses.replace(section, normalise="reference")  # the same formula, with fixed statistics
        raw = sharding.put_rows(np.asarray(scores, np.float32), mesh)
        final, stats = shaped(
            raw,
            rollout.response_mask,
            rollout.finished,
            stats,
            config=section,
            longest=config.sampling.response_length,
        )
        return sharding.put_rows(np.asarray(final), mesh), sharding.put_whole(jax.device_get(stats), mesh)

    def progress(self, batch: ScoredRollout, step: int) -> Metrics:
        """Timings and progress of update number `step`, for its record."""
        return batch.metrics | {
            "episode": (step + 1) * self.settings.batch_size,
            "tokens/identical": 1 - len(set(batch.completions)) / len(batch.completions),
        }

    def log_samples(self, session: Session, step: int, batch: ScoredRollout) -> None:
        """Log sample completions of update number `step` (from 1): of the first, of every `logging.sample_every`-th
        after it, and of the last."""
        config = self.config.logging
        if config.sample_every and ((step - 1) % config.sample_every == 0 or step == self.total_steps):
            session.log_samples(step, batch.samples()[: config.num_samples])

    def record_of(self, session: Session, step: int) -> Metrics:
        """The record of `step`; of step 0 the validation of the initial policy."""
        return session.record_of(step) if step else self.validator.before

    def step_result(self, batch: ScoredRollout, metrics: Metrics) -> dict[str, Any]:
        """The result of `ppo_step` and `grpo_step`: completions, scores and metrics as Python numbers."""
        numbers = {k: float(v) for k, v in jax.device_get(metrics).items()}
        return {
            "generated_texts": batch.completions,
            "rewards": [float(score) for score in batch.scored.totals],
            "policy_loss": numbers["loss/policy_avg"],
            **numbers,
        }

    def calibrate_scores(self, state: State, policy: Params) -> None:
        """With `scores.normalise: reference`, measure mean and deviation of the scores of the initial policy, once."""
        config, stats, size = self.config, state.value.score_stats, self.settings.batch_size
        if config.scores.normalise != "reference" or float(stats.seen) > 0:
            return
        if not self.data:
            raise ConfigError("scores.normalise is 'reference', which answers prompts of data.path, and that is empty")
        for batch in range(-(-config.scores.reference_samples // size)):
            rows = self.prompts(batch)
            rollout, completions = self.sampler.generate(policy, rows, self.key(CALIBRATION - batch, 0))
            scored = self.score(rows, completions, rollout)
            if scored.notes:  # missing scores would count as 0
                raise RewardError(
                    f"scores.normalise is 'reference', and its samples were not all scored: {scored.notes[0]}"
                )
            stats = stats.add(jnp.asarray(scored.scores))
        if float(stats.squares) <= 1e-12 * float(stats.seen):
            raise RewardError(
                f"scores.normalise is 'reference', but all {int(stats.seen)} responses of the reference score "
                f"{float(stats.mean):g}: there is no deviation to divide by; use 'running', or 'none'"
            )
        placed = sharding.put_whole(jax.device_get(stats), self.mesh)
        state.value = dataclasses.replace(state.value, score_stats=placed)

    def check_reward(self) -> None:
        """Refuse data that the reward cannot score (see `Scorer.check`)."""
        if self.data:
            rows = self.data.train
            self.scorer.check([row.text for row in rows], columns(rows), [row.messages for row in rows])

    def human_workload(self) -> list[str]:
        """A line on how many completions a person will be asked to score; none if nobody is asked."""
        config, size = self.config, self.settings.batch_size
        if not self.scorer.has_human:
            return []
        parts = [f"{size} in each of {self.total_steps} updates"]
        if self.validator.rows:
            steps = range(1, self.total_steps + 1)
            validations = 1 + sum(self.validator.due(step, self.total_steps) for step in steps)
            parts.append(f"{2 * len(self.validator.rows)} in each of {validations} validations")
        if config.scores.normalise == "reference":
            parts.append(f"{-(-config.scores.reference_samples // size) * size} before training, for scores.normalise")
        return [f"a person is asked about completions: {', '.join(parts)}; about the same one only once"]

    def _about(self) -> str:
        report = self.data.report if self.data else f"no data set: prompts come with {self.method}_step"
        return setup.describe(self.config, self.model, self.tokenizer, report, self.mesh)

    def _kl_option(self) -> str:
        """The option that keeps the policy near its reference."""
        paired = isinstance(self.settings, GRPO) and self.settings.recipe.loss == "dpo"
        return "grpo.beta" if paired else f"{self.method}.kl_coef"

    def _identity(self, reference_hash: str) -> dict[str, str]:
        """Hashes of what the config does not pin down."""
        assert self.data
        models = [model.params for model in self.scorer.models.values()]
        return {
            "prompts": setup.fingerprint(self.data.train),
            "held-out prompts": setup.fingerprint(self.validator.rows),
            "reference": reference_hash,
            "reward model": setup.params_fingerprint(models[0] if len(models) == 1 else models or {}),
        }

    def _total_steps(self) -> int:
        settings = self.settings
        if settings.num_train_epochs is None:
            return -(-settings.total_episodes // settings.batch_size)
        if not self.data:
            raise ConfigError(
                f"{self.method}.num_train_epochs counts passes over data.path, which is empty; use total_episodes"
            )
        return max(1, -(-round(settings.num_train_epochs * len(self.data.train) * self.group) // settings.batch_size))


def repeat_rows(rows: Sequence[PromptRow], times: int) -> list[PromptRow]:
    """Each row `times` times, side by side."""
    return [row for row in rows for _ in range(times)]

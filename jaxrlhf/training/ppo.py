"""PPO: three jitted calls and one host hop per update (generate, score, annotate, update)."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding, weights
from jaxrlhf.config import LoRA, PPOConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, columns, prompt_rows, prompts_from_texts
from jaxrlhf.data.loader import rows_at
from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.rewards.compose import Scored, Scorer
from jaxrlhf.training import loop, ppo_checks, setup
from jaxrlhf.training.alarms import Watch
from jaxrlhf.training.loop import Metrics
from jaxrlhf.training.ppo_learner import Learner
from jaxrlhf.training.ppo_roles import whole_critic
from jaxrlhf.training.ppo_rollout import Sampler
from jaxrlhf.training.validation import Validator
from jaxrlhf.types import Experience, Params, Rollout

CALIBRATION = 2**31 - 1  # folded into the run's key in place of an update's number


class PPOTrainer:
    """Train `config.model` to score well by a reward model, by `reward`, or by both, without leaving its reference far.

    `reward(prompts, completions, **columns) -> list[float | None]` is a function in place of `config.reward.function`;
    it runs in this process and cannot be killed, as one that the config names can.
    `.train()` runs `config`; `.ppo_step(prompts)` is one update on prompts of your own; `.save_pretrained(directory)`.
    What can be wrong with the config, the data or the models is raised here, before training begins. With `abstract`
    nothing is loaded and nothing can be trained: shapes stand for parameters, for `jaxrlhf plan`.
    """

    def __init__(
        self,
        config: PPOConfig,
        reward: Callable[..., Sequence[float | None]] | None = None,
        *,
        fresh: bool = False,
        ahead: bool = False,
        abstract: bool = False,
    ) -> None:
        self.config, self._fresh = config, fresh
        if config.sampling.greedy:
            raise ConfigError("sampling.greedy is true: PPO learns from samples; leave it false")
        self.mesh = sharding.make_mesh(config.mesh)
        init_key, self._key, *role_keys = setup.keys(config.seed)
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.data = prompt_rows(config.data, self.tokenizer) if config.data.path else None
        self.model = setup.model_of(config.model, self.tokenizer, "lm", config.lora)
        prompts = [len(row.tokens) for row in [*self.data.train, *self.data.validation]] if self.data else []
        self.sampler = Sampler(config, self.model, self.tokenizer, self.mesh, max(prompts, default=0))
        storage = setup.storage_of(config)
        self.scorer = Scorer(config.reward, self.tokenizer, reward, mesh=self.mesh, directory=Path(config.run_dir))
        self.total_steps = self._updates()
        ppo_checks.check_run(config, self.model, self.scorer, self.mesh, max(prompts, default=0), self.total_steps)
        held_out = self.data.validation if self.data else []
        self.validator = Validator(config, held_out, self.sampler, self.scorer) if held_out else None
        if ahead:
            self._check_reward()
        rollout = self._compile_rollout(self._rows_of(0)) if ahead and self.data else None
        if abstract:
            policy = setup.shapes_of(self.model, storage, self.mesh, LoRA())
        else:
            policy = setup.load_model(
                config.model, tokenizer=self.tokenizer, mesh=self.mesh, key=init_key, head="lm", storage=storage
            )
        folder, merged = weights.described_by(weights.resolve(config.model.path, config.model.revision, weights=False))
        for judge in self.scorer.models.values() if config.lora.enabled and not merged else ():
            if config.critic.init != "reward" or judge is not self.scorer.model:  # adapters of its own come over that
                judge.share(folder, policy)
        self.scorer.load(abstract=abstract)
        judge = self.scorer.model and (self.scorer.model.model, self.scorer.model.params)
        self.learner = Learner(
            config, self.sampler, policy, judge, self.total_steps, tuple(role_keys), abstract=abstract
        )
        self.state, self.frozen, self.roles = self.learner.state, self.learner.frozen, self.learner.roles
        if not abstract:
            self.sampler.check_memory()
        if rollout:
            self.learner.compile(rollout, self._key, per_token=self.scorer.per_token)
        self._begun = ahead
        self._results: dict[str, float] = {}

    @property
    def params(self) -> Params:
        """The policy's parameters as they are now, adapters and what is under them."""
        return self.learner.policy

    def describe(self) -> str:
        """What `.train()` works with, and the first prompt as the model sees it."""
        self._check_reward()
        report = self.data.report if self.data else "no data set: prompts come with ppo_step"
        about = setup.describe(self.config, self.model, self.tokenizer, report, self.mesh)
        first = ["first prompt:", self.data.train[0].text] if self.data else []
        updates = f"{self.total_steps} updates of {self.config.ppo.batch_size} completions"
        return "\n".join([about, updates, *self._questions(), *first])

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last update's metrics."""
        config = self.config
        if not self.data:
            raise ConfigError("data.path is empty: give a file of prompts, or call ppo_step with prompts of your own")
        size, sample_every = config.ppo.batch_size, config.logging.sample_every
        self._check_reward()
        identities = self._identities()
        with loop.session(config, "ppo", self.total_steps, self.state, identities, fresh=self._fresh) as session:
            session.logger.note(setup.describe(config, self.model, self.tokenizer, self.data.report, self.mesh))
            for line in self._questions():
                session.logger.note(line)
            if not self._begun:
                rollout = self._compile_rollout(self._rows_of(0))
                self.learner.compile(rollout, self._key, per_token=self.scorer.per_token)
            self.scorer.pause(session.logger.paused)
            done = session.resume(self.state)
            session.watch = Watch(config.alarms, size, session.records())
            self._calibrate()
            if self.validator:
                self.validator.begin(session, self.learner, self._key)
            for step in range(done, self.total_steps):
                if self.validator and self.validator.patience_is_over(session):
                    break
                batch = self._rows_of(step)
                jax.block_until_ready(self.state.value.step)  # the update before is not the rollout's time
                started = time.monotonic()
                rollout, texts = self.generate(batch, step)
                session.stop_if_asked(step, self.state.value)
                generated = time.monotonic()
                with self._nothing_lost(session, step):
                    scored = self._score(batch, texts, rollout, step + 1)
                session.stop_if_asked(step, self.state.value)
                ended = time.monotonic()
                for note in scored.notes:
                    session.logger.note(note)
                metrics = self.learn(rollout, scored.scores, step, scored.token_scores)[1] | scored.metrics
                tokens = int(np.sum(jax.device_get(rollout.response_mask)))
                metrics |= {
                    "episode": (step + 1) * size,
                    "tokens/identical": 1 - len(set(texts)) / len(texts),
                    "perf/rollout_seconds": generated - started,
                    "perf/reward_seconds": ended - generated,
                    "perf/response_tokens_per_second": tokens / (generated - started),
                }
                worth, validator = None, self.validator
                validated = validator is not None and validator.due(step + 1, self.total_steps)
                if validator and validated:
                    with self._nothing_lost(session, step + 1, metrics):
                        metrics |= validator.run(session, step + 1, self.learner, self._key)
                    worth = validator.worth(session, metrics)
                session.log(step + 1, metrics)
                if sample_every and (step % sample_every == 0 or step + 1 == self.total_steps):
                    session.flush()
                    session.logger.samples(step + 1, show(batch, texts, scored.totals)[: config.logging.num_samples])
                saved = session.due(step + 1) or (validated and session.best is not None)
                if saved:
                    session.save(step + 1, self.state.value, worth)
                session.stop_if_asked(step + 1, self.state.value, saved=saved)
            session.flush()
            if not session.due(int(self.state.value.step)):
                session.save(int(self.state.value.step), self.state.value, block=True)
            last = session.last()
            session.take_best(self.state)
            exported = int(self.state.value.step)
            records = {record.pop("step"): record for record in session.records()}
            self._results = records.get(exported, self.validator.before if self.validator and not exported else {})
            session.logger.note(f"exported to {self.save_pretrained(session.run.directory / 'export')}")
        return last

    def ppo_step(self, prompts: Sequence[str], **extra: Sequence[Any]) -> dict[str, Any]:
        """One update on `prompts`: generate, score, learn. `extra` columns go to the reward function, a value a prompt.

        Returns `generated_texts`, `rewards` (the score of each), `policy_loss`, `value_loss`, and every other metric of
        the update under its logged name. The number of prompts must be a multiple of `ppo.num_mini_batches` (and of the
        micro-batch, if one is set); each new number compiles once.
        """
        step = int(self.state.value.step)
        ppo_checks.check_step(self.config, self.mesh, prompts, step, self.total_steps)
        rows = prompts_from_texts(prompts, extra, self.config.data, self.tokenizer)
        self._calibrate()
        rollout, texts = self.generate(rows, step)
        scored = self._score(rows, texts, rollout)
        for note in scored.notes:
            warnings.warn(note, stacklevel=2)
        metrics = self.learn(rollout, scored.scores, step, scored.token_scores)[1] | scored.metrics
        numbers = {k: float(v) for k, v in jax.device_get(metrics).items()}
        return {
            "generated_texts": texts,
            "rewards": [float(score) for score in scored.totals],
            "policy_loss": numbers["loss/policy_avg"],
            "value_loss": numbers["loss/value_avg"],
            **numbers,
        }

    def generate(self, rows: Sequence[PromptRow], step: int) -> tuple[Rollout, list[str]]:
        """Responses of the policy as it is now to prompts, on the device and as text; `step` picks the random keys."""
        key = jax.random.fold_in(jax.random.fold_in(self._key, step), 0)
        return self.sampler.generate(self.params, rows, key)

    def learn(
        self, rollout: Rollout, scores: np.ndarray, step: int, token_scores: np.ndarray | None = None
    ) -> tuple[Experience, Metrics]:
        """Annotate a scored rollout and make the update's optimizer steps; moves `state` on from `step`."""
        key = jax.random.fold_in(jax.random.fold_in(self._key, step), 1)
        return self.learner.learn(rollout, scores, token_scores, key)

    def save_pretrained(
        self, directory: str | Path, role: Literal["policy", "critic"] = "policy", *, merge_lora: bool = False
    ) -> Path:
        """Write the policy, or the critic as a model that scores text, with its tokenizer, in Hugging Face layout;
        adapters alone unless `merge_lora`."""
        model, params, source = self.model, self.params, self.config.model
        if role == "critic":
            model, params = self.roles.critic, whole_critic(self.state.value.params, self.frozen, self.roles)
            if self.config.critic.init == "reward":
                assert self.scorer.model is not None
                judge = self.scorer.model
                source = dataclasses.replace(source, path=judge.path, revision=judge.revision, merged_path="")
        return setup.export(
            directory, model, params, dataclasses.replace(self.config, model=source), self.tokenizer,
            method="ppo", step=int(self.state.value.step), results=self._results, merge_lora=merge_lora,
        )  # fmt: skip

    def _updates(self) -> int:
        """How many updates the run has."""
        ppo = self.config.ppo
        if ppo.num_train_epochs is None:
            return -(-ppo.total_episodes // ppo.batch_size)
        if not self.data:
            raise ConfigError("ppo.num_train_epochs counts passes over data.path, which is empty; use total_episodes")
        return max(1, -(-round(ppo.num_train_epochs * len(self.data.train)) // ppo.batch_size))

    @contextlib.contextmanager
    def _nothing_lost(self, session: loop.Session, step: int, metrics: Metrics | None = None) -> Iterator[None]:
        """A reward that fails in here finds `step` updates saved, and those measured last, if not yet logged, in the
        log."""
        try:
            yield
        except RewardError as error:
            if not step:
                raise RewardError(f"{error}\nNothing has been trained yet") from error
            if metrics:
                session.log(step, metrics)
            session.save(step, self.state.value, block=True)
            raise RewardError(
                f"{error}\n{step} updates are saved; once that is mended, the same command goes on"
            ) from error

    def _questions(self) -> list[str]:
        """What a person is in for, if one is asked."""
        config, validations = self.config, 0
        if not self.scorer.asks_a_person:
            return []
        asked = [f"{config.ppo.batch_size} in each of {self.total_steps} updates"]
        if self.validator:
            validations = 1 + sum(self.validator.due(step, self.total_steps) for step in range(1, self.total_steps + 1))
            asked.append(f"{2 * len(self.validator.rows)} in each of {validations} validations")
        if config.scores.normalise == "reference":
            rounds = -(-config.scores.reference_samples // config.ppo.batch_size)
            asked.append(f"{rounds * config.ppo.batch_size} before training, for scores.normalise")
        return [f"a person is asked about completions: {', '.join(asked)}; about the same one only once"]

    def _identities(self) -> dict[str, str]:
        """What a config does not pin down, and a hash of it."""
        assert self.data
        judges = [judge.params for judge in self.scorer.models.values()]
        return {
            "prompts": setup.fingerprint(self.data.train),
            "held-out prompts": setup.fingerprint(self.validator.rows if self.validator else ()),
            "reference": self.learner.identity,
            "reward model": setup.params_fingerprint(judges[0] if len(judges) == 1 else judges or {}),
        }

    def _calibrate(self) -> None:
        """With `scores.normalise: reference`, the scores' mean and deviation under the policy of step 0, once."""
        state, config = self.state.value, self.config
        if config.scores.normalise != "reference" or float(state.score_stats.seen) > 0:
            return
        if not self.data:
            raise ConfigError("scores.normalise is 'reference', which answers prompts of data.path, and that is empty")
        size, stats = config.ppo.batch_size, state.score_stats
        for part in range(-(-config.scores.reference_samples // size)):
            batch = self._rows_of(part)
            rollout, texts = self.generate(batch, CALIBRATION - part)
            scored = self._score(batch, texts, rollout)
            if scored.notes:  # scores that are not there would count as 0
                raise RewardError(
                    f"scores.normalise is 'reference', and its samples were not all scored: {scored.notes[0]}"
                )
            stats = stats.add(jnp.asarray(scored.scores))
        if float(stats.squares) <= 1e-12 * float(stats.seen):
            raise RewardError(
                f"scores.normalise is 'reference', but all {int(stats.seen)} responses of the reference score "
                f"{float(stats.mean):g}: there is no deviation to divide by; use 'running', or 'none'"
            )
        self.state.value = dataclasses.replace(state, score_stats=sharding.put_whole(jax.device_get(stats), self.mesh))

    def _score(self, rows: Sequence[PromptRow], texts: list[str], rollout: Rollout, step: int | None = None) -> Scored:
        asked = [row.text for row in rows], texts, rollout, columns(rows)
        return self.scorer.score(*asked, step, [row.messages for row in rows])

    def _check_reward(self) -> None:
        if self.data:
            rows = self.data.train
            self.scorer.check([row.text for row in rows], columns(rows), [row.messages for row in rows])

    def compile_longest(self) -> None:
        """Compile every program of an update whose prompts are the longest there are, of which parameters may be
        shapes. ConfigError without prompts."""
        if not self.data:
            raise ConfigError(
                "data.path is empty: how long prompts are decides what an update needs; give a file of them"
            )
        rollout = self._compile_rollout(batching.longest(self.data.train, self.config.ppo.batch_size))
        self.scorer.compile(self.sampler.programs, self.sampler.columns + self.config.sampling.response_length)
        self.learner.compile(rollout, self._key, per_token=self.scorer.per_token)
        self.sampler.programs.finish()

    def _compile_rollout(self, rows: Sequence[PromptRow]) -> Future[Rollout]:
        """Begin to compile the rollout of `rows`. Returns the shapes of the rollout to come."""
        policy = setup.shapes_of(self.model, setup.storage_of(self.config), self.mesh, self.config.lora)
        return self.sampler.compile(policy, rows, self._key)

    def _rows_of(self, step: int) -> list[PromptRow]:
        assert self.data
        rows, config = self.data.train, self.config
        return [rows[i] for i in rows_at(step, config.ppo.batch_size, len(rows), config.seed, config.data.shuffle)]


def show(rows: Sequence[PromptRow], texts: Sequence[str], scores: np.ndarray) -> list[dict[str, Any]]:
    """Records for the samples log."""
    return [
        {"prompt": row.text, "completion": text, "score": float(score)}
        for row, text, score in zip(rows, texts, scores, strict=True)
    ]

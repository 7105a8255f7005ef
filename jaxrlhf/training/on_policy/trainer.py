"""The base of the PPO and GRPO trainers: everything of a run but its loop and its update."""

import contextlib
import dataclasses
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, ClassVar, Generic, TypeVar

import jax
import numpy as np

from jaxrlhf import runs, sharding, weights
from jaxrlhf.config import GRPOConfig, PPOConfig, replace
from jaxrlhf.data.datasets import PromptRow, columns, prompt_rows, prompts_from_texts
from jaxrlhf.environments.episodes import Environment, check_columns
from jaxrlhf.environments.worker import open_environment
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig, for_length
from jaxrlhf.rewards.compose import Scored, Scorer
from jaxrlhf.rollout.turns import turn_metrics
from jaxrlhf.traced import Number
from jaxrlhf.training import pretrained, setup
from jaxrlhf.training.facts import Origin
from jaxrlhf.training.on_policy import checks, description, precompile, prompts
from jaxrlhf.training.on_policy.ahead import Ahead, Drawn, meshes
from jaxrlhf.training.on_policy.alarms import Watch
from jaxrlhf.training.on_policy.fixed_prompts import FixedPrompts
from jaxrlhf.training.on_policy.policy import policy_params, reference_params, reference_teacher
from jaxrlhf.training.on_policy.rollout import ScoredRollout, reference_stats
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.on_policy.token_records import TokenRecord, TokenRecords, rollout_logprobs
from jaxrlhf.training.on_policy.validation import Validator
from jaxrlhf.training.session import TEMPLATE, Metrics, Session, open_session
from jaxrlhf.training.state import State
from jaxrlhf.types import Params, Rollout

Config = TypeVar("Config", PPOConfig, GRPOConfig)
CALIBRATION = 2**31 - 1  # folded into the run's key in place of an update's number


class OnPolicyTrainer(Generic[Config]):
    """Prompts, sampler, reward, validation and export of an on-policy run. A subclass sets `state`, `frozen`, `spec`,
    `reference_hash` and `programs`.

    Raises ConfigError for contradictions of the config, the data and the model descriptions, before weights are read.
    """

    state: State
    frozen: dict[str, Params]
    """Parameters that do not train, by role."""
    reference_hash: str
    spec: Any
    """The `UpdateSpec` of the method."""
    programs: ClassVar[tuple[Any, Any]]
    """The jitted functions `annotate` and `update`."""

    def __init__(
        self,
        config: Config,
        reward: Callable[..., Sequence[float | None]] | None = None,
        environment: Environment | None = None,
        *,
        fresh: bool = False,
    ) -> None:
        runs.check_processes(config)
        if environment is not None and not config.environment.function:
            config = replace(config, **{"environment.function": "passed"})
        self.config = config = runs.with_template_date(config, fresh)
        self._fresh = fresh
        if config.sampling.greedy:
            raise ConfigError(f"sampling.greedy is true, but {config.method} needs random samples; leave it false")
        self.mesh, rollout_mesh = meshes(config)
        self.keys = setup.keys(config.seed)
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.data = prompt_rows(config.data, self.tokenizer) if config.data.sources else None
        self.model = setup.model_config(config.model, self.tokenizer, "lm", config.lora, self.mesh)
        train, held_out = (self.data.train, self.data.validation) if self.data else ([], [])
        setup.check_data(self.model, train, held_out)
        longest = max((len(row.tokens) for row in chain(train, held_out)), default=0)
        length = (longest or config.data.max_length) + config.sampling.response_length
        self.model = for_length(self.model, length)
        self.environment = open_environment(config.environment, environment)
        if self.environment and train:
            check_columns(self.environment.signature, columns(train), self.environment.name)
        played = (self.environment, config.environment) if self.environment else None
        self.total_steps = prompts.total_steps(config, self.data)
        widths = prompts.few_widths(config, self.data, longest, self.total_steps, self.model, self.mesh)
        self.sampler = Sampler(config, self.model, self.tokenizer, self.mesh, longest, played, widths)
        self.ahead: Ahead | None = None
        if rollout_mesh is not None:
            there = dataclasses.replace(self.model, mesh=rollout_mesh)
            self.ahead = Ahead(
                Sampler(config, there, self.tokenizer, rollout_mesh, longest, None, widths), self.sampler
            )
        directory, required = Path(config.run_dir), config.needs_reward
        self.scorer = Scorer(
            config.reward,
            self.tokenizer,
            reward,
            mesh=self.mesh,
            directory=directory,
            required=required,
            environment=config.environment,
        )
        checks.check_run(config, self.mesh, self.sampler.columns + config.sampling.response_length)
        if train:
            self.scorer.check_rows(train)
            if not weights.abstract_weights_wanted():  # a plan asks nobody
                self.scorer.probe_rows(train)
        self.token_records = TokenRecords(config, self.sampler)
        self.teacher = reference_teacher(config, self.sampler)
        """The model of `reference.path`, None without one."""
        self.validator = Validator(config, held_out, self.sampler, self.scorer, self.keys[1], self.teacher)
        self.fixed_prompts = FixedPrompts(config, self.scorer, self.total_steps, validated=bool(self.validator.rows))
        self._results: dict[str, float] = {}  # the record of the exported state, for the model card
        self._origin: Origin | None = None  # once `.train()` has opened the run
        self._compiler: precompile.BackgroundCompiler | None = None  # until the first update of `.train()`

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
        return "\n".join([self.summary(), *(["first prompt:", self.data.train[0].text] if self.data else [])])

    def summary(self) -> str:
        """Model, data and length of `.train()`."""
        updates = f"{self.total_steps} updates of {self.config.settings.batch_size} completions"
        return "\n".join([*self._about(), updates])

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the policy with its tokenizer in Hugging Face layout; adapters alone unless `merge_lora`."""
        return self._save(directory, self.model, self.params, self.config, merge_lora)

    def generate(
        self, rows: Sequence[PromptRow], step: int, *, use: int = 0, greedy: bool = False
    ) -> tuple[Rollout, list[str]]:
        """Responses of the current policy and their completions; `step` and `use` pick the random keys (see `key`).
        Greedy ones, which need no key, play the episodes of the update's rollout."""
        return self.sampler.generate(self.params, rows, self.key(step, 0 if greedy else use), greedy=greedy)

    def generate_and_score(
        self,
        rows: Sequence[PromptRow],
        step: int,
        session: Session | None = None,
        *,
        use: int = 0,
        greedy: bool = False,
    ) -> ScoredRollout:
        """A scored response to each prompt; `use` picks the random key, as in `key`. Inside a `session`, the run
        stops after either phase if it was asked to."""
        jax.block_until_ready(self.params)  # the update before is not part of the rollout's time
        started = time.monotonic()
        if session and self.ahead and use == 0:
            rollout, completions, seconds, staleness = self._drawn_ahead(self.ahead, rows, step, session)
            extra = {"rollout/staleness": staleness, "perf/rollout_wait_seconds": time.monotonic() - started}
        else:
            rollout, completions = self.generate(rows, step, use=use, greedy=greedy)
            seconds, extra = time.monotonic() - started, {}
        if session:
            session.stop_if_asked(step)
        generated = time.monotonic()
        with session.clock.spent("reward") if session else contextlib.nullcontext():
            scored = self.scorer.score_rows(rows, completions, rollout, step + 1)
        for note in scored.notes:
            session.note(note) if session else warnings.warn(note, stacklevel=4)
        if session:
            session.stop_if_asked(step)
        tokens, config = int(np.sum(sharding.fetch(rollout.response_mask))), self.config.environment
        timings = {
            "perf/rollout_seconds": seconds,
            "perf/reward_seconds": time.monotonic() - generated,
            "perf/response_tokens_per_second": tokens / seconds,
            "tokens/generated": tokens,
            **extra,
        }
        if self.environment:
            timings |= turn_metrics(sharding.fetch(dataclasses.replace(rollout, support=None)), config.max_turns)
            timings["perf/environment_seconds"] = self.environment.seconds
            rollout = dataclasses.replace(rollout, turn_rewards=None)
        batch = ScoredRollout(rows, completions, rollout, scored, timings)
        if session and step == 0 and use == 0 and self.fixed_prompts.enabled:
            self.fixed_prompts.write(session, 0, rows, batch.samples())
        return batch

    def _drawn_ahead(self, ahead: Ahead, rows: Sequence[PromptRow], step: int, session: Session) -> Drawn:
        """The responses of update number `step`, which were drawn during the one before it if there was no checkpoint
        in between, and begin to draw those of the next."""

        def saved(step: int) -> bool:
            return session.save_due(step, evaluated=self.validator.due(step, self.total_steps))

        if not ahead.has(step):
            if step and not saved(step):
                session.note(f"update {step + 1} has fresh responses: those drawn before the run stopped are lost")
            ahead.start(self.params, rows, self.key(step, 0), step, policy=step)
        drawn, after = ahead.take(), step + 1
        if after < self.total_steps and not saved(after):
            ahead.start(self.params, self.prompts(after), self.key(after, 0), after, policy=step)
        return drawn

    def logprobs(self, rollout: Rollout) -> jax.Array:
        """Log-probs of the response tokens of a rollout under the current policy, f32 of the shape of its
        `response_mask`, 0 outside it: after an update, those that `inspect` takes as `new_logprobs`."""
        temperature = Number(self.config.sampling.temperature)
        return rollout_logprobs(self.params, rollout, model=self.model, temperature=temperature)

    def annotate_arguments(self, rollout: Rollout) -> tuple[Any, ...]:
        """The arguments of `annotate`, besides `spec`, for a rollout of arrays or shapes; with shapes in place of the
        state, and zeros of scores."""
        raise NotImplementedError

    def update_arguments(self, experience: Any) -> tuple[Any, ...]:
        """The arguments of `update`, besides `spec`, for an experience of arrays or shapes; with shapes in place of the
        state, and another key."""
        used = {role: self.frozen[role] for role in self.spec.update_roles}
        return self.state.template, used, experience, jax.random.key(0)

    def key(self, step: int, use: int) -> jax.Array:
        """The random key of update number `step` for a use: 0 the rollout, 1 the update, from 2 on further rollouts."""
        return jax.random.fold_in(jax.random.fold_in(self.keys[1], step), use)

    def prompts(self, step: int, seed: int | None = None) -> list[PromptRow]:
        """The prompts of update number `step`, each repeated `group` times, in the order that `seed` (default: the
        run's) gives."""
        assert self.data
        return prompts.at(self.config, self.data, step, seed)

    def _start_step(self, texts: Sequence[str], columns: dict[str, Sequence[Any]]) -> tuple[list[PromptRow], int]:
        """Prompts given in Python, each repeated for its group, and the number of the update on them. `columns` go to
        the reward, one value per prompt. Raises ConfigError if an update cannot take so many."""
        step = int(self.state.value.step)
        checks.check_step(self.config, self.mesh, texts, step, self.total_steps)
        rows = prompts_from_texts(texts, columns, self.config.data, self.tokenizer)
        self._calibrate_scores()
        return [row for row in rows for _ in range(self.config.settings.group)], step

    @contextlib.contextmanager
    def _open_session(self) -> Iterator[Session]:
        """Open the run directory, restore the state from the newest checkpoint, and measure the initial policy of a
        new run."""
        config = self.config
        if not self.data:
            raise ConfigError(
                f"data.path is empty: give a file of prompts, or call {config.method}_step with prompts of your own"
            )
        models = [model.params for model in self.scorer.models.values()]
        identity = {  # hashes of what the config does not pin down
            TEMPLATE: self.tokenizer.template_digest,
            "prompts": setup.fingerprint(self.data.train),
            "held-out prompts": setup.fingerprint(self.validator.rows),
            "reference": self.reference_hash,
            "reward model": setup.params_fingerprint(models[0] if len(models) == 1 else models or {}),
        }
        if self.teacher:
            identity["teacher"] = setup.params_fingerprint(self.frozen["reference"])
        with open_session(config, self.total_steps, self.state, identity, fresh=self._fresh) as session:
            self._origin = Origin(session.directory, identity["prompts"])
            session.describe("\n".join(self._about()))
            self.scorer.pause_while_asking(session.logger.paused)
            session.resume()
            rows, before = config.settings.batch_size, session.records()
            session.watch = Watch(config.alarms, rows, before, kl_option=config.kl_option)
            step = int(self.state.value.step)
            with self._precompiling(step):
                with session.interruptible(step):
                    self._calibrate_scores()
                    if self.validator.rows:
                        with session.clock.spent("evaluation"):
                            self.validator.start(session, step, self.params, lambda: self.reference)
                if session.pending:
                    self._end_update(session, step, session.pending["record"], session.pending["samples"])
                elif session.undrawn:
                    self._log_fixed_prompts(session, step, {})
                yield session

    @contextlib.contextmanager
    def _precompiling(self, step: int) -> Iterator[None]:
        """Block in which the programs of update number `step` are compiled in the background, where that pays off and
        their arguments are known."""
        unknown = self.environment or self.ahead or self.config.reference.offload
        if step == self.total_steps or unknown or not precompile.pays_off(self.mesh):
            yield
            return
        rollout = self.sampler.shapes(self.prompts(step))
        compiler = precompile.BackgroundCompiler(
            self.programs, rollout, self.annotate_arguments, self.update_arguments, self.spec
        )
        self._compiler = compiler
        try:
            yield
        finally:
            compiler.close()

    def _await_programs(self, session: Session | None, rollout: Rollout) -> None:
        """Wait for the programs of an update on this rollout, if they are being compiled in the background; the session
        may be asked to stop meanwhile."""
        if session and self._compiler:
            with session.clock.spent("compile"):
                self._compiler.wait(rollout)
            self._compiler = None

    def _calibrate_scores(self) -> None:
        """With `scores.normalise: reference`, measure mean and deviation of the scores of the initial policy, once."""
        config, stats, size = self.config, self.state.value.score_stats, self.config.settings.batch_size
        if config.scores.normalise != "reference" or float(stats.seen) > 0:
            return
        if not self.data:
            raise ConfigError("scores.normalise is 'reference', which answers prompts of data.path, and that is empty")

        def scored() -> Iterator[Scored]:
            for batch in range(-(-config.scores.reference_samples // size)):
                rows = self.prompts(batch)
                rollout, completions = self.generate(rows, CALIBRATION - batch)
                yield self.scorer.score_rows(rows, completions, rollout)

        stats = reference_stats(scored(), stats)
        placed = sharding.put_whole(sharding.fetch(stats), self.mesh)
        self.state.value = dataclasses.replace(self.state.value, score_stats=placed)

    def _end_update(
        self, session: Session, step: int, metrics: Metrics, batch: ScoredRollout | Sequence[dict[str, Any]]
    ) -> None:
        """Validate, log and save what is due after update number `step` (from 1), whose metrics are given. `batch` are
        its responses, or the samples of them that were kept when a signal ended its validation."""
        evaluation = {}
        if self.validator.due(step, self.total_steps):
            samples = self._samples(step, batch)
            evaluation = self.validator.run(session, step, metrics, self.params, lambda: self.reference, samples)
        session.log(step, metrics | evaluation)
        self._log_samples(session, step, batch, evaluation)
        session.save_if_due(step, evaluation)

    def _samples(self, step: int, batch: ScoredRollout | Sequence[dict[str, Any]]) -> Sequence[dict[str, Any]]:
        """The sample completions to log of update number `step` (from 1); none if they are not due."""
        if not isinstance(batch, ScoredRollout):
            return batch
        return batch.samples()[: self.config.logging.num_samples] if self._samples_due(step) else ()

    def _progress(self, batch: ScoredRollout, step: int) -> Metrics:
        """Timings and progress of update number `step`, for its record."""
        return batch.metrics | {
            "episode": (step + 1) * self.config.settings.batch_size,
            "tokens/identical": 1 - len(set(batch.completions)) / len(batch.completions),
            **prompts.epochs(self.config, self.data, step + 1),
        }

    def _samples_due(self, step: int) -> bool:
        """Return True if samples are due of update number `step` (from 1): the first, every `logging.sample_every`-th
        after it, and the last."""
        every = self.config.logging.sample_every
        return every > 0 and ((step - 1) % every == 0 or step == self.total_steps)

    def _token_record(self, session: Session | None, step: int, batch: ScoredRollout) -> TokenRecord | None:
        """The token record of update number `step` (from 1), before it, if one is due."""
        if session is None or not self.config.logging.token_samples or not self._samples_due(step):
            return None
        return self.token_records.before(self.params, batch)

    def _log_samples(
        self, session: Session, step: int, batch: ScoredRollout | Sequence[dict[str, Any]], evaluation: Metrics
    ) -> None:
        """Log sample completions of update number `step` (from 1) if they are due."""
        if self._samples_due(step):
            with session.clock.spent("evaluation"):
                session.log_samples(step, self._samples(step, batch))
                if isinstance(batch, ScoredRollout):
                    session.logger.histograms(step, batch.distributions())
            self._log_fixed_prompts(session, step, evaluation)

    def _log_fixed_prompts(self, session: Session, step: int, evaluation: Metrics) -> None:
        """Complete the prompts of the first update again after update number `step` (from 1), if it is due."""
        if self.fixed_prompts.due(step):
            with session.sampling(step, evaluation):
                self.fixed_prompts.log(session, step, self.prompts(0), self.generate)

    def _finish(self, session: Session) -> dict[str, float]:
        """Save the last state and export it, or the best one; returns the metrics of the last update."""
        last = session.finish()
        session.restore_best()
        step = int(self.state.value.step)
        self._results = session.record_of(step) if step else self.validator.before
        session.export(self.save_pretrained)
        return last

    def _save(
        self, directory: str | Path, model: ModelConfig, params: Params, config: Config, merge_lora: bool
    ) -> Path:
        return pretrained.save(
            directory,
            model,
            params,
            config,
            self.tokenizer,
            step=int(self.state.value.step),
            results=self._results,
            origin=self._origin,
            merge_lora=merge_lora,
        )

    def _about(self) -> list[str]:
        """Model, devices and data of the run, notes on its options, and who will be asked about completions."""
        config, total = self.config, self.total_steps
        report = self.data.report if self.data else f"no data set: prompts come with {config.method}_step"
        return [
            setup.describe(config, self.model, self.tokenizer, report, self.mesh),
            *description.notes(config, total, self.scorer, self.environment, self.teacher),
            *description.questions(config, total, self.scorer, self.validator),
        ]

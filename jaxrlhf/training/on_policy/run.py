"""What every on-policy run has, whatever learns in it: prompts, a sampler, rewards, held-out prompts."""

import dataclasses
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding, weights
from jaxrlhf.config import GRPO, PPO, GRPOConfig, LoRA, PPOConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, columns, prompt_rows
from jaxrlhf.data.loader import rows_at
from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.rewards.compose import Scored, Scorer
from jaxrlhf.rewards.sources.model import RewardModel
from jaxrlhf.training import setup
from jaxrlhf.training.on_policy import checks
from jaxrlhf.training.on_policy.learner import Learner
from jaxrlhf.training.on_policy.sampler import Sampler
from jaxrlhf.training.on_policy.validation import Validator
from jaxrlhf.training.session import Metrics
from jaxrlhf.types import Params, Rollout

CALIBRATION = 2**31 - 1  # folded into the run's key in place of an update's number


class Answers(NamedTuple):
    """A rollout and what it is worth."""

    rows: Sequence[PromptRow]  # a row per response
    texts: list[str]
    rollout: Rollout
    scored: Scored
    metrics: Metrics  # of how it came about
    greedy: tuple[Rollout, np.ndarray] | None = None  # the greedy response to each row's prompt, its score f32 [B]


class Online:
    """A run of `method`, whose section of `config` is `settings`, with `group` responses to a prompt, but for what
    learns: a trainer makes that of what `load` returns, and hands it to `take`.

    Raises ConfigError for what the config, the data and descriptions of the models contradict, before weights are read.
    """

    learner: Learner

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
        self.group, self.fresh = group, fresh
        if config.sampling.greedy:
            raise ConfigError(f"sampling.greedy is true: {method} learns from samples; leave it false")
        self.mesh = sharding.make_mesh(config.mesh)
        init_key, self.run_key, *role_keys = setup.keys(config.seed)
        self._init_key, self.role_keys = init_key, (role_keys[0], role_keys[1])
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.data = prompt_rows(config.data, self.tokenizer) if config.data.path else None
        self.model = setup.model_config(config.model, self.tokenizer, "lm", config.lora)
        prompts = [len(row.tokens) for row in [*self.data.train, *self.data.validation]] if self.data else []
        longest, size = max(prompts, default=0), settings.batch_size
        self.sampler = Sampler(
            config.sampling, config.rollout, self.model, self.tokenizer, self.mesh, longest, size, group
        )
        self.scorer = Scorer(config.reward, self.tokenizer, reward, mesh=self.mesh, directory=Path(config.run_dir))
        self.total_steps = self._updates()
        self.longest = longest  # of the prompts that are known of, in tokens
        checks.check_run(method, config, settings, self.mesh)
        held_out, rows = self.data.validation if self.data else [], settings.annotation_rows(size)
        self.validator = Validator(config, held_out, rows, self.sampler, self.scorer) if held_out else None
        self.results: dict[str, float] = {}  # the record of what is exported
        self._compiling: Future[Rollout] | None = None

    def load(self, *, ahead: bool, abstract: bool, own: RewardModel | None = None) -> Params:
        """The policy's parameters, or their shapes; loads the reward models too, with adapters over the policy's own
        arrays where both are of one model, but for `own`.

        With `ahead`, the rollout is compiled meanwhile.
        """
        config, storage = self.config, setup.param_dtype(self.config)
        if ahead:
            self.check_reward()
            self._compiling = self._compile_rollout(self.rows(0)) if self.data else None
        if abstract:
            policy = setup.param_shapes(self.model, storage, self.mesh, LoRA())
        else:
            policy = setup.load_model(
                config.model, tokenizer=self.tokenizer, mesh=self.mesh, key=self._init_key, head="lm", storage=storage
            )
        folder, merged = weights.described_by(weights.resolve(config.model.path, config.model.revision, weights=False))
        for judge in self.scorer.models.values() if config.lora.enabled and not merged else ():
            if judge is not own:
                judge.share_base_params(folder, policy)
        self.scorer.load(abstract=abstract)
        return policy

    def take(self, learner: Learner, *, abstract: bool) -> None:
        """Let `learner` be what learns; what `load` began to compile goes on with its programs."""
        self.learner = learner
        if not abstract:
            self.sampler.check_memory()
        if self._compiling:
            self._compile(self._compiling)

    def describe(self) -> str:
        """What a run works with, and the first prompt as the model sees it."""
        self.check_reward()
        report = self.data.report if self.data else f"no data set: prompts come with {self.method}_step"
        about = setup.describe(self.config, self.model, self.tokenizer, report, self.mesh)
        first = ["first prompt:", self.data.train[0].text] if self.data else []
        updates = f"{self.total_steps} updates of {self.settings.batch_size} completions"
        return "\n".join([about, updates, *self.questions(), *first])

    def answer(
        self,
        rows: Sequence[PromptRow],
        step: int,
        stop: Callable[[], None] = lambda: None,
        *,
        use: int = 0,
        greedy: bool = False,
    ) -> Answers:
        """Responses of the policy as it is now to a prompt per row, scored; `stop` is called wherever a run may end.
        `use` picks the random keys, as in `key`."""
        started = time.monotonic()
        rollout, texts = self.sampler.generate(self.learner.policy, rows, self.key(step, use), greedy=greedy)
        stop()
        generated = time.monotonic()
        scored = self._score(rows, texts, rollout, step + 1)
        stop()
        seconds, tokens = generated - started, int(np.sum(jax.device_get(rollout.response_mask)))
        metrics = {
            "perf/rollout_seconds": seconds,
            "perf/reward_seconds": time.monotonic() - generated,
            "perf/response_tokens_per_second": tokens / seconds,
        }
        return Answers(rows, texts, rollout, scored, metrics)

    def key(self, step: int, use: int) -> jax.Array:
        """The random key of a use (0: the rollout, 1: the update's order, from 2 on: further rollouts) in update number
        `step`."""
        return jax.random.fold_in(jax.random.fold_in(self.run_key, step), use)

    def rows(self, step: int) -> list[PromptRow]:
        """The prompts of update number `step`, each `group` times."""
        return self.drawn(step, self.config.seed)

    def drawn(self, number: int, seed: int) -> list[PromptRow]:
        """Batch `number` of the prompts in the order that `seed` gives, each `group` times."""
        assert self.data
        rows, prompts = self.data.train, self.settings.batch_size // self.group
        order = rows_at(number, prompts, len(rows), seed, self.config.data.shuffle)
        return repeated([rows[i] for i in order], self.group)

    def compile(self) -> None:
        """Begin to compile the programs of an update, unless `load` has begun."""
        if not self._compiling:
            self._compiling = self._compile_rollout(self.rows(0))
            self._compile(self._compiling)

    def compile_longest(self) -> None:
        """Compile every program of an update whose prompts are the longest there are, of which parameters may be
        shapes. ConfigError without prompts."""
        if not self.data:
            raise ConfigError(
                "data.path is empty: how long prompts are decides what an update needs; give a file of them"
            )
        rollout = self._compile_rollout(batching.longest(self.data.train, self.settings.batch_size))
        self.scorer.compile(self.sampler.programs, self.sampler.columns + self.config.sampling.response_length)
        self._compile(rollout)
        self.sampler.programs.finish()

    def calibrate(self) -> None:
        """With `scores.normalise: reference`, the scores' mean and deviation under the policy of step 0, once."""
        state, config = self.learner.state.value, self.config
        if config.scores.normalise != "reference" or float(state.score_stats.seen) > 0:
            return
        if not self.data:
            raise ConfigError("scores.normalise is 'reference', which answers prompts of data.path, and that is empty")
        stats = state.score_stats
        for part in range(-(-config.scores.reference_samples // self.settings.batch_size)):
            batch = self.rows(part)
            rollout, texts = self.sampler.generate(self.learner.policy, batch, self.key(CALIBRATION - part, 0))
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
        placed = sharding.put_whole(jax.device_get(stats), self.mesh)
        self.learner.state.value = dataclasses.replace(state, score_stats=placed)

    def check_reward(self) -> None:
        """Ask the reward about the data's columns."""
        if self.data:
            rows = self.data.train
            self.scorer.check([row.text for row in rows], columns(rows), [row.messages for row in rows])

    def _updates(self) -> int:
        """How many updates the run has."""
        settings = self.settings
        if settings.num_train_epochs is None:
            return -(-settings.total_episodes // settings.batch_size)
        if not self.data:
            raise ConfigError(
                f"{self.method}.num_train_epochs counts passes over data.path, which is empty; use total_episodes"
            )
        return max(1, -(-round(settings.num_train_epochs * len(self.data.train) * self.group) // settings.batch_size))

    def questions(self) -> list[str]:
        """What a person is in for, if one is asked."""
        config, size, validations = self.config, self.settings.batch_size, 0
        if not self.scorer.has_human:
            return []
        asked = [f"{size} in each of {self.total_steps} updates"]
        if self.validator:
            validations = 1 + sum(self.validator.due(step, self.total_steps) for step in range(1, self.total_steps + 1))
            asked.append(f"{2 * len(self.validator.rows)} in each of {validations} validations")
        if config.scores.normalise == "reference":
            asked.append(f"{-(-config.scores.reference_samples // size) * size} before training, for scores.normalise")
        return [f"a person is asked about completions: {', '.join(asked)}; about the same one only once"]

    def identities(self) -> dict[str, str]:
        """What a config does not pin down, and a hash of it."""
        assert self.data
        judges = [judge.params for judge in self.scorer.models.values()]
        return {
            "prompts": setup.fingerprint(self.data.train),
            "held-out prompts": setup.fingerprint(self.validator.rows if self.validator else ()),
            "reference": self.learner.identity,
            "reward model": setup.params_fingerprint(judges[0] if len(judges) == 1 else judges or {}),
        }

    def _score(self, rows: Sequence[PromptRow], texts: list[str], rollout: Rollout, step: int | None = None) -> Scored:
        asked = [row.text for row in rows], texts, rollout, columns(rows)
        return self.scorer.score(*asked, step, [row.messages for row in rows])

    def _compile(self, rollout: Future[Rollout]) -> None:
        self.learner.compile(rollout, self.run_key, per_token=self.scorer.per_token)

    def _compile_rollout(self, rows: Sequence[PromptRow]) -> Future[Rollout]:
        """Begin to compile the rollout of `rows`. Returns the shapes of the rollout to come."""
        policy = setup.param_shapes(self.model, setup.param_dtype(self.config), self.mesh, self.config.lora)
        return self.sampler.compile(policy, rows, self.run_key)


def repeated(rows: Sequence[PromptRow], times: int) -> list[PromptRow]:
    """Each row so many times, side by side."""
    return [row for row in rows for _ in range(times)]

"""PPO: three jitted calls and one host hop per update (generate, score, annotate, update)."""

import collections
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jaxrlhf import programs, sharding, weights
from jaxrlhf.config import PPOConfig
from jaxrlhf.data import batching
from jaxrlhf.data.datasets import PromptRow, columns, prompt_rows, prompts_from_texts
from jaxrlhf.data.loader import rows_at
from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.rewards.compose import Scored, Scorer
from jaxrlhf.rollout import engine
from jaxrlhf.rollout.decode import generate, trim
from jaxrlhf.rollout.inference_copy import RolloutDType, convert, inference_copy, inference_model
from jaxrlhf.rollout.sampling import check_sampling
from jaxrlhf.rollout.text import response_texts
from jaxrlhf.training import loop, setup
from jaxrlhf.training.loop import Metrics
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.ppo_update import Roles, annotate, make_critic, update
from jaxrlhf.types import Experience, Params, Prompts, Rollout

_LOWER = "data.max_prompt_length or sampling.response_length"


class PPOTrainer:
    """Train `config.model` to score well by a reward model, by `reward`, or by both, without leaving its reference far.

    `reward(prompts, completions, **columns) -> list[float | None]` is a function in place of `config.reward.function`;
    it runs in this process and cannot be killed, as one that the config names can.
    `.train()` runs `config`; `.ppo_step(prompts)` is one update on prompts of your own; `.save_pretrained(directory)`.
    What can be wrong with the config, the data or the models is raised here, before training begins.
    """

    def __init__(
        self,
        config: PPOConfig,
        reward: Callable[..., Sequence[float | None]] | None = None,
        *,
        fresh: bool = False,
        ahead: bool = False,
    ) -> None:
        self.config, self._fresh = config, fresh
        self._programs = programs.Ahead()
        ppo, sampling = config.ppo, config.sampling
        if sampling.greedy:
            raise ConfigError("sampling.greedy is true: PPO learns from samples; leave it false")
        if config.data.validation_path or config.data.validation_fraction:
            raise ConfigError(
                "data.validation_path and data.validation_fraction have no use in PPO: nothing would look at the rows "
                "held out. Keep them in a file of their own, for `jaxrlhf evaluate`"
            )
        self.mesh = sharding.make_mesh(config.mesh)
        micro = ppo.micro_batch_size or ppo.batch_size // ppo.num_mini_batches
        sharding.check_rows(micro, self.mesh, "ppo.micro_batch_size, or a mini-batch without it,")
        init_key, self._key, critic_key = jax.random.split(jax.random.key(config.seed), 3)
        self.tokenizer = weights.open_tokenizer(config.tokenizer, config.model)
        self.data = prompt_rows(config.data, self.tokenizer) if config.data.path else None
        self.model = setup.model_of(config.model, self.tokenizer, "lm")
        self._rollout_dtype: RolloutDType = self.model.dtype if config.rollout.dtype == "auto" else config.rollout.dtype
        check_sampling(sampling, self.model.vocab_size)
        lengths = [len(row.tokens) + sampling.response_length for row in self.data.train] if self.data else []
        slots, self._columns = config.rollout.slots, 0  # columns that every prompt fits in, so that programs are few
        if lengths:
            setup.check_context(lengths, self.model, "the longest prompt with its response", _LOWER)
            room = self.model.max_positions - sampling.response_length
            self._columns = batching.bucket(max(lengths) - sampling.response_length, room)
        if 0 < slots < ppo.batch_size:
            sharding.check_rows(slots, self.mesh, "rollout.slots")
        storage = setup.trained_dtype(config.model)
        self.scorer = Scorer(config.reward, self.tokenizer, reward, mesh=self.mesh, directory=Path(config.run_dir))
        if ahead:
            self._check_reward()
        rollout = self._compile_rollout(setup.shapes_of(self.model, storage, self.mesh)) if ahead else None
        _, policy = setup.load_model(
            config.model, tokenizer=self.tokenizer, mesh=self.mesh, key=init_key, head="lm", storage=storage
        )
        self.scorer.load()
        judge = self.scorer.model and (self.scorer.model.model, self.scorer.model.params)
        if config.critic.init == "reward" and not self.scorer.shares_tokenizer:
            raise ConfigError(
                "critic.init is 'reward' but the reward model reads other tokens than the policy; use 'policy'"
            )
        for reader in self.scorer.readers(config.critic.init == "reward") if lengths else []:
            what = f"for the reward model {reader.path}, the longest prompt with its response"
            setup.check_context(lengths, reader.model, what, _LOWER)
        reference = setup.copy(
            policy, self.model.dtype if config.reference_dtype == "auto" else config.reference_dtype, self.mesh
        )
        critic_model, critic, trunk = make_critic(config, self.model, policy, reference, judge, self.mesh, critic_key)
        self.frozen = {"reference": reference, "critic": trunk}
        self.total_steps = -(-ppo.total_episodes // ppo.batch_size)
        steps = self.total_steps * ppo.num_ppo_epochs * ppo.num_mini_batches
        rate = config.optim.learning_rate
        self._optimizers = {
            "policy": make_optimizer(config.optim, rate, steps),
            "critic": make_optimizer(config.optim, config.critic.learning_rate or rate, steps),
        }
        self.roles = Roles(
            policy=self.model,
            critic=critic_model,
            optimizers=tuple(self._optimizers.items()),
            ppo=ppo,
            temperature=sampling.temperature,
            trunk="trained" if not trunk else "reference" if config.critic.init == "policy" else "frozen",
            mesh=self.mesh,
        )
        self.state = setup.State({"policy": policy, "critic": critic}, self._optimizers, self.mesh, ppo.kl_coef)
        engine.check_slots(  # now that everything else has its place
            inference_model(self.model, self._rollout_dtype),
            min(slots or ppo.batch_size, ppo.batch_size),
            self._columns + sampling.response_length,
            self.mesh,
        )
        if rollout:
            self._compile_update(rollout)
        self._begun = ahead
        self._results: dict[str, float] = {}

    @property
    def params(self) -> Params:
        """The policy's parameters as they are now."""
        return self.state.value.params["policy"]

    def _check_reward(self) -> None:
        if self.data:
            rows = self.data.train
            self.scorer.check([row.text for row in rows], columns(rows), [row.messages for row in rows])

    def describe(self) -> str:
        """What `.train()` works with, and the first prompt as the model sees it."""
        self._check_reward()
        report = self.data.report if self.data else "no data set: prompts come with ppo_step"
        about = setup.describe(self.config, self.model, self.tokenizer, report, self.mesh)
        first = f"\nfirst prompt:\n{self.data.train[0].text}" if self.data else ""
        return f"{about}\n{self.total_steps} updates of {self.config.ppo.batch_size} completions{first}"

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last update's metrics."""
        config = self.config
        if not self.data:
            raise ConfigError("data.path is empty: give a file of prompts, or call ppo_step with prompts of your own")
        rows, size, sample_every = self.data.train, config.ppo.batch_size, config.logging.sample_every
        self._check_reward()
        judges = [judge.params for judge in self.scorer.models.values()]
        identity = {
            "prompts": setup.fingerprint(rows),
            "reference": setup.params_fingerprint(self.frozen["reference"]),
            "reward model": setup.params_fingerprint(judges[0] if len(judges) == 1 else judges or {}),
        }
        with loop.session(config, "ppo", self.total_steps, self.state, identity, fresh=self._fresh) as session:
            session.logger.note(setup.describe(config, self.model, self.tokenizer, self.data.report, self.mesh))
            if not self._begun and (rollout := self._compile_rollout(self.state.template.params["policy"])):
                self._compile_update(rollout)
            self.scorer.pause(session.logger.paused)
            done = session.resume(self.state)
            metrics = session.last()
            for step in range(done, self.total_steps):
                batch = [rows[i] for i in rows_at(step, size, len(rows), config.seed, config.data.shuffle)]
                jax.block_until_ready(self.state.value.step)  # the update before is not the rollout's time
                started = time.monotonic()
                rollout, texts = self.generate(batch, step)
                session.stop_if_asked(step, self.state.value)
                generated = time.monotonic()
                try:
                    scored = self._score(batch, texts, rollout, step + 1)
                except RewardError as error:
                    if step > done:
                        session.save(step, self.state.value, block=True)
                    saved = f"{step} updates are saved; once that is mended, the same command goes on"
                    raise RewardError(f"{error}\n{saved if step else 'Nothing has been trained yet'}") from error
                session.stop_if_asked(step, self.state.value)
                ended = time.monotonic()
                for note in scored.notes:
                    session.logger.note(note)
                metrics = self.learn(rollout, scored.scores, step, scored.token_scores)[1] | scored.metrics
                tokens = int(np.sum(jax.device_get(rollout.response_mask)))
                metrics |= {
                    "episode": (step + 1) * size,
                    "perf/rollout_seconds": generated - started,
                    "perf/reward_seconds": ended - generated,
                    "perf/response_tokens_per_second": tokens / (generated - started),
                }
                session.log(step + 1, metrics)
                if sample_every and (step % sample_every == 0 or step + 1 == self.total_steps):
                    session.flush()
                    session.logger.samples(step + 1, show(batch, texts, scored.totals)[: config.logging.num_samples])
                saved = session.due(step + 1)
                if saved:
                    session.save(step + 1, self.state.value)
                session.stop_if_asked(step + 1, self.state.value, saved=saved)
            session.flush()
            self._results = {k: float(v) for k, v in metrics.items()}
            session.logger.note(f"exported to {self.save_pretrained(session.run.directory / 'export')}")
        return self._results

    def ppo_step(self, prompts: Sequence[str], **extra: Sequence[Any]) -> dict[str, Any]:
        """One update on `prompts`: generate, score, learn. `extra` columns go to the reward function, a value a prompt.

        Returns `generated_texts`, `rewards` (the score of each), `policy_loss`, `value_loss`, and every other metric of
        the update under its logged name. The number of prompts must be a multiple of `ppo.num_mini_batches` (and of the
        micro-batch, if one is set); each new number compiles once.
        """
        ppo, step = self.config.ppo, int(self.state.value.step)
        if isinstance(prompts, str):
            raise ConfigError("ppo_step got one text; it takes a list of prompts")
        multiple = ppo.num_mini_batches * (ppo.micro_batch_size or 1)
        if not prompts or len(prompts) % multiple:
            raise ConfigError(f"ppo_step got {len(prompts)} prompts; it needs a positive multiple of {multiple}")
        micro = ppo.micro_batch_size or len(prompts) // ppo.num_mini_batches
        sharding.check_rows(micro, self.mesh, "ppo_step: rows of a forward pass")
        if step >= self.total_steps and self.config.optim.schedule != "constant":
            raise ConfigError(
                f"the learning rate schedule ended after {self.total_steps} updates (ppo.total_episodes / "
                "ppo.batch_size); raise ppo.total_episodes or set optim.schedule: constant"
            )
        rows = prompts_from_texts(prompts, extra, self.config.data, self.tokenizer)
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

    def _score(self, rows: Sequence[PromptRow], texts: list[str], rollout: Rollout, step: int | None = None) -> Scored:
        asked = [row.text for row in rows], texts, rollout, columns(rows)
        return self.scorer.score(*asked, step, [row.messages for row in rows])

    def generate(self, rows: Sequence[PromptRow], step: int) -> tuple[Rollout, list[str]]:
        """Responses of the policy as it is now to prompts, on the device and as text; `step` picks the random keys."""
        sampling = self.config.sampling
        prompts = self._prompts(rows)
        self._programs.wait(convert)
        model, copy = inference_copy(self.model, self.params, self._rollout_dtype)
        key = jax.random.fold_in(jax.random.fold_in(self._key, step), 0)
        rest = key, sampling, self.tokenizer.stop_ids, self.tokenizer.pad_id
        slots = self.config.rollout.slots or len(rows)
        if slots < len(rows):
            self._programs.wait(engine.answer)
            made = engine.answer(copy, model, prompts, *rest, slots=slots, columns=self._columns, mesh=self.mesh)
            made = sharding.put_rows(made, self.mesh)
        else:
            self._programs.wait(generate)
            made = generate(copy, model, prompts, *rest)
        rollout = trim(made)
        return rollout, response_texts(rollout, self.tokenizer)

    def _prompts(self, rows: Sequence[PromptRow]) -> Prompts:
        """Prompts of one length, in place. Raises ConfigError where there is no room for the response."""
        reserved = self.config.sampling.response_length
        lengths = [len(row.tokens) + reserved for row in rows]
        setup.check_context(lengths, self.model, "the longest prompt with its response", _LOWER)
        length = batching.bucket(max(len(row.tokens) for row in rows), self.model.max_positions - reserved)
        return sharding.put_rows(batching.prompts(rows, self.tokenizer.pad_id, length, occurrences(rows)), self.mesh)

    def _compile_rollout(self, policy: Params) -> Future[Rollout] | None:
        """Begin to compile the first rollout; `policy` may be shapes. Returns the shapes of the rollout to come."""
        config, size = self.config, self.config.ppo.batch_size
        if not self.data:
            return None
        chosen = rows_at(0, size, len(self.data.train), config.seed, config.data.shuffle)
        prompts = self._prompts([self.data.train[i] for i in chosen])
        model = inference_model(self.model, self._rollout_dtype)
        rest = self._key, config.sampling, self.tokenizer.stop_ids, self.tokenizer.pad_id
        copy = self._programs.compile(convert, policy, self.model, model)
        if not 0 < config.rollout.slots < size:
            return self._programs.begin(
                lambda: programs.outputs(generate, copy.result(), model, prompts, *rest), generate
            )
        where = {"slots": config.rollout.slots, "columns": self._columns, "mesh": self.mesh}
        self._programs.begin(lambda: engine.prepare(copy.result(), model, prompts, *rest, **where), engine.answer)

        def shapes() -> Rollout:
            made = jax.eval_shape(generate, copy.result(), model, prompts, *rest)
            return jax.tree.map(lambda x: sharding.rows_shape(x, self.mesh), made)

        return self._programs.begin(shapes, engine.answer)

    def _compile_update(self, rollout: Future[Rollout]) -> None:
        """Begin to compile what learns from a rollout of full length."""
        size, length = self.config.ppo.batch_size, self.config.sampling.response_length
        scores = sharding.put_rows(np.zeros(size, np.float32), self.mesh)
        of_tokens = (
            sharding.put_rows(np.zeros((size, length), np.float32), self.mesh) if self.scorer.per_token else None
        )
        state, frozen, roles = self.state.template, self.frozen, self.roles
        made = self._programs.begin(
            lambda: programs.outputs(annotate, state, frozen, rollout.result(), scores, of_tokens, roles=roles),
            annotate,
        )
        self._programs.begin(
            lambda: programs.outputs(update, state, frozen, made.result()[0], self._key, roles=roles), update
        )

    def learn(
        self, rollout: Rollout, scores: np.ndarray, step: int, token_scores: np.ndarray | None = None
    ) -> tuple[Experience, Metrics]:
        """Annotate a scored rollout and make the update's optimizer steps; moves `state` on from `step`."""
        placed = sharding.put_rows(np.asarray(scores, np.float32), self.mesh)
        if token_scores is not None:
            token_scores = sharding.put_rows(np.asarray(token_scores, np.float32), self.mesh)
        if rollout.response_mask.shape[1] == self.config.sampling.response_length:  # else it is another program
            self._programs.wait(annotate)
            self._programs.wait(update)
        experience, before = annotate(self.state.value, self.frozen, rollout, placed, token_scores, roles=self.roles)
        key = jax.random.fold_in(jax.random.fold_in(self._key, step), 1)
        self.state.value, after = update(self.state.value, self.frozen, experience, key, roles=self.roles)
        rate = after.pop("policy/learning_rate")
        return experience, before | after | {"learning_rate": rate}

    def restore(self) -> int:
        """Take up the newest checkpoint of the run directory without training on; returns its step."""
        return loop.restore(self.config, self.state)

    def save_pretrained(self, directory: str | Path) -> Path:
        """Write the policy, its config and its tokenizer in Hugging Face layout."""
        return setup.export(
            directory, self.model, self.params, self.config, self.tokenizer,
            method="ppo", step=int(self.state.value.step), results=self._results,
        )  # fmt: skip


def occurrences(rows: Sequence[PromptRow]) -> list[int]:
    """How often each row's prompt came before in the batch: a repeated prompt needs another random stream."""
    seen: collections.Counter[int] = collections.Counter()
    numbers = []
    for row in rows:
        numbers.append(seen[row.index])
        seen[row.index] += 1
    return numbers


def show(rows: Sequence[PromptRow], texts: Sequence[str], scores: np.ndarray) -> list[dict[str, Any]]:
    """Records for the samples log."""
    return [
        {"prompt": row.text, "completion": text, "score": float(score)}
        for row, text, score in zip(rows, texts, scores, strict=True)
    ]

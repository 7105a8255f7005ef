"""PPO: three jitted calls and one host hop per update (generate, score, annotate, update)."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from jaxrlhf.config import PPOConfig
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.training import pretrained
from jaxrlhf.training.on_policy import checks as online_checks
from jaxrlhf.training.on_policy import loop as online_loop
from jaxrlhf.training.on_policy.run import Answers, Online
from jaxrlhf.training.ppo import checks
from jaxrlhf.training.ppo.learner import Learner
from jaxrlhf.training.ppo.roles import whole_critic
from jaxrlhf.training.session import Metrics
from jaxrlhf.types import Experience, Params, Rollout


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
        self.config = config
        self.online = online = Online("ppo", config, config.ppo, reward, group=1, fresh=fresh)
        self.mesh, self.tokenizer, self.data, self.model = online.mesh, online.tokenizer, online.data, online.model
        self.sampler, self.scorer, self.total_steps = online.sampler, online.scorer, online.total_steps
        from_reward = config.critic.init == "reward"
        checks.check_run(config, self.model, self.scorer, self.total_steps)
        readers = self.scorer.models_reading_rollouts(from_reward)
        online_checks.check_readers(readers, online.longest, config.sampling.response_length)
        # of the reward model that the critic starts from, adapters of its own come over the arrays
        policy = online.load(ahead=ahead, abstract=abstract, own=self.scorer.model if from_reward else None)
        judge = self.scorer.model and (self.scorer.model.model, self.scorer.model.params)
        self.learner = Learner(
            config, self.sampler, policy, judge, self.total_steps, online.role_keys, abstract=abstract
        )
        online.take(self.learner, abstract=abstract)
        self.state, self.frozen, self.roles = self.learner.state, self.learner.frozen, self.learner.roles

    @property
    def params(self) -> Params:
        """The policy's parameters as they are now, adapters and what is under them."""
        return self.learner.policy

    def describe(self) -> str:
        """What `.train()` works with, and the first prompt as the model sees it."""
        return self.online.describe()

    def train(self) -> dict[str, float]:
        """Train to the end, from the newest checkpoint if there is one; export; return the last update's metrics."""
        online = self.online
        return online_loop.train(
            online,
            lambda step, stop: online.answer(online.rows(step), step, stop),
            self._learn,
            self.save_pretrained,
        )

    def ppo_step(self, prompts: Sequence[str], **extra: Sequence[Any]) -> dict[str, Any]:
        """One update on `prompts`: generate, score, learn. `extra` columns go to the reward function, a value a prompt.

        Returns `generated_texts`, `rewards` (the score of each), `policy_loss`, `value_loss`, and every other metric of
        the update under its logged name. The number of prompts must be a multiple of `ppo.num_mini_batches` (and of the
        micro-batch, if one is set); each new number compiles once.
        """
        checks.check_step(self.config, prompts)
        made = online_loop.one_update(self.online, prompts, extra, self.online.answer, self._learn)
        return made | {"value_loss": made["loss/value_avg"]}

    def generate(self, rows: Sequence[PromptRow], step: int) -> tuple[Rollout, list[str]]:
        """Responses of the policy as it is now to prompts, on the device and as text; `step` picks the random keys."""
        return self.sampler.generate(self.params, rows, self.online.key(step, 0))

    def learn(
        self, rollout: Rollout, scores: np.ndarray, step: int, token_scores: np.ndarray | None = None
    ) -> tuple[Experience, Metrics]:
        """Annotate a scored rollout and make the update's optimizer steps; moves `state` on from `step`."""
        return self.learner.learn(rollout, scores, token_scores, self.online.key(step, 1))

    def _learn(self, answers: Answers, step: int) -> Metrics:
        return self.learn(answers.rollout, answers.scored.scores, step, answers.scored.token_scores)[1]

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
        return pretrained.save(
            directory, model, params, dataclasses.replace(self.config, model=source), self.tokenizer,
            method="ppo", step=int(self.state.value.step), results=self.online.results, merge_lora=merge_lora,
        )  # fmt: skip

    def compile_longest(self) -> None:
        """Compile every program of an update whose prompts are the longest there are, of which parameters may be
        shapes. ConfigError without prompts."""
        self.online.compile_longest()

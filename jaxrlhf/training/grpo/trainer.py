"""Group-relative policy optimisation: PPO's loop without a critic; responses to a prompt are each other's baseline."""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from jaxrlhf.config import GRPOConfig
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.training import pretrained
from jaxrlhf.training.grpo import rollouts
from jaxrlhf.training.grpo.learner import Learner
from jaxrlhf.training.on_policy import checks
from jaxrlhf.training.on_policy import loop as online_loop
from jaxrlhf.training.on_policy.run import Answers, Online
from jaxrlhf.training.session import Metrics
from jaxrlhf.types import Params


class GRPOTrainer:
    """Train `config.model` to score well by any sum of rewards, by `config.grpo.method`.

    `reward(prompts, completions, **columns) -> list[float | None]` is a function in place of `config.reward.function`;
    it runs in this process and cannot be killed, as one that the config names can.
    `.train()` runs `config`; `.grpo_step(prompts)` is one update on prompts of your own; `.save_pretrained(directory)`.
    What can be wrong with the config, the data or the models is raised here, before training begins. With `abstract`
    nothing is loaded and nothing can be trained: shapes stand for parameters, for `jaxrlhf plan`.
    """

    def __init__(
        self,
        config: GRPOConfig,
        reward: Callable[..., Sequence[float | None]] | None = None,
        *,
        fresh: bool = False,
        ahead: bool = False,
        abstract: bool = False,
    ) -> None:
        self.config = config
        group = config.grpo.num_generations
        self.online = online = Online("grpo", config, config.grpo, reward, group=group, fresh=fresh)
        self.mesh, self.tokenizer, self.data, self.model = online.mesh, online.tokenizer, online.data, online.model
        self.sampler, self.scorer, self.total_steps = online.sampler, online.scorer, online.total_steps
        readers = self.scorer.models_reading_rollouts(critic=False)
        checks.check_readers(readers, online.longest, config.sampling.response_length)
        policy = online.load(ahead=ahead, abstract=abstract)
        _, lora_key = online.role_keys
        self.learner = Learner(config, self.sampler, policy, self.total_steps, lora_key, abstract=abstract)
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
        return online_loop.train(self.online, self._answer, self._learn, self.save_pretrained)

    def grpo_step(self, prompts: Sequence[str], **extra: Sequence[Any]) -> dict[str, Any]:
        """One update on `grpo.num_generations` responses to each of `prompts`: generate, score, learn. `extra` columns
        go to the reward function, a value a prompt. Flat groups are not replaced.

        Returns `generated_texts` and `rewards`, those of a prompt side by side, `policy_loss`, and every other metric
        of the update under its logged name. Each new number of prompts compiles once.
        """
        return online_loop.one_update(self.online, prompts, extra, self._answered, self._learn)

    def save_pretrained(self, directory: str | Path, *, merge_lora: bool = False) -> Path:
        """Write the policy with its tokenizer, in Hugging Face layout; adapters alone unless `merge_lora`."""
        return pretrained.save(
            directory, self.model, self.params, self.config, self.tokenizer,
            method="grpo", step=int(self.state.value.step), results=self.online.results, merge_lora=merge_lora,
        )  # fmt: skip

    def compile_longest(self) -> None:
        """Compile every program of an update whose prompts are the longest there are, of which parameters may be
        shapes. ConfigError without prompts."""
        self.online.compile_longest()

    def _answer(self, step: int, stop: Callable[[], None]) -> Answers:
        refills = self.config.grpo.refills
        if refills:
            return rollouts.refilled(self.online, step, stop, refills)
        return self._answered(self.online.rows(step), step, stop)

    def _answered(self, rows: Sequence[PromptRow], step: int, stop: Callable[[], None] = lambda: None) -> Answers:
        if self.config.grpo.recipe.advantage == "greedy":
            return rollouts.with_greedy(self.online, rows, step, stop)
        return self.online.answer(rows, step, stop)

    def _learn(self, answers: Answers, step: int) -> Metrics:
        key = self.online.key(step, 1)
        return self.learner.learn(rollouts.set_apart(self.online, answers), answers.scored.totals, answers.greedy, key)[
            1
        ]

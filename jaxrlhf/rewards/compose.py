"""What a completion is worth: the weighted sum of a reward model and a reward function."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from jaxrlhf.config import RewardSource
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError
from jaxrlhf.rewards.functions import RewardFunction, load
from jaxrlhf.rewards.model import RewardModel
from jaxrlhf.types import Rollout


class Scorer:
    """The reward of a run. `function`, a Python callable, stands in for `config.function`.

    Raises ConfigError if there is neither model nor function, RewardError or DataError if one cannot be loaded.
    """

    def __init__(
        self,
        config: RewardSource,
        tokenizer: Tokenizer,
        function: Callable[..., Any] | None = None,
        *,
        mesh: jax.sharding.Mesh | None = None,
    ) -> None:
        if function is not None and config.function:
            raise ConfigError(f"two reward functions: a Python one and reward.function '{config.function}'; give one")
        self.config = config
        self.function = RewardFunction(function) if function is not None else None
        if config.function:
            self.function = load(config.function)
        self.model: RewardModel | None = None
        self.shares_tokenizer = False
        if config.model:
            self.model = RewardModel(
                config.model,
                revision=config.revision,
                dtype=config.model_dtype,
                micro_batch_size=config.micro_batch_size,
                mesh=mesh,
            )
            self.shares_tokenizer = self.model.shares_tokenizer(tokenizer)
        if self.model is None and self.function is None:
            raise ConfigError("no reward: give reward.model, reward.function (path.py:name), or a Python function")

    def score(
        self,
        prompts: Sequence[str],
        completions: Sequence[str],
        rollout: Rollout,
        columns: Mapping[str, Sequence[Any]],
        step: int | None = None,
    ) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        """(scores f32 [B], components {name: f32 [B]}), the components before their weights.

        The names are `model` and the function's own. Beside them stand `model_truncated`, 1 where the text lost its
        beginning to fit the reward model's context, and `<function>_unanswered`, 1 where there was no opinion.
        """
        total = np.zeros(len(completions), np.float32)
        components: dict[str, np.ndarray] = {}
        if self.model is not None:
            if self.shares_tokenizer:
                components["model"], truncated = self.model.score_rollout(rollout)
            else:
                finished = np.asarray(rollout.finished).tolist()
                components["model"], truncated = self.model.score_texts(prompts, completions, finished)
            components["model_truncated"] = truncated.astype(np.float32)
            total += np.float32(self.config.model_weight) * components["model"]
        if self.function is not None:
            name = self.function.label if self.function.label != "model" else "function"
            components[name], unanswered = self.function(prompts, completions, columns, step)
            components[f"{name}_unanswered"] = unanswered.astype(np.float32)
            total += np.float32(self.config.function_weight) * components[name]
        return total, components

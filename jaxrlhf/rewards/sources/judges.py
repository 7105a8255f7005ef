"""Who judges: what each kind of component is opened as."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from jaxrlhf.config import Component
from jaxrlhf.errors import ConfigError
from jaxrlhf.rewards.functions import RewardFunction
from jaxrlhf.rewards.sources import template
from jaxrlhf.rewards.sources.endpoint import Endpoint
from jaxrlhf.rewards.sources.human import Human
from jaxrlhf.rewards.sources.model import RewardModel
from jaxrlhf.rewards.sources.worker import Worker

Judge = RewardModel | RewardFunction | Worker | Endpoint | Human


def open_judge(
    component: Component,
    function: Callable[..., Any] | None,
    mesh: jax.sharding.Mesh | None,
    directory: Path | None,
    *,
    whole: bool,
) -> Judge:
    """`function` is the one that was passed, `whole`: it has all the time it takes, as in the short form.

    Raises ConfigError, DataError or RewardError for what cannot be opened.
    """
    if component.template:
        template.fields(component.template)
    if component.model:
        return RewardModel(
            component.model,
            revision=component.revision,
            dtype=component.dtype,
            micro_batch_size=component.micro_batch_size,
            max_length=component.max_length,
            mesh=mesh,
        )
    if component.function == "passed":
        if function is None:
            raise ConfigError(
                "reward.components has function: passed, and no Python function was given; give one to the trainer "
                "(PPOTrainer(config, reward=...)), or name it as path.py:name"
            )
        return RewardFunction(function, options=component.options, timeout=None if whole else component.timeout)
    if component.function:
        return Worker(component.function, options=component.options, timeout=component.timeout)
    if component.url:
        return Endpoint(component.url, timeout=component.timeout)
    assert component.human
    return Human(component.human, directory / "human.jsonl" if directory else None)

"""The prompts of each update of an on-policy run, the number of updates, and the widths of their batches."""

import jax

from jaxrlhf.config import GRPOConfig, PPOConfig
from jaxrlhf.data.datasets import PromptRow, Split
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig
from jaxrlhf.training import setup

Data = Split[PromptRow]


def total_steps(config: PPOConfig | GRPOConfig, data: Data | None) -> int:
    """Number of updates of a run. Raises ConfigError if it counts passes over data that are not there."""
    settings = config.settings
    if settings.num_train_epochs is None:
        return -(-settings.total_episodes // settings.batch_size)
    if not data:
        raise ConfigError(
            f"{config.method}.num_train_epochs counts passes over data.path, which is empty; use total_episodes"
        )
    episodes = round(settings.num_train_epochs * len(data.train) * settings.group)
    return max(1, -(-episodes // settings.batch_size))


def at(config: PPOConfig | GRPOConfig, data: Data, step: int, seed: int | None = None) -> list[PromptRow]:
    """The prompts of update number `step` (from 0), each repeated `group` times, in the order that `seed` (default: the
    run's) gives."""
    settings = config.settings
    order = data.rows_at(
        step, settings.batch_size // settings.group, config.seed if seed is None else seed, config.data.shuffle
    )
    return [row for row in (data.train[i] for i in order) for _ in range(settings.group)]


def epochs(config: PPOConfig | GRPOConfig, data: Data | None, updates: int) -> dict[str, float]:
    """Passes over each data set of a mixture after so many updates, refills aside; empty without a mixture."""
    settings = config.settings
    return data.epochs(updates * (settings.batch_size // settings.group)) if data and data.parts else {}


def few_widths(
    config: PPOConfig | GRPOConfig,
    data: Data | None,
    longest: int,
    steps: int,
    model: ModelConfig,
    mesh: jax.sharding.Mesh,
) -> tuple[int, ...]:
    """Columns of the prompts of a run of so many updates, the longest of which has `longest` tokens; empty without
    data. An update annotates rows and trains on them in each pass."""
    if not data or not data.train:
        return ()
    settings = config.settings
    rows = settings.batch_size * (1 + settings.optimizer_steps // settings.num_mini_batches)
    limit = max(model.max_positions - config.sampling.response_length, longest)

    def longest_at(step: int) -> int:
        return max(len(row.tokens) for row in at(config, data, step))

    return setup.few_widths(longest_at, steps, rows, model, mesh, limit)

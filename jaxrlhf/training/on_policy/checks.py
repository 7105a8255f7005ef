"""Errors of on-policy runs that are raised before weights are read or a response is generated."""

import math
from collections.abc import Sequence

import jax

from jaxrlhf import sharding
from jaxrlhf.config import GRPO, GRPOConfig, PPOConfig
from jaxrlhf.errors import ConfigError
from jaxrlhf.training import by_length
from jaxrlhf.training.on_policy.update import budget


def check_run(config: PPOConfig | GRPOConfig, mesh: jax.sharding.Mesh, columns: int) -> None:
    """Raise ConfigError for options that the devices do not support, or micro-batches that do not hold a row of so many
    columns."""
    for section in ("optim", "reference"):
        if getattr(config, section).offload:
            sharding.check_host_memory(mesh, f"{section}.offload")
    method, settings, size = config.method, config.settings, config.settings.batch_size
    sharding.check_rows(settings.micro_rows(size), mesh, f"{method}.micro_batch_size, or a mini-batch,")
    sharding.check_rows(settings.annotation_rows(size), mesh, f"{method}.local_rollout_forward_batch_size")
    if micro_batches := budget(settings, mesh):
        by_length.shapes(micro_batches, columns, size, texts=1)


def check_step(
    config: PPOConfig | GRPOConfig, mesh: jax.sharding.Mesh, prompts: Sequence[str], step: int, updates: int
) -> None:
    """Raise ConfigError for prompts that update number `step`, of a run of so many `updates`, cannot take."""
    method, settings, group = config.method, config.settings, config.settings.group
    if isinstance(prompts, str):
        raise ConfigError(f"{method}_step got one text; it takes a list of prompts")
    paired = isinstance(settings, GRPO) and settings.recipe.loss == "dpo"
    multiple = settings.num_mini_batches * (settings.micro_batch_size or 1)
    multiple //= math.gcd(multiple, 1 if paired else group)
    if not prompts or len(prompts) % multiple:
        raise ConfigError(f"{method}_step got {len(prompts)} prompts; it needs a positive multiple of {multiple}")
    rows = len(prompts) * group
    sharding.check_rows(settings.micro_rows(rows), mesh, f"{method}_step: rows of a forward pass")
    if settings.trained_rows(rows) % settings.annotation_rows(rows):
        raise ConfigError(
            f"{method}_step got {len(prompts)} prompts; {method}.local_rollout_forward_batch_size is "
            f"{settings.local_rollout_forward_batch_size}, which does not divide them"
        )
    if step >= updates and config.optim.schedule != "constant":
        raise ConfigError(
            f"the learning rate schedule ended after {updates} updates ({method}.total_episodes / "
            f"{method}.batch_size); raise {method}.total_episodes or set optim.schedule: constant"
        )

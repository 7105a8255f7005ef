"""A PPO config and rollout small enough for the checks of ppo.py."""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.config import Optim, PPOConfig
from jaxrlhf.rollout.text import shortened
from jaxrlhf.types import Rollout

ROWS = 4
"""Prompts per update."""


def small_config(config: PPOConfig, response_length: int) -> PPOConfig:
    """`config` in float32 on one device, with a batch of ROWS, without options that need a disk or more updates."""
    sampling, defaults = config.sampling, PPOConfig()
    sections = ("data", "reward", "environment", "scores", "reference", "rollout", "validation", "mesh")
    ppo = dataclasses.replace(
        config.ppo, batch_size=ROWS, total_episodes=ROWS, num_train_epochs=None, num_ppo_epochs=2, num_mini_batches=1
    )
    shorter = {"response_length": response_length, "min_length": min(sampling.min_length, response_length)}
    return dataclasses.replace(
        config,
        model=dataclasses.replace(config.model, param_dtype="float32", compute_dtype="float32", merged_path=""),
        sampling=dataclasses.replace(sampling, stop_strings=(), **shorter),
        ppo=dataclasses.replace(
            ppo, micro_batch_size=None, local_rollout_forward_batch_size=None, replay=0, target_kl=None
        ),
        # a large eps, as Adam amplifies rounding errors of gradients near zero by learning_rate / eps
        optim=Optim(learning_rate=1e-3, schedule="constant", eps=1e-3),
        critic=dataclasses.replace(config.critic, init="policy", warmup_updates=0, learning_rate=None),
        **{section: getattr(defaults, section) for section in sections},
    )


def zero_reward(completions: Sequence[str]) -> list[float]:
    """Placeholder reward; the checks use scores of their own."""
    return [0.0] * len(completions)


def with_uneven_lengths(rollout: Rollout, pad_id: int) -> Rollout:
    """Cut row i to (i + 1) / ROWS of the columns. With equal lengths, averaging per micro-batch would go unnoticed."""
    rollout = jax.device_get(rollout)
    columns = rollout.response_mask.shape[1]
    lengths = np.maximum(columns * np.arange(1, ROWS + 1) // ROWS, 1)
    mask = rollout.response_mask & (np.arange(columns) < lengths[:, None])
    finished = rollout.finished & (mask == rollout.response_mask).all(1)
    return jax.tree.map(jnp.asarray, shortened(rollout, mask, finished, pad_id))

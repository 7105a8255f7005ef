"""Rollouts kept to be learnt from again: all of one width, so that one program takes them."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.config import PPOConfig
from jaxrlhf.training.ppo.roles import Roles
from jaxrlhf.types import Experience, Rollout


def empty_replay(config: PPOConfig, roles: Roles, room: tuple[int, int]) -> Experience:
    """Experiences [n, B, ...] of zeros: what a checkpoint and the first updates find."""
    prompt, response = room
    rows, n = config.ppo.batch_size, config.ppo.replay
    token = jnp.zeros((n, rows, response), jnp.float32)
    row = jnp.zeros((n, rows), jnp.float32)
    bits = (n, rows, response, -(-roles.policy.vocab_size // 8))
    whole = (n, rows, prompt + response)
    rollout = Rollout(
        tokens=jnp.zeros(whole, jnp.int32),
        mask=jnp.zeros(whole, bool),
        response_mask=jnp.zeros(token.shape, bool),
        logprobs=token,
        finished=jnp.zeros(row.shape, bool),
        index=jnp.zeros(row.shape, jnp.int32),
        sample=jnp.zeros(row.shape, jnp.int32),
        support=jnp.zeros(bits, jnp.uint8) if config.sampling.renormalise_logprobs else None,
    )
    features = jnp.zeros((n, rows, response + 1, roles.critic.hidden_size), jnp.float32)
    return Experience(
        rollout, row, token, token, token, token, token, token, row,
        features=features if roles.trunk in ("reference", "frozen") else None,
        weights=token if config.ppo.sampler_correction != "none" else None,
    )  # fmt: skip


def widened(
    rollout: Rollout, token_scores: np.ndarray | None, room: tuple[int, int], pad_id: int, mesh: jax.sharding.Mesh
) -> tuple[Rollout, np.ndarray | None]:
    """The rollout with P prompt columns and R response columns, room for all; and the scores of its tokens."""
    (prompt, response), rollout = room, jax.device_get(rollout)
    left = prompt - (rollout.tokens.shape[1] - rollout.response_mask.shape[1])
    right = response - rollout.response_mask.shape[1]

    def grown(x: Any, before: int, value: int) -> Any:
        return np.pad(x, [(0, 0), (before, right), *[(0, 0)] * (x.ndim - 2)], constant_values=value)

    made = dataclasses.replace(
        rollout,
        tokens=grown(rollout.tokens, left, pad_id),
        mask=grown(rollout.mask, left, 0),
        response_mask=grown(rollout.response_mask, 0, 0),
        logprobs=grown(rollout.logprobs, 0, 0),
        support=None if rollout.support is None else grown(rollout.support, 0, 0),
    )
    scores = None if token_scores is None else grown(token_scores, 0, 0)
    return sharding.put_rows(made, mesh), scores

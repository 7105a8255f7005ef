"""What learns in an on-policy run: what the loop and the validation ask of it, and what all that learn share."""

import dataclasses
from concurrent.futures import Future
from typing import Protocol

import jax
import numpy as np

from jaxrlhf import sharding
from jaxrlhf.algorithms.scores import ScoreStats, shaped
from jaxrlhf.config import Scores
from jaxrlhf.training.state import State
from jaxrlhf.types import Params, Rollout, TrainState


class Learner(Protocol):
    """What learns from scored rollouts."""

    state: State
    identity: str  # a hash of what it uses and does not train

    @property
    def policy(self) -> Params:
        """The policy's parameters as they are now, adapters and what is under them."""
        ...

    @property
    def reference(self) -> Params | None:
        """The reference's parameters as they are now, on the device; None where there is none."""
        ...

    def compile(self, rollout: Future[Rollout], key: jax.Array, *, per_token: bool) -> None:
        """Begin to compile what learns from a rollout of full length, with rewards of single tokens or without."""
        ...


def shaped_scores(
    rollout: Rollout, scores: np.ndarray, stats: ScoreStats, config: Scores, longest: int, mesh: jax.sharding.Mesh
) -> tuple[jax.Array, ScoreStats]:
    """The scores f32 [B] of a rollout as `config` shapes them, and the statistics with them in, in their places.
    `longest` is the response's limit."""
    given = sharding.put_rows(np.asarray(scores, np.float32), mesh)
    made, stats = shaped(given, rollout.response_mask, rollout.finished, stats, config=config, longest=longest)
    return sharding.put_rows(np.asarray(made), mesh), sharding.put_whole(jax.device_get(stats), mesh)


def without_moments(state: TrainState) -> TrainState:
    """What annotation reads of a state, wherever the moments are."""
    return dataclasses.replace(state, opt_state={})

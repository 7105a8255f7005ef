"""Experience replay: the last rollouts, kept at one width so that one program trains on all of them."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.config import PPOConfig
from jaxrlhf.training.ppo.experience import blank_experience
from jaxrlhf.training.ppo.update import PPOSpec, finish_update, merge_metrics, update
from jaxrlhf.training.step import Metrics
from jaxrlhf.types import Experience, Params, Rollout, TrainState


def empty_replay(config: PPOConfig, spec: PPOSpec, width: tuple[int, int]) -> Experience:
    """A replay buffer of zeros [n, B, ...] for rollouts of `width` (P, R)."""
    prompt, response = width
    n, rows = config.ppo.replay, config.ppo.batch_size

    def zeros(*shape: int, dtype: str = "float32") -> Array:
        return jnp.zeros((n, rows, *shape), dtype)

    token, row = zeros(response), zeros()
    rollout = Rollout(
        tokens=zeros(prompt + response, dtype="int32"),
        mask=zeros(prompt + response, dtype="bool"),
        response_mask=zeros(response, dtype="bool"),
        logprobs=token,
        finished=zeros(dtype="bool"),
        index=zeros(dtype="int32"),
        sample=zeros(dtype="int32"),
        support=zeros(response, -(-spec.policy.vocab_size // 8), dtype="uint8")
        if config.sampling.renormalise_logprobs
        else None,
    )
    features = zeros(response + 1, spec.critic.hidden_size) if spec.trunk in ("reference", "frozen") else None
    weights = token if config.ppo.sampler_correction != "none" else None
    return blank_experience(rollout, row, token, features=features, weights=weights)


def update_with_replay(
    state: TrainState, frozen: dict[str, Params], experience: Experience, key: Array, *, spec: PPOSpec
) -> tuple[TrainState, Metrics]:
    """`update` on the experience, then on each kept one; the experience replaces the oldest kept one.

    Metrics are means over all optimizer steps, but for the steps and skipped updates, which are sums.
    """
    kept = min(int(state.step), spec.ppo.replay)
    key, *replay_keys = jax.random.split(key, 1 + kept)
    state, metrics = update(state, frozen, experience, key, spec=spec)
    records = [metrics]
    for i, replay_key in enumerate(replay_keys):
        old = sharding.put_rows(jax.tree.map(lambda x, i=i: x[i], state.replay), spec.mesh)
        state, metrics = update(state, frozen, old, replay_key, records[-1]["ended"], spec=spec)
        records.append(metrics)
    for record in records:
        del record["ended"]
    return _finish(state, experience, spec=spec), _merge(records)


@functools.partial(jax.jit, donate_argnames="state")
def _finish(state: TrainState, experience: Experience, *, spec: PPOSpec) -> TrainState:
    """Finish the update and keep its experience."""
    place = state.step % spec.ppo.replay
    replay = jax.tree.map(lambda kept, new: kept.at[place].set(new), state.replay, experience)
    state = finish_update(state, experience, None, spec)
    return sharding.constrain(dataclasses.replace(state, replay=replay), spec.mesh)


@jax.jit
def _merge(records: list[Metrics]) -> Metrics:
    stacked = {key: jnp.stack([record[key] for record in records]) for key in records[0]}
    return merge_metrics(stacked, stacked["policy/steps"])

"""Policy and reference of on-policy training: parameters, log-probs, reference updates, sampler correction, padding."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms import masked
from jaxrlhf.config import Reference
from jaxrlhf.logprobs import response_states, token_logprobs
from jaxrlhf.models import ModelConfig
from jaxrlhf.types import Params, Rollout, TrainState


def policy_params(params: dict[str, Params], frozen: dict[str, Params]) -> Params:
    """The policy's parameters: what trains laid over its frozen base."""
    return {**frozen["policy"], **params["policy"]}


def reference_params(state: TrainState, frozen: dict[str, Params]) -> Params:
    """The reference's current parameters: the part that moves (`reference.sync_every`) laid over the frozen part."""
    return {**frozen["reference"], **(state.reference or {})}


def reference_dtype(reference: Reference, policy: ModelConfig) -> str:
    """Storage dtype of the reference. A moving average stays in float32, because small steps would be rounded away."""
    if reference.dtype != "auto":
        return reference.dtype
    return "float32" if reference.sync_every and reference.sync_alpha < 1 else policy.dtype


def sync_reference(state: TrainState, update: Array, sync_every: int, sync_alpha: float) -> Params | None:
    """The moving reference after update number `update` (from 0): every `sync_every` updates it becomes
    (1 - alpha) * reference + alpha * policy."""
    if state.reference is None:
        return None
    alpha = jnp.where((update + 1) % sync_every == 0, sync_alpha, 0.0)

    def move(old: Array, new: Array) -> Array:
        return jnp.where(alpha == 1, new, (1 - alpha) * old + alpha * new).astype(old.dtype)

    return jax.tree.map(move, state.reference, state.params["policy"])


def sequence_logprobs(
    params: Params,
    model: ModelConfig,
    rollout: Rollout,
    temperature: float,
    *,
    hidden: Array | None = None,
    entropy_gradient: bool = False,
) -> tuple[Array, Array]:
    """Log-probs and entropy of every response token, each f32 [B, R], 0 outside the response mask.

    The one function for the old, new and reference policy. `hidden` [B, R + 1, D] are `response_states`, if they are
    known. Normalised over the rollout's `support` if it has one, else over the whole vocabulary.
    """
    if hidden is None:
        hidden = response_states(params, model, rollout)
    mask = rollout.response_mask
    targets = rollout.tokens[:, -mask.shape[1] :]
    logprobs, entropy = token_logprobs(
        params, model, hidden[:, :-1], targets, temperature, rollout.support, entropy_gradient
    )
    return masked.keep(logprobs, mask), masked.keep(entropy, mask)


def sampler_gap(rollout: Rollout, logprobs: Array) -> Array:
    """log pi_old - log pi_sampler of every response token, f32 [B, R]; 0 outside the mask."""
    return masked.keep(logprobs, rollout.response_mask) - masked.keep(rollout.logprobs, rollout.response_mask)


def sampler_weights(
    gap: Array, mask: Array, correction: Literal["truncate", "mask"], cap: float
) -> tuple[Array, Array]:
    """Importance weights exp(gap) for a sampler that differs from pi_old.

    Returns the weights f32 [B, R], capped per token (`truncate`) or 0 for whole responses outside [1 / cap, cap]
    (`mask`), and which tokens were capped or dropped, bool [B, R].
    """
    if correction == "truncate":
        weights = jnp.minimum(jnp.exp(jnp.minimum(gap, jnp.log(cap))), cap)
        cut = gap > jnp.log(cap)
    else:
        cut = jnp.broadcast_to(jnp.abs(jnp.sum(gap, axis=1, keepdims=True)) > jnp.log(cap), mask.shape)
        weights = jnp.where(cut, 0.0, 1.0)
    return masked.keep(weights, mask), cut & mask


def without_moments(state: TrainState) -> TrainState:
    """The state as annotation reads it, wherever the optimizer's moments are."""
    return dataclasses.replace(state, opt_state={})


def pad_rollout(
    rollout: Rollout, token_scores: np.ndarray | None, width: tuple[int, int], pad_id: int, mesh: jax.sharding.Mesh
) -> tuple[Rollout, np.ndarray | None]:
    """The rollout, and the scores of its tokens [B, R], padded to `width` (P, R)."""
    (prompt, response), rollout = width, jax.device_get(rollout)
    left = prompt - (rollout.tokens.shape[1] - rollout.response_mask.shape[1])
    right = response - rollout.response_mask.shape[1]

    def pad(x: Any, before: int = 0, value: int = 0) -> Any:
        return np.pad(x, [(0, 0), (before, right), *[(0, 0)] * (x.ndim - 2)], constant_values=value)

    padded = dataclasses.replace(
        rollout,
        tokens=pad(rollout.tokens, left, pad_id),
        mask=pad(rollout.mask, left),
        response_mask=pad(rollout.response_mask),
        logprobs=pad(rollout.logprobs),
        support=None if rollout.support is None else pad(rollout.support),
    )
    return sharding.put_rows(padded, mesh), None if token_scores is None else pad(token_scores)

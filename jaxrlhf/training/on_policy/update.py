"""Parts of the jitted updates that PPO and GRPO share."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms import masked
from jaxrlhf.config import PPO, Reference
from jaxrlhf.config.on_policy import OnPolicy
from jaxrlhf.logprobs import response_states, response_tokens, token_logprobs
from jaxrlhf.models import ModelConfig
from jaxrlhf.training.by_length import Budget
from jaxrlhf.training.divergence import Predictor, divergence_sums
from jaxrlhf.training.optim import Optimizer
from jaxrlhf.training.step import Metrics
from jaxrlhf.types import Params, Rollout, TrainState


@dataclass(frozen=True, kw_only=True)
class UpdateSpec:
    """Settings of `annotate` and `update`."""

    policy: ModelConfig
    optimizers: tuple[tuple[str, Optimizer], ...]
    temperature: float
    mesh: jax.sharding.Mesh
    reference: Reference
    teacher: ModelConfig | None = None  # the model of `reference.path`

    @property
    def reference_model(self) -> ModelConfig:
        return self.teacher or self.policy

    @property
    def update_roles(self) -> tuple[str, ...]:
        """The roles whose frozen parameters `update` uses."""
        raise NotImplementedError


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
    logprobs, entropy = token_logprobs(
        params, model, hidden[:, :-1], response_tokens(rollout), temperature, rollout.support, entropy_gradient
    )
    return masked.keep(logprobs, mask), masked.keep(entropy, mask)


def exact_kl(
    params: Params,
    reference: Params,
    hidden: Array,
    ref_hidden: Array | None,
    mask: Array,
    count: Array,
    spec: UpdateSpec,
    settings: OnPolicy,
    weights: Array | None = None,
) -> tuple[Array, Metrics]:
    """`algorithms.kl.kl_loss` with the divergence `settings.kl_beta` over the whole vocabulary, which needs no
    importance weights, from the hidden states of the policy [B, R + 1, D] and of the reference [B, R, D]."""
    assert ref_hidden is not None
    policy = Predictor(params, spec.policy, hidden[:, :-1])
    other = Predictor(reference, spec.reference_model, ref_hidden)
    loss = divergence_sums(policy, other, mask, settings.kl_beta, spec.temperature, weights)["loss"] / count
    return loss, {"loss/kl_avg": loss}


def sampler_gap(rollout: Rollout, logprobs: Array) -> Array:
    """log pi_old - log pi_sampler of every response token, f32 [B, R]; 0 outside the mask."""
    return masked.keep(logprobs, rollout.response_mask) - masked.keep(rollout.logprobs, rollout.response_mask)


def sampler_weights(gap: Array, mask: Array, settings: OnPolicy) -> tuple[Array, Array]:
    """Importance weights for a sampler that differs from pi_old, by `settings.sampler_correction`, f32 [B, R], and
    which tokens were capped or dropped, bool [B, R]. `gap` [B, R] is `sampler_gap`."""
    correction, (low, high) = settings.sampler_correction, map(jnp.log, settings.sampler_bounds)
    assert correction != "none"
    if correction not in ("truncate", "token_mask"):
        gap = jnp.broadcast_to(jnp.sum(gap, axis=1, keepdims=True), gap.shape)
    if correction.endswith("truncate"):
        cut = gap > high
        weights = jnp.minimum(jnp.exp(jnp.minimum(gap, high)), settings.sampler_cap)
    else:
        cut = (gap < low) | (gap > high)
        weights = jnp.where(cut, 0.0, jnp.exp(jnp.where(cut | (correction == "mask"), 0.0, gap)))
    return masked.keep(weights, mask), cut & mask


def budget(settings: OnPolicy, mesh: jax.sharding.Mesh) -> Budget | None:
    """The size of micro-batches in tokens, if `settings` give one."""
    option = f"{'ppo' if isinstance(settings, PPO) else 'grpo'}.micro_batch_tokens"
    tokens = settings.micro_batch_tokens
    return Budget(tokens, sharding.row_shards(mesh), option) if tokens else None


def without_moments(state: TrainState) -> TrainState:
    """The state as annotation reads it, wherever the optimizer's moments are."""
    return dataclasses.replace(state, opt_state={})


def shuffled_rows(key: Array, epochs: int, rows: int, num_mini_batches: int) -> Array:
    """The rows of each mini-batch, int32 [epochs * num_mini_batches, rows / num_mini_batches], in a new order for each
    epoch."""
    keys = jax.random.split(key, epochs)
    return jax.vmap(lambda k: jax.random.permutation(k, rows))(keys).reshape(-1, rows // num_mini_batches)


def take_rows(metrics: dict[str, Any]) -> dict[str, Any]:
    """Remove and return the metrics of rows (see `training.step.gradients`)."""
    return {key: metrics.pop(key) for key in list(metrics) if key.endswith("_rows")}


def in_batch_order(known: dict[str, Any], order: Array) -> dict[str, Any]:
    """Metrics of rows [1, B, ...] of an update whose only mini-batch are the rows in this order."""
    return jax.tree.map(lambda x: x[0][jnp.argsort(order)], known)


def sync_reference(state: TrainState, update: Array, config: Reference) -> Params | None:
    """The moving reference after update number `update` (from 0): every `sync_every` updates it becomes
    (1 - sync_alpha) * reference + sync_alpha * policy."""
    if state.reference is None:
        return None
    alpha = jnp.where((update + 1) % config.sync_every == 0, config.sync_alpha, 0.0)

    def move(old: Array, new: Array) -> Array:
        return jnp.where(alpha == 1, new, (1 - alpha) * old + alpha * new).astype(old.dtype)

    return jax.tree.map(move, state.reference, state.params["policy"])

"""The jitted programs of a PPO update: `annotate` turns a scored rollout into experience, `update` trains on it."""

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.kl import adaptive_kl_coef, k1, kl_loss
from jaxrlhf.algorithms.ppo import Clip, finalize_metrics, policy_loss, value_loss
from jaxrlhf.config import PPO
from jaxrlhf.config.base import constant
from jaxrlhf.logprobs import logits_bytes, response_states, response_states_with_router
from jaxrlhf.models import ModelConfig, scalar_head
from jaxrlhf.traced import settings
from jaxrlhf.training.on_policy.policy import policy_params, reference_params
from jaxrlhf.training.on_policy.update import (
    UpdateSpec,
    budget,
    exact_kl,
    in_batch_order,
    sequence_logprobs,
    shuffled_rows,
    sync_reference,
    take_rows,
)
from jaxrlhf.training.ppo.critic import Trunk
from jaxrlhf.training.ppo.experience import FILLED, Predictions, blank_experience, fill_experience
from jaxrlhf.training.step import Metrics, apply, gradients, gradients_in_turn, map_rows
from jaxrlhf.types import Experience, Params, Rollout, TrainState


@settings("warmup_updates")
@dataclass(frozen=True, kw_only=True)
class PPOSpec(UpdateSpec):
    """Settings of `annotate` and `update`."""

    critic: ModelConfig
    ppo: PPO
    trunk: Trunk
    warmup_updates: int = 0  # updates that train the critic alone

    @property
    def update_roles(self) -> tuple[str, ...]:
        return ("policy", "critic", "reference") if self.ppo.has_exact_kl else ("policy", "critic")

    def one_step(self, batch: int) -> bool:
        """Return True if the update is one forward pass and optimizer step, where pi_old = stop_gradient(pi).

        Annotation then runs neither policy nor critic. An optimizer step in several micro-batches does not count:
        whitening needs every row's advantage before the first row's loss, so annotation runs, and its old_logprobs
        equal those of the update to rounding (1e-5), not by definition. Micro-batches inside the layers
        (`with_micro_batches_in_layers`) do not divide the step.
        """
        ppo = self.ppo
        whole = (ppo.micro_rows(batch) == batch and not ppo.micro_batch_tokens) or (
            self.policy.micro_batch_rows is not None and ppo.num_mini_batches == 1
        )
        return ppo.num_ppo_epochs == 1 and whole and not ppo.replay


def with_micro_batches_in_layers(spec: PPOSpec, params: dict[str, Params], rollout: Rollout) -> PPOSpec:
    """The spec with `micro_batch_rows` in policy and critic if an optimizer step in several micro-batches had better be
    one pass over all its rows, whose layers compute a micro-batch at a time.

    Gradients are then added up for a layer, not for the model, and an update of one step needs no annotation by policy
    and critic. The inputs of all layers are kept for the backward pass: not if they, with the logits, need more memory
    than the gradients that micro-batches would be added up in. Only on one CPU, where it was measured, and in float32:
    products of the heads in bfloat16 would be rounded otherwise than in annotation, and gradients of parameters in
    bfloat16 would be added up in bfloat16.
    """
    ppo, (batch, columns) = spec.ppo, rollout.tokens.shape
    rows, micro = batch // ppo.num_mini_batches, ppo.micro_rows(batch)
    models = spec.policy, spec.critic
    simple = all(m.dtype == "float32" and m.remat == "full" and m.delta is None and not m.num_experts for m in models)
    simple &= all(x.dtype == jnp.float32 for x in jax.tree.leaves(params))
    on_cpu = spec.policy.platform == "cpu" and spec.mesh.size == 1
    if not on_cpu or not simple or spec.trunk != "own" or ppo.micro_batch_tokens or micro == rows:
        return spec
    inputs = sum(4 * rows * columns * m.hidden_size * m.num_layers for m in models)
    logits = 4 * logits_bytes(spec.policy, rows * rollout.response_mask.shape[1])
    if inputs + logits > 4 * sum(x.size for x in jax.tree.leaves(params)):
        return spec
    policy, critic = (dataclasses.replace(model, micro_batch_rows=micro) for model in models)
    return dataclasses.replace(spec, policy=policy, critic=critic)


def predict(
    params: dict[str, Params], frozen: dict[str, Params], rollout: Rollout, features: Array | None, spec: PPOSpec
) -> tuple[Predictions, dict[str, Array], Array]:
    """One forward pass of policy and critic each; of the critic only its head if `features`, the states of a frozen
    trunk [B, R + 1, D], are given or it shares the policy's trunk. Also the sums of their routers, and the hidden
    states of the policy [B, R + 1, D]."""
    logprobs, entropy, router, hidden = _predict_tokens(params, frozen, rollout, spec)
    values, last_values, of_critic = _predict_values(
        params, frozen, rollout, hidden if spec.trunk == "shared" else features, spec
    )
    return Predictions(logprobs, entropy, values, last_values), router | of_critic, hidden


def _predict_tokens(
    params: dict[str, Params], frozen: dict[str, Params], rollout: Rollout, spec: PPOSpec
) -> tuple[Array, Array, dict[str, Array], Array]:
    """The policy's part of `predict`: log-probs, entropy, sums of its router, hidden states."""
    policy = policy_params(params, frozen)
    hidden, router = response_states_with_router(policy, spec.policy, rollout)
    entropy_gradient = not constant(spec.ppo.entropy_coef, 0)
    logprobs, entropy = sequence_logprobs(
        policy, spec.policy, rollout, spec.temperature, hidden=hidden, entropy_gradient=entropy_gradient
    )
    return logprobs, entropy, router, hidden


def _predict_values(
    params: dict[str, Params], frozen: dict[str, Params], rollout: Rollout, features: Array | None, spec: PPOSpec
) -> tuple[Array, Array, dict[str, Array]]:
    """The critic's part of `predict`: values, last values, sums of its router."""
    router = {}
    if features is None:
        critic = {**frozen["critic"], **params["critic"]}
        features, of_critic = response_states_with_router(critic, spec.critic, rollout)
        router = {f"critic_{name}": sums for name, sums in of_critic.items()}
    values = scalar_head(params["critic"], spec.critic, features)
    mask = rollout.response_mask
    length = jnp.max(jnp.where(mask, 1 + jnp.arange(mask.shape[1]), 0), axis=1, keepdims=True)
    last_values = jnp.take_along_axis(values, length, axis=1)[:, 0]
    return masked.keep(values[:, :-1], mask), last_values, router


@jax.jit
def annotate(
    state: TrainState,
    frozen: dict[str, Params],
    rollout: Rollout,
    scores: Array,
    token_scores: Array | None = None,
    *,
    spec: PPOSpec,
) -> tuple[Experience, Metrics]:
    """Add log-probs, values, rewards, advantages and returns to a scored rollout.

    `scores` f32 [B] are the final scores of sequences, `token_scores` f32 [B, R] those of a per-token reward. Forward
    passes run over `annotation_rows` at a time, which bounds memory. If the update is one step (`PPOSpec.one_step`),
    policy and critic are not run here: `update` fills the experience from its own forward pass. A frozen critic trunk
    runs only here, and not at all if it is the reference's.
    """
    batch, reference = scores.shape[0], reference_params(state, frozen)
    one_step = with_micro_batches_in_layers(spec, state.params, rollout).one_step(batch)

    def forward(part: Rollout) -> tuple[Array, Array | None, Array | None, Predictions | None]:
        hidden = response_states(reference, spec.reference_model, part)
        ref_logprobs, _ = sequence_logprobs(reference, spec.reference_model, part, spec.temperature, hidden=hidden)
        ref_hidden, features = hidden[:, :-1] if spec.ppo.has_exact_kl else None, None
        if spec.trunk in ("reference", "frozen"):
            features = hidden if spec.trunk == "reference" else response_states(frozen["critic"], spec.critic, part)
        if one_step:
            return ref_logprobs, ref_hidden, features, None
        return ref_logprobs, ref_hidden, features, predict(state.params, frozen, part, features, spec)[0]

    parts = budget(spec.ppo, spec.mesh) or batch // spec.ppo.annotation_rows(batch)
    ref_logprobs, ref_hidden, features, predictions = map_rows(forward, rollout, parts)
    known = {"token_scores": token_scores, "features": features, "ref_hidden": ref_hidden}
    experience = blank_experience(rollout, scores, ref_logprobs, **known)
    if predictions is None:
        return experience, {}
    return fill_experience(experience, predictions, state.kl_coef, spec.ppo)


@partial(jax.jit, donate_argnames="state")
def update(
    state: TrainState,
    frozen: dict[str, Params],
    experience: Experience,
    key: Array,
    ended: Array | None = None,
    *,
    spec: PPOSpec,
) -> tuple[TrainState, Metrics]:
    """Train on the experience for `num_ppo_epochs`, each over `num_mini_batches` freshly shuffled mini-batches.

    A mini-batch whose policy is further than `target_kl` from pi_old is skipped, and so are those after it; one without
    a scored response is skipped alone. With `ppo.replay` this is one of several calls of an update: parameters and
    optimizer state change, the rest is left to `finish_update`, and the metrics have `ended`, bool []. For a replayed
    experience `ended` is that of the call before; its mini-batches that are too far are skipped alone. If the update is
    one step (`PPOSpec.one_step`), the metrics also have the fields of the filled experience, as `values_rows`.
    """
    ppo, batch = spec.ppo, experience.scores.shape[0]
    num_micro = budget(ppo, spec.mesh) or batch // ppo.num_mini_batches // ppo.micro_rows(batch)
    spec = with_micro_batches_in_layers(spec, state.params, experience.rollout)
    num_micro, one_step = 1 if spec.policy.micro_batch_rows else num_micro, spec.one_step(batch)
    replayed, kl_coef, warmup = ended is not None, state.kl_coef, state.step < spec.warmup_updates
    reference = reference_params(state, frozen) if ppo.has_exact_kl else {}

    def of_policy(params: dict[str, Params], part: Experience, count: Array, new: Any = None) -> tuple[Array, Metrics]:
        """The policy's loss of some rows, from its predictions if they are known."""
        mask = part.rollout.response_mask
        logprobs, entropies, router, hidden = new or _predict_tokens(params, frozen, part.rollout, spec)
        high = ppo.cliprange if ppo.cliprange_high is None else ppo.cliprange_high
        clip = Clip(ppo.cliprange, high, ppo.dual_clip, ppo.log_ratio_clamp)
        total, metrics = policy_loss(logprobs, part.old_logprobs, part.advantages, mask, count, clip, part.weights)
        entropy = masked.total(entropies, mask) / count
        if not constant(ppo.entropy_coef, 0):
            total -= ppo.entropy_coef * entropy
        if ppo.kl_in == "loss":
            assert ppo.kl_estimator != "k1"
            if ppo.kl_estimator == "exact":
                models = policy_params(params, frozen), reference
                kl, kl_metrics = exact_kl(*models, hidden, part.ref_hidden, mask, count, spec, ppo)
            else:
                estimator = ppo.kl_estimator
                kl, kl_metrics = kl_loss(logprobs, part.old_logprobs, part.ref_logprobs, mask, count, estimator)
            total, metrics = total + kl_coef * kl, metrics | kl_metrics
        return total, {
            **metrics,
            **router,
            "policy/entropy_avg": entropy,
            "val/log_ratio_max": jnp.max(jnp.abs(logprobs - part.old_logprobs)),
        }

    def of_critic(params: dict[str, Params], part: Experience, count: Array, new: Any = None) -> tuple[Array, Metrics]:
        """The critic's loss of some rows, from its predictions if they are known."""
        values, _, router = new or _predict_values(params, frozen, part.rollout, part.features, spec)
        mask = part.rollout.response_mask
        loss, metrics = value_loss(values, part.values, part.returns, mask, count, ppo.cliprange_value)
        return ppo.vf_coef * loss, metrics | router

    def of_both(params: dict[str, Params], part: Experience, count: Array) -> tuple[Array, Metrics]:
        """Both losses, where they need each other's predictions or share a trunk."""
        rollout, metrics = part.rollout, {}
        tokens = _predict_tokens(params, frozen, rollout, spec)
        features = tokens[-1] if spec.trunk == "shared" else part.features
        values = _predict_values(params, frozen, rollout, features, spec)
        if one_step:
            part, metrics = fill_experience(part, Predictions(*tokens[:2], *values[:2]), kl_coef, ppo)
            metrics |= {f"{name}_rows": getattr(part, name) for name in FILLED if getattr(part, name) is not None}
        policy, policy_metrics = of_policy(params, part, count, tokens)
        critic, critic_metrics = of_critic(params, part, count, values)
        return policy + critic, metrics | policy_metrics | critic_metrics

    def mini_batch(state: TrainState, rows: Array) -> tuple[TrainState, Array, Metrics]:
        """One optimizer step, and whether it was skipped for `target_kl`."""
        chosen = jax.tree.map(lambda x: x[rows], experience)
        count = jnp.sum(chosen.rollout.response_mask)
        used, count = count > 0, jnp.maximum(count, 1)
        router = {"router": spec.policy}
        critic_router = {"critic_router": spec.critic} if spec.trunk == "own" else {}
        if spec.trunk == "own" and not one_step:
            losses = {
                "policy": (partial(of_policy, count=count), router),
                "critic": (partial(of_critic, count=count), critic_router),
            }
            grads, metrics = gradients_in_turn(losses, state.params, chosen, num_micro, spec.mesh)
        else:
            loss = partial(of_both, count=count)
            grads, metrics = gradients(loss, state.params, chosen, num_micro, router | critic_router)
        far = jnp.array(False) if ppo.target_kl is None else metrics["policy/kl_avg"] > ppo.target_kl
        accept = {"policy": used & ~far & ~warmup, "critic": used & ~far}
        state, norms = apply(state, grads, metrics.pop("loss"), spec.optimizers, accept)
        metrics["val/first_log_ratio_max"] = metrics["val/log_ratio_max"]
        metrics["policy/steps"] = used.astype(jnp.float32)
        known = take_rows(metrics)
        return sharding.constrain(state, spec.mesh), far, finalize_metrics(metrics) | norms | known

    def step(carry: tuple[TrainState, Array], rows: Array) -> tuple[tuple[TrainState, Array], Metrics]:
        state, ended = carry
        if ppo.target_kl is None:
            state, _, metrics = mini_batch(state, rows)
            return (state, ended), metrics
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(mini_batch, state, rows)[2])
        state, far, metrics = jax.lax.cond(~ended, lambda: mini_batch(state, rows), lambda: (state, ended, zeros))
        return (state, ended | (far & (not replayed))), metrics

    orders = shuffled_rows(key, ppo.num_ppo_epochs, batch, ppo.num_mini_batches)
    start = jnp.array(False) if ended is None else ended
    (state, ended), stacked = jax.lax.scan(step, (state, start), orders)
    known = in_batch_order(take_rows(stacked), orders[0])
    metrics = merge_metrics(stacked, stacked["policy/steps"]) | known
    if ppo.replay:
        return sharding.constrain(state, spec.mesh), metrics | {"ended": ended}
    return sharding.constrain(finish_update(state, experience, metrics.get("objective/kl"), spec), spec.mesh), metrics


def merge_metrics(metrics: Metrics, steps: Array) -> Metrics:
    """Merge the metrics of n parts of an update, each [n]: parts of `steps` f32 [n] optimizer steps, which may be 0.

    They are means over all steps, except for maxima (`_max`), sums (steps and skipped updates) and the value of the
    first step (`val/first_log_ratio_max`).
    """

    def merge(key: str, values: Array) -> Array:
        if key == "val/first_log_ratio_max":
            return values[0]
        if key.endswith("_max"):
            return jnp.max(values)
        if key in ("policy/steps", "skipped_updates"):
            return jnp.sum(values)
        return jnp.sum(jnp.where(steps > 0, values * steps, 0)) / jnp.sum(steps)

    return {key: merge(key, values) for key, values in metrics.items()}


def finish_update(state: TrainState, experience: Experience, kl: Array | None, spec: PPOSpec) -> TrainState:
    """The state after the optimizer steps of an update: its number, `kl_coef` and the moving reference. `kl` is the
    mean KL of a response to the reference, None to compute it from the experience."""
    ppo, number = spec.ppo, state.step
    mask = experience.rollout.response_mask
    rows = masked.rows(mask)
    if kl is None:
        kl = masked.mean(jnp.sum(masked.keep(k1(experience.old_logprobs, experience.ref_logprobs), mask), axis=1), rows)
    return dataclasses.replace(
        state,
        step=number + 1,
        kl_coef=adaptive_kl_coef(state.kl_coef, kl, ppo.kl_target, ppo.kl_horizon, jnp.sum(rows)),
        reference=sync_reference(state, number, spec.reference),
    )

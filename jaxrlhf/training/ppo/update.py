"""The device programs of a PPO update: `annotate` turns a scored rollout into experience, `update` learns from it."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.advantages import gae, reward_to_go, whiten
from jaxrlhf.algorithms.kl import adaptive_kl_coef, k1, kl_loss
from jaxrlhf.algorithms.ppo import Clip, finalize_metrics, policy_loss, rollout_metrics, token_rewards, value_loss
from jaxrlhf.config import PPO
from jaxrlhf.logprobs import response_states
from jaxrlhf.training.on_policy.policy import (
    reference_params,
    sampler_gap,
    sampler_weights,
    sequence_logprobs,
    sync_reference,
)
from jaxrlhf.training.ppo.roles import Measured, Roles, measure
from jaxrlhf.training.step import Metrics, apply, from_micro_batches, gradients, to_micro_batches
from jaxrlhf.types import Experience, Params, Rollout, TrainState

QUANTILES = (0.01, 0.5, 0.99)  # of pi_old / pi_sampler


@functools.partial(jax.jit, static_argnames="roles")
def annotate(
    state: TrainState,
    frozen: dict[str, Params],
    rollout: Rollout,
    scores: Array,
    token_scores: Array | None = None,
    *,
    roles: Roles,
) -> tuple[Experience, Metrics]:
    """Score a rollout's tokens by policy, reference and critic, and work out rewards, advantages and returns.

    `scores` f32 [B] are those of sequences, shaped already; `token_scores` f32 [B, R] those of a process reward.
    Forwards run in slices of `roles.annotation_rows`, so memory is bounded by those. When the update will be one step,
    policy and critic are not run here: `update` completes the experience from its own forward. A frozen critic trunk
    runs here and nowhere else, and not at all where it is the reference's.
    """
    batch, reference = scores.shape[0], reference_params(state, frozen)

    def rows(part: Rollout) -> tuple[Array, Array | None, Measured | None]:
        hidden = response_states(reference, roles.policy, part)
        ref_logprobs, _ = sequence_logprobs(reference, roles.policy, part, roles.temperature, hidden=hidden)
        features = None
        if roles.trunk in ("reference", "frozen"):
            features = hidden if roles.trunk == "reference" else response_states(frozen["critic"], roles.critic, part)
        if roles.one_step(batch):
            return ref_logprobs, features, None
        return ref_logprobs, features, measure(state.params, frozen, part, features, roles)

    parts = jax.lax.map(rows, to_micro_batches(rollout, batch // roles.ppo.annotation_rows(batch)))
    ref_logprobs, features, measured = from_micro_batches(parts)
    blank = jnp.zeros_like(ref_logprobs)
    experience, metrics = (
        Experience(rollout, scores, blank, ref_logprobs, blank, blank, blank, blank, jnp.zeros_like(scores)),
        {},
    )
    experience = dataclasses.replace(experience, features=features, token_scores=token_scores)
    if measured is not None:
        experience, metrics = complete(experience, measured, state.kl_coef, roles.ppo)
    return experience, metrics


def complete(experience: Experience, measured: Measured, kl_coef: Array, ppo: PPO) -> tuple[Experience, Metrics]:
    """Rewards, advantages and returns of a whole batch, and what it was worth. No gradient flows through."""
    logprobs, entropy, values, tail = jax.lax.stop_gradient(measured)
    rollout, scores, ref_logprobs = experience.rollout, experience.scores, experience.ref_logprobs
    mask, finished = rollout.response_mask, rollout.finished
    count = jnp.maximum(jnp.sum(mask), 1)

    def mean(x: Array) -> Array:
        return masked.total(x, mask) / count

    def variance(x: Array) -> Array:
        return mean(jnp.square(x - mean(x)))

    in_reward = kl_coef if ppo.kl_in == "reward" else 0.0
    rewards = token_rewards(scores, logprobs, ref_logprobs, mask, in_reward, experience.token_scores)
    if ppo.whiten_rewards:
        rewards = whiten(rewards, mask, shift_mean=False)
    bootstrap = jnp.where(finished, 0.0, tail) if ppo.bootstrap_truncated else jnp.zeros_like(tail)
    advantages, returns = gae(rewards, values, mask, bootstrap, ppo.gamma, ppo.lam)
    if ppo.value_target == "reward_to_go":
        returns = reward_to_go(rewards, mask, bootstrap, ppo.gamma)
    weights, about_sampler = corrected(rollout, logprobs, ppo)
    done = dataclasses.replace(
        experience,
        old_logprobs=logprobs,
        values=values,
        rewards=rewards,
        advantages=whiten(advantages, mask, shift_mean=True) if ppo.whiten_advantages else advantages,
        returns=returns,
        bootstrap=bootstrap,
        token_scores=None,  # they are in the rewards
        weights=weights,
    )
    worth = scores
    if experience.token_scores is not None:
        worth = scores + jnp.sum(masked.keep(experience.token_scores, mask), axis=1)
    metrics = rollout_metrics(worth, logprobs, ref_logprobs, mask, finished, kl_coef, ppo.kl_in)
    return done, metrics | about_sampler | {
        "objective/entropy": jnp.mean(jnp.sum(entropy, axis=1)),
        "objective/entropy_per_token": mean(entropy),
        "objective/kl_coef": kl_coef,
        "objective/kl_per_token": mean(logprobs - ref_logprobs),
        "val/advantage_mean": mean(advantages),
        "val/value_mean": mean(values),
        "val/explained_variance": jnp.where(
            variance(returns) > 1e-8, 1 - variance(returns - values) / jnp.maximum(variance(returns), 1e-8), 0.0
        ),
    }


def corrected(rollout: Rollout, logprobs: Array, ppo: PPO) -> tuple[Array | None, Metrics]:
    """How tokens weigh in the policy loss (f32 [B, R], None: alike), and how far the sampler is from pi_old."""
    mask, gap = rollout.response_mask, sampler_gap(rollout, logprobs)
    low, middle, high = masked.quantiles(jnp.exp(gap), mask, QUANTILES)
    metrics = {
        "val/sampler_logprob_gap": jnp.sum(jnp.abs(gap)) / jnp.maximum(jnp.sum(mask), 1),
        "val/sampler_logprob_gap_max": jnp.max(jnp.abs(gap)),
        "val/sampler_ratio_q01": low,
        "val/sampler_ratio_q50": middle,
        "val/sampler_ratio_q99": high,
    }
    if ppo.sampler_correction == "none":
        return None, metrics
    weights, cut = sampler_weights(gap, mask, ppo.sampler_correction, ppo.sampler_cap)
    return weights, metrics | {"val/sampler_corrected": jnp.sum(cut) / jnp.maximum(jnp.sum(mask), 1)}


@functools.partial(jax.jit, static_argnames="roles", donate_argnames="state")
def update(
    state: TrainState, frozen: dict[str, Params], experience: Experience, key: Array, *, roles: Roles
) -> tuple[TrainState, Metrics]:
    """`num_ppo_epochs` passes over the experience, each over `num_mini_batches` freshly shuffled mini-batches.

    With `replay`, each pass goes on over the experiences kept before. `target_kl` ends all of it early.
    """
    ppo, batch = roles.ppo, experience.scores.shape[0]
    rows_each = batch // ppo.num_mini_batches
    num_micro = rows_each // ppo.micro_rows(batch)
    pool = jax.tree.map(lambda x: x[None], experience)
    if state.replay is not None:
        pool = jax.tree.map(lambda new, old: jnp.concatenate([new, old]), pool, state.replay)
    warm = state.step < roles.warmup_updates
    number, kl_coef = state.step, state.kl_coef

    def mini_batch(state: TrainState, source: Array, rows: Array) -> tuple[TrainState, Array, Metrics]:
        """One optimizer step on rows of experience `source`; whether they were too far from pi_old to learn from."""
        chosen = jax.tree.map(lambda x: x[source, rows], pool)
        count = jnp.maximum(jnp.sum(chosen.rollout.response_mask), 1)
        grads, metrics = gradients(lambda p, part: loss(p, part, count), state.params, chosen, num_micro)
        far = metrics["policy/kl_avg"] > ppo.target_kl if ppo.target_kl else jnp.array(False)
        accept = {"policy": ~far & ~warm, "critic": ~far}
        state, norms = apply(state, grads, metrics.pop("loss"), roles.optimizers, accept)
        return sharding.constrain(state, roles.mesh), far, finalize_metrics(metrics) | norms

    def loss(params: dict[str, Params], part: Experience, count: Array) -> tuple[Array, Metrics]:
        mask, extra = part.rollout.response_mask, {}
        now = measure(params, frozen, part.rollout, part.features, roles)
        if roles.one_step(batch):
            part, extra = complete(part, now, kl_coef, ppo)
        clip = Clip(ppo.cliprange, ppo.cliprange_high or ppo.cliprange, ppo.dual_clip, ppo.log_ratio_clamp)
        policy, about_policy = policy_loss(
            now.logprobs, part.old_logprobs, part.advantages, mask, count, clip, part.weights
        )
        value, about_value = value_loss(now.values, part.values, part.returns, mask, count, ppo.cliprange_value)
        entropy = masked.total(now.entropy, mask) / count
        total = policy + ppo.vf_coef * value
        if ppo.entropy_coef:
            total -= ppo.entropy_coef * entropy
        if ppo.kl_in == "loss":
            assert ppo.kl_estimator != "k1"
            kl, about_kl = kl_loss(now.logprobs, part.old_logprobs, part.ref_logprobs, mask, count, ppo.kl_estimator)
            total, extra = total + kl_coef * kl, extra | about_kl
        return total, {
            **about_policy,
            **about_value,
            **extra,
            "policy/entropy_avg": entropy,
            "val/log_ratio_max": jnp.max(jnp.abs(now.logprobs - part.old_logprobs)),
        }

    def step(carry: tuple[TrainState, Array], item: tuple[Array, Array]) -> tuple[tuple[TrainState, Array], Metrics]:
        (state, ended), (source, rows) = carry, item
        if not (ppo.target_kl or ppo.replay):
            state, _, metrics = mini_batch(state, source, rows)
            return (state, ended), metrics | {"policy/steps": jnp.float32(1)}
        kept = (source == 0) | (source <= jnp.minimum(number, ppo.replay))
        blank = jax.eval_shape(mini_batch, state, source, rows)[2]
        state, far, metrics = jax.lax.cond(
            kept & ~ended,
            lambda: mini_batch(state, source, rows),
            lambda: (state, ended, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), blank)),
        )
        return (state, ended | (far & (source == 0))), metrics | {"policy/steps": (kept & ~ended).astype(jnp.float32)}

    def orders(key: Array) -> tuple[Array, Array]:
        """(which experience, which of its rows) of every mini-batch of a pass."""
        keys = jax.random.split(key, 1 + ppo.replay) if ppo.replay else key[None]
        rows = jax.vmap(lambda k: jax.random.permutation(k, batch).reshape(ppo.num_mini_batches, rows_each))(keys)
        sources = jnp.repeat(jnp.arange(1 + ppo.replay), ppo.num_mini_batches)
        return sources, rows.reshape(-1, rows_each)

    def epoch(carry: tuple[TrainState, Array], key: Array) -> tuple[tuple[TrainState, Array], Metrics]:
        return jax.lax.scan(step, carry, orders(key))

    start = state, jnp.array(False)
    (state, _), stacked = jax.lax.scan(epoch, start, jax.random.split(key, ppo.num_ppo_epochs))
    ran = stacked.pop("policy/steps")
    metrics = {k: jnp.sum(jnp.where(ran > 0, v, 0)) / jnp.sum(ran) for k, v in stacked.items()}
    metrics["policy/steps"] = jnp.sum(ran)
    metrics["val/first_log_ratio_max"] = stacked["val/log_ratio_max"][0, 0]
    metrics["val/log_ratio_max"] = jnp.max(stacked["val/log_ratio_max"])
    metrics["skipped_updates"] = jnp.sum(stacked["skipped_updates"])
    kl = metrics.get("objective/kl")
    if kl is None:
        mask = experience.rollout.response_mask
        kl = jnp.mean(jnp.sum(masked.keep(k1(experience.old_logprobs, experience.ref_logprobs), mask), axis=1))
    state = dataclasses.replace(
        state,
        step=number + 1,
        kl_coef=adaptive_kl_coef(kl_coef, kl, ppo.kl_target, ppo.kl_horizon, batch),
        reference=sync_reference(state, number, roles.sync_every, roles.sync_alpha),
        replay=remembered(state.replay, experience, number),
    )
    return sharding.constrain(state, roles.mesh), metrics


def remembered(replay: Experience | None, experience: Experience, number: Array) -> Experience | None:
    """The kept experiences [n, B, ...] with the newest in the place of the oldest."""
    if replay is None:
        return None
    size = replay.scores.shape[0]
    return jax.tree.map(lambda kept, new: kept.at[number % size].set(new), replay, experience)

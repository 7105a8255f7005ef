"""The jitted programs of a group-relative update: `annotate` computes advantages, `update` trains on them."""

import dataclasses
import functools
from dataclasses import dataclass
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms import groups, masked
from jaxrlhf.algorithms.grpo import token_weights
from jaxrlhf.algorithms.kl import k1, k3
from jaxrlhf.algorithms.ppo import finalize_metrics, response_metrics, token_rewards
from jaxrlhf.config import GRPO
from jaxrlhf.config.base import constant
from jaxrlhf.logprobs import response_states, response_states_with_router
from jaxrlhf.traced import settings
from jaxrlhf.training.grpo.loss import Selected, preference, select, surrogate
from jaxrlhf.training.on_policy.policy import policy_params, reference_params
from jaxrlhf.training.on_policy.update import (
    UpdateSpec,
    budget,
    exact_kl,
    in_batch_order,
    sampler_gap,
    sampler_weights,
    sequence_logprobs,
    shuffled_rows,
    sync_reference,
    take_rows,
)
from jaxrlhf.training.step import Metrics, apply, gradients, map_rows
from jaxrlhf.types import GroupExperience, Params, Rollout, TrainState


@settings()
@dataclass(frozen=True, kw_only=True)
class GRPOSpec(UpdateSpec):
    """Settings of `annotate` and `update`."""

    grpo: GRPO
    response_length: int
    rejected: tuple[int, ...] = ()  # the tokens of grpo.rejected_text
    reward_weights: tuple[float, ...] = ()  # gdpo: of the components of the reward

    @property
    def update_roles(self) -> tuple[str, ...]:
        return ("policy", "reference") if self.grpo.has_exact_kl else ("policy",)

    @property
    def annotates_policy(self) -> bool:
        """Return True if the policy's log-probs are needed before the update: several steps, a KL in the reward, or
        tokens selected over the whole rollout.

        Otherwise pi_old = stop_gradient(pi), whatever the micro-batches: advantages depend on scores alone.
        """
        grpo, recipe = self.grpo, self.grpo.recipe
        steps = grpo.optimizer_steps
        kl_in_reward = grpo.has_reference and recipe.kl_in == "reward"
        return recipe.loss != "dpo" and (steps > 1 or kl_in_reward or grpo.selects_tokens)

    @property
    def returns_logprobs(self) -> bool:
        """Return True if `update` returns the policy's log-probs before it, from its only step."""
        return not self.annotates_policy and self.grpo.optimizer_steps == 1 and not self.grpo.micro_batch_tokens


@jax.jit
def annotate(
    state: TrainState,
    frozen: dict[str, Params],
    rollout: Rollout,
    scores: Array,
    greedy_scores: Array | None = None,
    components: Array | None = None,
    *,
    spec: GRPOSpec,
) -> tuple[GroupExperience, Metrics]:
    """Add group advantages, and log-probs of policy and reference where the update needs them, to a scored rollout.

    `scores` f32 [B] are final, and so are `greedy_scores` f32 [B], those of the greedy response to each row's prompt
    (ReMax), and `components` f32 [B, K], the scores of each component of the reward (GDPO). Forward passes run over
    `annotation_rows` at a time. Responses without real tokens are unscored: each gets a negative index of its own, so
    that it is neither trained on nor a baseline for others.
    """
    grpo, unscored = spec.grpo, ~masked.rows(rollout.response_mask)
    rollout = dataclasses.replace(rollout, index=jnp.where(unscored, -1 - jnp.arange(len(scores)), rollout.index))
    metrics = response_metrics(scores, rollout.response_mask, rollout.finished)
    metrics["objective/kl_coef"] = state.kl_coef
    if grpo.recipe.needs_group and not spec.rejected:
        metrics |= groups.group_metrics(scores, rollout.index, components)
    valid = None
    if grpo.recipe.advantage == "pairs":
        rollout, valid = pairs(rollout, scores, grpo.num_generations, spec.rejected)
        metrics["groups/tied"] = jnp.sum(valid[:, 0] == 0)
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), rollout) if valid is not None else rollout
    count = rows.tokens.shape[0]
    scored = {"policy": policy_params(state.params, frozen)} if spec.annotates_policy else {}
    if grpo.has_reference:
        scored["reference"] = reference_params(state, frozen)

    def logprobs(part: Rollout) -> dict[str, tuple[Array, Array, Array | None]]:
        """Log-probs and entropy by each role, and hidden states of the reference if the update needs them."""
        found, models = {}, {"policy": spec.policy, "reference": spec.reference_model}
        for role, params in scored.items():
            hidden = response_states(params, models[role], part)
            kept = hidden[:, :-1] if role == "reference" and grpo.has_exact_kl else None
            found[role] = *sequence_logprobs(params, models[role], part, spec.temperature, hidden=hidden), kept
        return found

    parts = budget(grpo, spec.mesh) or count // grpo.annotation_rows(len(scores))
    found = map_rows(logprobs, rows, parts) if scored else {}
    old, entropy, _ = found.get("policy", (None, None, None))
    ref, _, ref_hidden = found.get("reference", (None, None, None))
    if valid is not None:
        assert ref is not None
        return GroupExperience(rollout, valid, None, ref.reshape(-1, 2, ref.shape[-1])), metrics
    if old is not None:
        assert entropy is not None
        metrics |= policy_metrics(rollout, old, entropy, ref, *_size(rollout.response_mask), grpo)
    advantages = group_advantages(scores, rollout, greedy_scores, components, old, ref, state.kl_coef, spec)
    if grpo.mask_truncated_completions:  # the baseline of their group is theirs too
        kept = rollout.response_mask & rollout.finished[:, None]
        rollout = dataclasses.replace(rollout, response_mask=kept)
        advantages, old, ref = jax.tree.map(lambda x: masked.keep(x, kept), (advantages, old, ref))
        metrics["tokens/masked"] = 1 - jnp.sum(masked.rows(kept)) / jnp.maximum(jnp.sum(~unscored), 1)
    entropy = None if constant(grpo.top_entropy_quantile, 1) else entropy
    return GroupExperience(rollout, advantages, old, ref, entropy, ref_hidden), metrics


@jax.jit
def filled(
    state: TrainState, frozen: dict[str, Params], experience: GroupExperience, *, spec: GRPOSpec
) -> GroupExperience:
    """The experience with the policy's log-probs, for a reader, where the update does without them
    (`GRPOSpec.annotates_policy`) and does not return them. Takes another forward pass of the policy."""
    shape = experience.rollout.response_mask.shape
    rows = jax.tree.map(lambda x: x.reshape(-1, *x.shape[len(shape) - 1 :]), experience.rollout)
    policy, batch = policy_params(state.params, frozen), shape[0]
    if spec.grpo.recipe.loss == "dpo":
        batch *= spec.grpo.num_generations
    parts = rows.tokens.shape[0] // spec.grpo.annotation_rows(batch)
    logprobs = map_rows(lambda part: _logprobs(policy, part, spec)[0], rows, parts)
    return dataclasses.replace(experience, old_logprobs=logprobs.reshape(shape))


def group_advantages(
    scores: Array,
    rollout: Rollout,
    greedy_scores: Array | None,
    components: Array | None,
    logprobs: Array | None,
    ref_logprobs: Array | None,
    kl_coef: Array,
    spec: GRPOSpec,
) -> Array:
    """Advantages f32 [B, R] of a whole rollout by `grpo.method`: 0 outside the response mask and in unscored responses,
    whose `index` is negative."""
    mask, group, grpo = rollout.response_mask, rollout.index, spec.grpo
    if grpo.recipe.kl_in == "reward" and grpo.has_reference:
        assert logprobs is not None and ref_logprobs is not None
    else:
        logprobs = ref_logprobs = jnp.zeros(mask.shape, jnp.float32)
    match grpo.recipe.advantage:
        case "scaled" | "centred":
            advantages = groups.grpo(scores, group, scale=grpo.recipe.advantage == "scaled")
        case "leave_one_out":
            kl = jnp.sum(masked.keep(k1(logprobs, ref_logprobs), mask), axis=1)
            advantages = groups.rloo(scores - kl_coef * kl, group)
        case "gpg":
            advantages = groups.gpg(scores, group)
        case "decoupled":
            assert components is not None
            known = jnp.where((group < 0)[:, None], jnp.nan, components)
            advantages = groups.gdpo(known, jnp.array(spec.reward_weights, jnp.float32), group)
        case "pass_at_k":
            advantages = groups.pass_at_k(scores, group, grpo.pass_k)
        case "greedy":
            assert greedy_scores is not None
            advantages = groups.remax(scores, greedy_scores)
        case "whitened_tokens":
            rewards = token_rewards(scores, logprobs, ref_logprobs, mask, kl_coef)
            advantages = groups.reinforce_pp(rewards, mask, grpo.gamma)
        case "whitened_group":
            advantages = groups.reinforce_pp_baseline(scores, group, mask)
        case "pairs":
            raise AssertionError("pairs have no advantages")
    if advantages.ndim == 1:
        advantages = jnp.broadcast_to(advantages[:, None], mask.shape)
    return masked.keep(advantages, mask & (group >= 0)[:, None])


def pairs(rollout: Rollout, scores: Array, group: int, rejected: tuple[int, ...]) -> tuple[Rollout, Array]:
    """The best and the worst of every `group` rows, with leading axes [n, 2], and whether they are a pair, f32 [n, 2].

    The tokens `rejected`, if any, replace the worst response. There is no pair if all scores are equal, or if the best
    response is `rejected` itself. Unscored responses are in no pair.
    """
    scores, unscored = scores.reshape(-1, group), rollout.index.reshape(-1, group) < 0
    high, low = jnp.where(unscored, -jnp.inf, scores), jnp.where(unscored, jnp.inf, scores)
    ends = jnp.stack([jnp.argmax(high, axis=1), jnp.argmin(low, axis=1)], axis=1)
    rows = ends + group * jnp.arange(len(scores))[:, None]
    pair = jax.tree.map(lambda x: x[rows], rollout)
    if rejected:
        pair = _with_rejected(pair, rejected)
        mask = pair.response_mask
        tokens = jnp.where(mask, pair.tokens[..., -mask.shape[-1] :], -1)
        valid = jnp.any(tokens[:, 0] != tokens[:, 1], axis=1)
    else:  # a NaN score makes the loss NaN too
        valid = jnp.max(high, axis=1) != jnp.min(low, axis=1)
    valid &= jnp.any(~unscored, axis=1)
    return pair, jnp.broadcast_to(valid[:, None], rows.shape).astype(jnp.float32)


def _with_rejected(pair: Rollout, rejected: tuple[int, ...]) -> Rollout:
    """`pair` [n, 2] with the tokens `rejected` as the second response."""
    room = pair.response_mask.shape[-1]
    real = jnp.arange(room) < len(rejected)
    tokens = jnp.zeros(room, pair.tokens.dtype).at[: len(rejected)].set(jnp.asarray(rejected))
    return dataclasses.replace(
        pair,
        tokens=pair.tokens.at[:, 1, -room:].set(tokens),
        mask=pair.mask.at[:, 1, -room:].set(real),
        response_mask=pair.response_mask.at[:, 1].set(real),
        logprobs=pair.logprobs.at[:, 1].set(0.0),
        finished=pair.finished.at[:, 1].set(True),
    )


def policy_metrics(
    rollout: Rollout, logprobs: Array, entropy: Array, ref_logprobs: Array | None, count: Array, rows: Array, grpo: GRPO
) -> Metrics:
    """Metrics of pi_old on `count` tokens of `rows` responses: those of micro-batches add up."""
    mask, gap = rollout.response_mask, sampler_gap(rollout, logprobs)
    metrics = {
        "objective/entropy": masked.total(entropy, mask) / rows,
        "objective/entropy_per_token": masked.total(entropy, mask) / count,
        "val/sampler_logprob_gap": jnp.sum(jnp.abs(gap)) / count,
        "val/sampler_logprob_gap_max": jnp.max(jnp.abs(gap)),
    }
    if grpo.sampler_correction != "none":
        metrics["val/sampler_corrected"] = jnp.sum(sampler_correction(rollout, logprobs, grpo)[1]) / count
    if ref_logprobs is not None:
        metrics |= {
            "objective/kl": masked.total(k1(logprobs, ref_logprobs), mask) / rows,
            "objective/kl_per_token": masked.total(k1(logprobs, ref_logprobs), mask) / count,
            "objective/kl_k3": masked.total(k3(logprobs, ref_logprobs), mask) / rows,
        }
    return metrics


def sampler_correction(rollout: Rollout, logprobs: Array, grpo: GRPO) -> tuple[Array, Array]:
    """Token weights for a sampler that differs from pi_old, and which were cut; losses on the geometric mean of a
    response's ratios truncate that of its weights."""
    mask, gap = rollout.response_mask, sampler_gap(rollout, logprobs)
    if grpo.recipe.loss in ("gspo", "gmpo") and grpo.sampler_correction == "truncate":
        mean = jnp.sum(gap, axis=1, keepdims=True) / jnp.maximum(jnp.sum(mask, axis=1, keepdims=True), 1)
        gap = jnp.broadcast_to(mean, gap.shape)
    return sampler_weights(gap, mask, grpo)


@functools.partial(jax.jit, donate_argnames="state")
def update(
    state: TrainState, frozen: dict[str, Params], experience: GroupExperience, key: Array, *, spec: GRPOSpec
) -> tuple[TrainState, Metrics]:
    """Train on the experience for `num_iterations` passes, each over `num_mini_batches` freshly shuffled mini-batches
    of rows, or of pairs. A mini-batch without a scored response is skipped. If the update needs no old log-probs
    (`GRPOSpec.annotates_policy`) and is one step, without a token budget, they are returned: the metrics have
    `old_logprobs_rows`, f32 [B, R] or of pairs [n, 2, R]."""
    grpo, items = spec.grpo, experience.advantages.shape[0]
    paired = grpo.recipe.loss == "dpo"
    each = items // grpo.num_mini_batches
    num_micro = each * (2 if paired else 1) // (grpo.micro_batch_size or each * (2 if paired else 1))
    num_micro = budget(grpo, spec.mesh) or num_micro
    number, kl_coef, control = state.step, state.kl_coef, state.entropy
    reference = reference_params(state, frozen) if grpo.has_exact_kl else {}
    entropy_coef = grpo.entropy_coef if control is None else control.applied
    order_key, selection_key = jax.random.split(key) if grpo.recipe.loss == "clip_cov" else (key, key)
    selected = select(experience, selection_key, grpo)

    def mini_batch(state: TrainState, rows: Array) -> tuple[TrainState, Metrics]:
        chosen, parts = jax.tree.map(lambda x: x[rows], (experience, selected))
        mask = chosen.rollout.response_mask[:, 0] if spec.rejected else chosen.rollout.response_mask
        size = _size(mask)
        count = jnp.maximum(jnp.sum(chosen.advantages[:, 0]), 1) if paired else size.tokens
        grads, metrics = gradients(
            lambda p, part: loss(p, part[0], part[1], count, size),
            state.params,
            (chosen, parts),
            num_micro,
            {"router": spec.policy},
        )
        used = jnp.any(mask)
        state, norms = apply(state, grads, metrics.pop("loss"), spec.optimizers, {"policy": used})
        known = take_rows(metrics)
        metrics = metrics if "val/ratio_spread" not in metrics else finalize_metrics(metrics)
        steps = {"policy/steps": used.astype(jnp.float32)}
        return sharding.constrain(state, spec.mesh), metrics | norms | known | steps

    def loss(
        params: dict[str, Params], part: GroupExperience, selected: Selected, count: Array, size: _Size
    ) -> tuple[Array, Metrics]:
        policy = policy_params(params, frozen)

        def known(logprobs: Array) -> Metrics:
            if not spec.returns_logprobs:
                return {}
            return {"old_logprobs_rows": jax.lax.stop_gradient(logprobs).reshape(part.rollout.response_mask.shape)}

        if paired:
            rollout, ref = jax.tree.map(lambda x: x.reshape(-1, *x.shape[2:]), (part.rollout, part.ref_logprobs))
            logprobs, entropy, router, _ = _logprobs(policy, rollout, spec)
            value, metrics = preference(logprobs, part, count, grpo)
            metrics |= known(logprobs)
            if spec.rejected:  # every second response was not sampled
                rollout, logprobs, entropy, ref = jax.tree.map(lambda x: x[::2], (rollout, logprobs, entropy, ref))
            return value, metrics | router | policy_metrics(rollout, logprobs, entropy, ref, *size, grpo)
        mask = part.rollout.response_mask
        logprobs, entropy, router, hidden = _logprobs(
            policy, part.rollout, spec, entropy_gradient=grpo.has_entropy_bonus
        )
        old_metrics, old = known(logprobs), part.old_logprobs
        if old is None:
            old = jax.lax.stop_gradient(logprobs)
            measured = jax.lax.stop_gradient(entropy)
            old_metrics |= policy_metrics(part.rollout, old, measured, part.ref_logprobs, *size, grpo)
        normalise, longest = grpo.recipe.normalise, spec.response_length
        if normalise == "sum":
            normalise, longest = "constant", 1
        weights = token_weights(mask, count, size.rows, normalise, longest)
        if grpo.sampler_correction != "none":
            weights *= sampler_correction(part.rollout, old, grpo)[0]
        value, metrics = surrogate(logprobs, old, part, count, weights, kl_coef, selected, grpo)
        if grpo.has_exact_kl:
            kl, kl_metrics = exact_kl(policy, reference, hidden, part.ref_hidden, mask, count, spec, grpo, weights)
            value, metrics = value + kl_coef * kl, metrics | kl_metrics
        if grpo.has_entropy_bonus:
            value -= entropy_coef * masked.total(entropy, mask) / count
        for name, tokens in selected._asdict().items():
            if tokens is not None:
                metrics[f"policy/{name}"] = jnp.sum(tokens & mask) / count
        return value, metrics | old_metrics | router | {
            "policy/entropy_avg": masked.total(entropy, mask) / count,
            "val/log_ratio_max": jnp.max(jnp.abs(logprobs - old)),
        }

    orders = shuffled_rows(order_key, grpo.num_iterations, items, grpo.num_mini_batches)
    state, stacked = jax.lax.scan(mini_batch, state, orders)
    known = in_batch_order(take_rows(stacked), orders[0])
    of_old = "objective/", "val/sampler"  # those of the first step, where pi is pi_old
    used = stacked.pop("policy/steps")
    first = jnp.argmax(used)
    metrics = {k: v[first] if k.startswith(of_old) else masked.mean(v, used > 0) for k, v in stacked.items()}
    metrics["policy/steps"] = jnp.sum(used)
    metrics["skipped_updates"] = jnp.sum(stacked["skipped_updates"])
    if not paired:
        metrics["val/first_log_ratio_max"] = stacked["val/log_ratio_max"][first]
        metrics["val/log_ratio_max"] = jnp.max(stacked["val/log_ratio_max"])
    if control is not None:
        metrics["policy/entropy_coef"] = control.applied
        bounds = grpo.entropy_coef_delta, grpo.entropy_coef_min, grpo.entropy_coef_max
        control = control.after(metrics["policy/entropy_avg"], grpo.entropy_target, *bounds)
    state = dataclasses.replace(
        state, step=number + 1, reference=sync_reference(state, number, spec.reference), entropy=control
    )
    return sharding.constrain(state, spec.mesh), metrics | known


class _Size(NamedTuple):
    """Number of real tokens and of responses with any, at least 1 each."""

    tokens: Array
    rows: Array


def _size(mask: Array) -> _Size:
    mask = mask.reshape(-1, mask.shape[-1])
    return _Size(jnp.maximum(jnp.sum(mask), 1), jnp.maximum(jnp.sum(masked.rows(mask)), 1))


def _logprobs(
    params: Params, rollout: Rollout, spec: GRPOSpec, *, entropy_gradient: bool = False
) -> tuple[Array, Array, dict[str, Array], Array]:
    """(log-probs, entropy) of every response token, f32 [B, R], the router's sums, and the hidden states [B, R + 1,
    D]."""
    hidden, router = response_states_with_router(params, spec.policy, rollout)
    logprobs, entropy = sequence_logprobs(
        params, spec.policy, rollout, spec.temperature, hidden=hidden, entropy_gradient=entropy_gradient
    )
    return logprobs, entropy, router, hidden

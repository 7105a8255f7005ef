"""Programs of preference training: response log-probs, the loss over them, and an optimizer step."""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import sharding
from jaxrlhf.algorithms import kto, masked
from jaxrlhf.algorithms.dpo import LOSSES, Coefs, Divergence, Logprobs, per_token, preference_loss, ratios, sft_term
from jaxrlhf.algorithms.masked import Scalar
from jaxrlhf.algorithms.reference_free import orpo_loss, simpo_loss
from jaxrlhf.config import DPO
from jaxrlhf.config.base import constant
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.models import ModelConfig, forward_with_router
from jaxrlhf.training.optim import Ramp, ramp
from jaxrlhf.training.step import Metrics, Spec, map_rows, supervised_step
from jaxrlhf.types import Batch, PackedPairs, Pairs, Params, TrainState


class Preferences(NamedTuple):
    """A training batch.

    kto has no pairs: `chosen` is the labelled response, and `rejected` its prompt with a response to another prompt,
    for the KL estimate.
    """

    pairs: Pairs | PackedPairs
    reference: Array  # f32 [B, 2], of packed pairs [B, M, 2]   log p of both responses; 0 where there is no reference
    desirable: Array  # bool [B]   kto: the label; else true


class PairLogprobs(NamedTuple):
    """Log-probs of pairs of responses, chosen and rejected on the last axis."""

    logprobs: Array  # f32 [B, 2], of packed pairs [B, M, 2]   log p, summed over the tokens; LD-DPO: with their weights
    tokens: Array  # int32, the same shape   number of tokens summed
    valid: Array  # bool [B], of packed pairs [B, M]   pairs that exist
    plain: Array | None = None  # f32, the same shape   LD-DPO: log p without weights
    weights: Array | None = None  # f32 as valid   WPO: weight of each pair, without a gradient
    router: dict[str, Array] | None = None  # its sums as of `forward_with_router`, in training


def beta_schedule(settings: DPO, total_steps: int) -> Ramp:
    """beta by optimizer step: constant, or linear or cosine decay to `beta_final` at the last step."""
    final = settings.beta if settings.beta_final is None else settings.beta_final
    return ramp(settings.beta_schedule, settings.beta, final, max(total_steps - 1, 1))


def _token_logprobs(
    params: Params, batch: Batch, model: ModelConfig, keys: Array | None, *, weighting: bool = False
) -> tuple[Array, Array, dict[str, Array]]:
    """log p [B, T - 1] of the tokens from the second on; with `weighting` (else 0) the logarithm of p relative to its
    mean under the policy, log (p / sum_v p_v^2), without a gradient; and the router's sums. The first two are 0 outside
    the loss mask."""
    texts = batch.tokens, batch.mask, batch.positions, batch.segments
    hidden, router = forward_with_router(params, model, *texts, keys)
    targets, mask = batch.tokens[:, 1:], batch.loss_mask[:, 1:]
    logprobs, _ = token_logprobs(params, model, hidden[:, :-1], targets, 1.0)
    logprobs = masked.keep(logprobs, mask)
    if not weighting:
        return logprobs, jnp.zeros_like(logprobs), router
    # sum_v p_v^2 is the normaliser of p^2, which is the distribution at temperature 1/2: p^2 / sum_v p_v^2 = p_1/2
    fixed, states = jax.lax.stop_gradient((params, hidden[:, :-1]))
    sharper, _ = token_logprobs(fixed, model, states, targets, 0.5)
    return logprobs, masked.keep(sharper, mask) - jax.lax.stop_gradient(logprobs), router


def pair_logprobs(
    params: Params, pairs: Pairs | PackedPairs, model: ModelConfig, keys: Array | None, settings: DPO
) -> PairLogprobs:
    """One forward over 2B rows, of packed pairs over B rows. `keys` [B] are for dropout."""
    if isinstance(pairs, PackedPairs):
        texts, segments = pairs.texts, pairs.texts.segments
        assert segments is not None
        of_texts = functools.partial(jax.ops.segment_sum, num_segments=2 * pairs.chosen.shape[1])

        def summed(values: Array) -> Array:
            return jax.vmap(of_texts)(values, segments[:, 1:]).reshape(*pairs.valid.shape, 2)
    else:
        texts = jax.tree.map(lambda a, b: jnp.concatenate([a, b]), pairs.chosen, pairs.rejected)
        if keys is not None:
            keys = jnp.concatenate([keys, jax.vmap(jax.random.fold_in, (0, None))(keys, 1)])

        def summed(values: Array) -> Array:
            return jnp.sum(values, axis=1).reshape(2, -1).T

    logprobs, aligned, router = _token_logprobs(params, texts, model, keys, weighting=settings.use_weighting)
    mask = texts.loss_mask[:, 1:].astype(jnp.int32)
    plain, tokens, weights = summed(logprobs), summed(mask), None
    if settings.use_weighting:
        means = summed(aligned) / jnp.maximum(tokens, 1)
        weights = jnp.exp(jnp.sum(means, axis=-1))
    if settings.ld_alpha is None:
        return PairLogprobs(plain, tokens, pairs.valid, None, weights, router)
    common = jnp.broadcast_to(jnp.min(tokens, axis=-1, keepdims=True), tokens.shape)  # the shorter response of the pair
    number = jnp.cumsum(mask, axis=1)  # of a token in its row, from 1
    if isinstance(pairs, PackedPairs):
        assert texts.segments is not None
        flat = tokens.reshape(len(tokens), -1)
        before = jnp.cumsum(flat, axis=1) - flat
        number -= jnp.take_along_axis(before, texts.segments[:, 1:], axis=1)
        limit = jnp.take_along_axis(common.reshape(flat.shape), texts.segments[:, 1:], axis=1)
    else:
        limit = common.T.reshape(-1, 1)
    weighted = summed(jnp.where(number > limit, settings.ld_alpha, 1.0) * logprobs)
    return PairLogprobs(weighted, tokens, pairs.valid, plain, weights, router)


def _logprobs(params: Params, batch: Batch, model: ModelConfig, keys: Array | None) -> tuple[Array, dict[str, Array]]:
    """log p [B] of the response in each row, and the router's sums."""
    logprobs, _, router = _token_logprobs(params, batch, model, keys)
    return jnp.sum(logprobs, axis=1), router


@functools.partial(jax.jit, static_argnames="model")
def score(params: Params, pairs: Pairs | PackedPairs, *, model: ModelConfig, settings: DPO) -> PairLogprobs:
    """`pair_logprobs` without dropout, for the reference and for held-out pairs."""
    return pair_logprobs(params, pairs, model, None, settings)._replace(router=None)


def objective(
    scored: PairLogprobs,
    reference: Array,
    count: Scalar,
    chosen_tokens: Scalar,
    beta: Scalar,
    baseline: Scalar,
    settings: DPO,
) -> tuple[Array, Metrics]:
    """Loss over pairs with its SFT term, and metrics. `count` is the number of pairs in the whole optimizer batch,
    `chosen_tokens` that of the tokens in their chosen responses, and `baseline` the running mean of bco_pair."""
    whole, known, tokens = (x.reshape(-1, 2) for x in (scored.logprobs, reference, scored.tokens))
    pairs = Logprobs(whole[:, 0], whole[:, 1], known[:, 0], known[:, 1], tokens[:, 0], tokens[:, 1])
    sides = pairs.chosen, pairs.rejected, pairs.chosen_tokens, pairs.rejected_tokens
    mask, smoothing = scored.valid.reshape(-1), settings.label_smoothing
    if settings.loss == "simpo":
        value, metrics = simpo_loss(*sides, mask, count, beta, settings.simpo_gamma, smoothing)
    elif settings.loss == "orpo":
        value, metrics = orpo_loss(*sides, mask, count, beta)
    else:
        divergence = Divergence(settings.divergence, settings.alpha)
        coefs = Coefs(beta, smoothing, settings.discopop_tau, baseline)
        weights = None if scored.weights is None else scored.weights.reshape(-1)
        value, metrics = jnp.float32(0), {}
        for name, share in settings.losses.items():
            loss = LOSSES["sigmoid" if name == "cpo" else name]
            if settings.length_normalised and loss.scores is ratios:
                loss = loss._replace(scores=per_token)
            part, metrics = preference_loss(pairs, mask, count, loss, divergence, coefs, weights)
            value += share * part
        metrics |= {"loss": value}
        if weights is not None:
            metrics["pair_weights"] = masked.total(weights, mask) / count
    if not constant(settings.sft_weight, 0):
        unweighted = pairs.chosen if scored.plain is None else scored.plain.reshape(-1, 2)[:, 0]
        term = sft_term(unweighted, mask, chosen_tokens)
        value += settings.sft_weight * term
        metrics |= {"loss": value, "nll_loss": term}
    return value, metrics


def kto_objective(
    logprobs: Array, reference: Array, desirable: Array, kl: Scalar, count: Scalar, beta: Scalar, settings: DPO
) -> tuple[Array, Metrics]:
    """KTO loss of labelled responses from log p [B] under policy and reference; `kl` is the baseline."""
    weights = settings.desirable_weight, settings.undesirable_weight
    every = jnp.ones(desirable.shape, bool)
    return kto.kto_loss(logprobs, reference, desirable, every, count, kl, beta, *weights)


@jax.jit
def evaluate(
    scored: PairLogprobs,
    reference: Array,
    desirable: Array,
    step: Array,
    baseline: Scalar,
    *,
    settings: DPO,
    schedule: Ramp,
) -> Metrics:
    """Loss and metrics of held-out rows after `step` steps, with the beta of the last one and the running mean of
    bco_pair. All rows are taken at once:
    some losses rank them, and the KL of kto is a mean."""
    count, beta = jnp.sum(scored.valid), _beta(jnp.maximum(step - 1, 0), schedule)
    if settings.loss == "kto":
        kl = kto.kl_baseline(scored.logprobs[:, 1], reference[:, 1], scored.valid)
        logprobs = scored.logprobs[:, 0], reference[:, 0]
        metrics = kto_objective(*logprobs, desirable, kl, count, beta, settings)[1]
        return kto.finalize_metrics(metrics) | {"kl": kl}
    chosen_tokens = jnp.sum(jnp.where(scored.valid, scored.tokens[..., 0], 0))
    return objective(scored, reference, count, chosen_tokens, beta, baseline, settings)[1]


def evaluation_keys(settings: DPO) -> list[str]:
    """The metric keys of `evaluate`."""
    row = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    weight = jax.ShapeDtypeStruct((1,), jnp.float32) if settings.use_weighting else None
    valid = jax.ShapeDtypeStruct((1,), jnp.bool_)
    scored = PairLogprobs(row, jax.ShapeDtypeStruct((1, 2), jnp.int32), valid, None, weight)  # type: ignore[arg-type]
    one = functools.partial(evaluate, settings=settings, schedule=beta_schedule(settings, 1))
    return list(jax.eval_shape(one, scored, row, valid, jax.ShapeDtypeStruct((), jnp.int32), 0.0))


@functools.partial(jax.jit, donate_argnames="state")
def update(
    state: TrainState, frozen: Params, batch: Preferences, key: Array, *, spec: Spec
) -> tuple[TrainState, Metrics]:
    """One optimizer step on `batch`. `frozen` is the base model under adapters, else empty; `key` is the run's. The
    objective of `spec` is the settings and the schedule of beta."""
    model, (settings, schedule) = spec.model, spec.objective
    valid, labelled = batch.pairs.valid, settings.loss == "kto"
    count, (chosen_tokens, rejected_tokens) = jnp.sum(valid), _tokens(batch.pairs)
    beta, kl, stats = _beta(state.step, schedule), jnp.float32(0), state.score_stats
    baseline = jnp.float32(0) if stats is None else stats.mean
    if labelled:
        policy = {**frozen, **state.params["policy"]}
        others, parts = batch.pairs.rejected, spec.num_micro
        scored = map_rows(lambda part: _logprobs(policy, part, model, None)[0], others, parts)
        kl = kto.kl_baseline(scored, batch.reference[:, 1], valid)

    def loss(policy: Params, part: Preferences, keys: Array | None) -> tuple[Array, Metrics]:
        if settings.loss == "kto":
            assert isinstance(part.pairs, Pairs)
            logprobs, router = _logprobs(policy, part.pairs.chosen, model, keys)
            value, metrics = kto_objective(logprobs, part.reference[:, 0], part.desirable, kl, count, beta, settings)
            return value, metrics | router
        scored = pair_logprobs(policy, part.pairs, model, keys, settings)
        value, metrics = objective(scored, part.reference, count, chosen_tokens, beta, baseline, settings)
        return value, metrics | (scored.router or {})

    state, metrics = supervised_step(loss, state, frozen, batch, key, spec)
    metrics: Metrics = kto.finalize_metrics(metrics) | {"kl": kl} if labelled else metrics
    if stats is not None:
        mean = 0.5 * (metrics["rewards/chosen"] + metrics["rewards/rejected"])
        moved = stats.add(jnp.where(metrics["skipped_updates"] > 0, jnp.nan, mean), 2 * count)
        state = dataclasses.replace(state, score_stats=sharding.constrain(moved, spec.mesh))
        metrics["rewards/baseline"] = baseline
    tokens = chosen_tokens if labelled else chosen_tokens + rejected_tokens
    return state, metrics | {"num_tokens": tokens, "beta": beta}


def _beta(step: Array, schedule: Ramp) -> Array:
    return jnp.asarray(schedule(step), jnp.float32)


def _tokens(pairs: Pairs | PackedPairs) -> tuple[Array, Array]:
    """Number of tokens in the chosen and in the rejected responses."""
    if isinstance(pairs, Pairs):
        return jnp.sum(pairs.chosen.loss_mask), jnp.sum(pairs.rejected.loss_mask)
    assert pairs.texts.segments is not None
    chosen = pairs.texts.segments % 2 == 0
    return jnp.sum(pairs.texts.loss_mask & chosen), jnp.sum(pairs.texts.loss_mask & ~chosen)

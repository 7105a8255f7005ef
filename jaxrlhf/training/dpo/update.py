"""Programs of preference training: response log-probs, the loss over them, and an optimizer step."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax import Array

from jaxrlhf.algorithms import kto, masked
from jaxrlhf.algorithms.dpo import LOSSES, Coefs, Divergence, Logprobs, per_token, preference_loss, sft_term
from jaxrlhf.algorithms.masked import Scalar
from jaxrlhf.algorithms.reference_free import orpo_loss, simpo_loss
from jaxrlhf.config import DPO
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.models import ModelConfig, forward
from jaxrlhf.training.step import Metrics, Spec, from_micro_batches, supervised_step, to_micro_batches
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

    logprobs: Array  # f32 [B, 2], of packed pairs [B, M, 2]   log p, summed over the tokens
    tokens: Array  # int32, the same shape   number of tokens summed
    valid: Array  # bool [B], of packed pairs [B, M]   pairs that exist


def beta_schedule(settings: DPO, total_steps: int) -> optax.Schedule:
    """beta by optimizer step: constant, or linear or cosine decay to `beta_final` at the last step."""
    steps = max(total_steps - 1, 1)
    if settings.beta_final is None:
        return optax.constant_schedule(settings.beta)
    if settings.beta_schedule == "linear":
        return optax.linear_schedule(settings.beta, settings.beta_final, steps)
    return optax.cosine_decay_schedule(settings.beta, steps, settings.beta_final / settings.beta)


def _token_logprobs(params: Params, batch: Batch, model: ModelConfig, keys: Array | None) -> Array:
    """log p [B, T - 1] of the tokens from the second on, 0 outside the loss mask."""
    hidden = forward(params, model, batch.tokens, batch.mask, batch.positions, batch.segments, keys)
    logprobs, _ = token_logprobs(params, model, hidden[:, :-1], batch.tokens[:, 1:], 1.0)
    return masked.keep(logprobs, batch.loss_mask[:, 1:])


def pair_logprobs(params: Params, pairs: Pairs | PackedPairs, model: ModelConfig, keys: Array | None) -> PairLogprobs:
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

    logprobs = summed(_token_logprobs(params, texts, model, keys))
    return PairLogprobs(logprobs, summed(texts.loss_mask[:, 1:].astype(jnp.int32)), pairs.valid)


def _logprobs(params: Params, batch: Batch, model: ModelConfig, keys: Array | None) -> Array:
    """log p [B] of the response in each row."""
    return jnp.sum(_token_logprobs(params, batch, model, keys), axis=1)


@functools.partial(jax.jit, static_argnames="model")
def score(params: Params, pairs: Pairs | PackedPairs, *, model: ModelConfig) -> PairLogprobs:
    """`pair_logprobs` without dropout, for the reference and for held-out pairs."""
    return pair_logprobs(params, pairs, model, None)


def objective(
    scored: PairLogprobs, reference: Array, count: Scalar, chosen_tokens: Scalar, beta: Scalar, settings: DPO
) -> tuple[Array, Metrics]:
    """Loss over pairs with its SFT term, and metrics. `count` is the number of pairs in the whole optimizer batch and
    `chosen_tokens` that of the tokens in their chosen responses."""
    whole, known, tokens = (x.reshape(-1, 2) for x in (scored.logprobs, reference, scored.tokens))
    pairs = Logprobs(whole[:, 0], whole[:, 1], known[:, 0], known[:, 1], tokens[:, 0], tokens[:, 1])
    sides = pairs.chosen, pairs.rejected, pairs.chosen_tokens, pairs.rejected_tokens
    mask, smoothing = scored.valid.reshape(-1), settings.label_smoothing
    if settings.loss == "simpo":
        value, metrics = simpo_loss(*sides, mask, count, beta, settings.simpo_gamma, smoothing)
    elif settings.loss == "orpo":
        value, metrics = orpo_loss(*sides, mask, count, beta)
    else:
        loss = LOSSES["sigmoid" if settings.loss == "cpo" else settings.loss]
        loss = loss._replace(scores=per_token) if settings.length_normalised else loss
        divergence = Divergence(settings.divergence, settings.alpha)
        coefs = Coefs(beta, smoothing, settings.discopop_tau)
        value, metrics = preference_loss(pairs, mask, count, loss, divergence, coefs)
    if settings.sft_weight:
        term = sft_term(pairs.chosen, mask, chosen_tokens)
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


@functools.partial(jax.jit, static_argnames=("settings", "total_steps"))
def evaluate(
    scored: PairLogprobs, reference: Array, desirable: Array, step: Array, *, settings: DPO, total_steps: int
) -> Metrics:
    """Loss and metrics of held-out rows after `step` steps, with the beta of the last one. All rows are taken at once:
    some losses rank them, and the KL of kto is a mean."""
    count, beta = jnp.sum(scored.valid), _beta(jnp.maximum(step - 1, 0), settings, total_steps)
    if settings.loss == "kto":
        kl = kto.kl_baseline(scored.logprobs[:, 1], reference[:, 1], scored.valid)
        logprobs = scored.logprobs[:, 0], reference[:, 0]
        metrics = kto_objective(*logprobs, desirable, kl, count, beta, settings)[1]
        return kto.finalize_metrics(metrics) | {"kl": kl}
    chosen_tokens = jnp.sum(jnp.where(scored.valid, scored.tokens[..., 0], 0))
    return objective(scored, reference, count, chosen_tokens, beta, settings)[1]


def evaluation_keys(settings: DPO) -> list[str]:
    """The metric keys of `evaluate`."""
    row = jax.ShapeDtypeStruct((1, 2), jnp.float32)
    scored = PairLogprobs(row, jax.ShapeDtypeStruct((1, 2), jnp.int32), jax.ShapeDtypeStruct((1,), jnp.bool_))  # type: ignore[arg-type]
    one = functools.partial(evaluate, settings=settings, total_steps=1)
    return list(jax.eval_shape(one, scored, row, scored.valid, jax.ShapeDtypeStruct((), jnp.int32)))


@functools.partial(jax.jit, static_argnames="spec", donate_argnames="state")
def update(
    state: TrainState, frozen: Params, batch: Preferences, key: Array, *, spec: Spec
) -> tuple[TrainState, Metrics]:
    """One optimizer step on `batch`. `frozen` is the base model under adapters, else empty; `key` is the run's. The
    objective of `spec` is the settings and the number of steps of the run."""
    model, (settings, total_steps) = spec.model, spec.objective
    valid, labelled = batch.pairs.valid, settings.loss == "kto"
    count, (chosen_tokens, rejected_tokens) = jnp.sum(valid), _tokens(batch.pairs)
    beta, kl = _beta(state.step, settings, total_steps), jnp.float32(0)
    if labelled:
        policy, others = {**frozen, **state.params["policy"]}, to_micro_batches(batch.pairs.rejected, spec.num_micro)
        scored = jax.lax.map(lambda part: _logprobs(policy, part, model, None), others)
        kl = kto.kl_baseline(from_micro_batches(scored), batch.reference[:, 1], valid)

    def loss(policy: Params, part: Preferences, keys: Array | None) -> tuple[Array, Metrics]:
        if settings.loss == "kto":
            assert isinstance(part.pairs, Pairs)
            logprobs = _logprobs(policy, part.pairs.chosen, model, keys)
            return kto_objective(logprobs, part.reference[:, 0], part.desirable, kl, count, beta, settings)
        scored = pair_logprobs(policy, part.pairs, model, keys)
        return objective(scored, part.reference, count, chosen_tokens, beta, settings)

    state, metrics = supervised_step(loss, state, frozen, batch, key, spec)
    metrics: Metrics = kto.finalize_metrics(metrics) | {"kl": kl} if labelled else metrics
    tokens = chosen_tokens if labelled else chosen_tokens + rejected_tokens
    return state, metrics | {"num_tokens": tokens, "beta": beta}


def _beta(step: Array, settings: DPO, total_steps: int) -> Array:
    return jnp.asarray(beta_schedule(settings, total_steps)(step), jnp.float32)


def _tokens(pairs: Pairs | PackedPairs) -> tuple[Array, Array]:
    """Number of tokens in the chosen and in the rejected responses."""
    if isinstance(pairs, Pairs):
        return jnp.sum(pairs.chosen.loss_mask), jnp.sum(pairs.rejected.loss_mask)
    assert pairs.texts.segments is not None
    chosen = pairs.texts.segments % 2 == 0
    return jnp.sum(pairs.texts.loss_mask & chosen), jnp.sum(pairs.texts.loss_mask & ~chosen)

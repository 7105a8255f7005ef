"""Scores of a batch of responses, and the loss of a reward model on them."""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import reward
from jaxrlhf.algorithms.masked import Scalar
from jaxrlhf.algorithms.reward import Metrics
from jaxrlhf.config import RewardConfig
from jaxrlhf.logprobs import last_hidden
from jaxrlhf.models import ModelConfig, forward_with_router, log_odds
from jaxrlhf.types import PackedPairs, Params, Responses


class Objective(NamedTuple):
    """The loss and its coefficients, as in `RewardConfig`."""

    loss: str
    label_smoothing: float
    center_rewards_coefficient: float
    nu: float


def objective_of(config: RewardConfig) -> Objective:
    return Objective(config.loss, config.label_smoothing, config.center_rewards_coefficient, config.nu)


def response_scores(
    params: Params, batch: Responses | PackedPairs, model: ModelConfig, keys: Array | None
) -> Float[Array, "... G"]:
    """Scores, or log-odds of a two-label model: [B, G] by one forward over B * G texts, or [B, M, 2] of packed pairs by
    one over B rows. `keys` [B] are for dropout in training; each text gets a key of its own."""
    return scores_with_router(params, batch, model, keys)[0]


def scores_with_router(
    params: Params, batch: Responses | PackedPairs, model: ModelConfig, keys: Array | None
) -> tuple[Float[Array, "... G"], dict[str, Array]]:
    """`response_scores`, and the router's sums as of `forward_with_router`."""
    shape = batch.real.shape
    head_keys = None if keys is None else _text_keys(keys, math.prod(shape[1:]))
    if isinstance(batch, PackedPairs):
        texts = batch.texts
        columns = texts.tokens, texts.mask, texts.positions, texts.segments
        hidden, router = forward_with_router(params, model, *columns, keys)
        ends = jnp.stack([batch.chosen, batch.rejected], axis=-1).reshape(shape[0], -1)
        hidden = jnp.take_along_axis(hidden, ends[..., None], axis=1).reshape(-1, hidden.shape[-1])
    else:
        tokens, mask = (x.reshape(-1, x.shape[-1]) for x in (batch.tokens, batch.mask))
        hidden, router = last_hidden(params, model, tokens, mask, head_keys)
    if head_keys is None or model.head != "mlp":
        return log_odds(params, model, hidden).reshape(shape), router
    scores = jax.vmap(lambda row, key: log_odds(params, model, row, key))(hidden, head_keys)
    return scores.reshape(shape), router


def _text_keys(keys: Array, number: int) -> Array:
    """[B] -> [B * number]."""
    each = jax.vmap(lambda key: jax.vmap(jax.random.fold_in, (None, 0))(key, jnp.arange(number)))(keys)
    return each.reshape(-1)


def response_loss(
    scores: Float[Array, "*rows G"],
    real: Bool[Array, "*rows G"],
    target: Float[Array, "*rows"],
    count: Scalar,
    objective: Objective,
) -> tuple[Float[Array, ""], Metrics]:
    """The loss of `objective` and its metrics, `loss` among them: a sum over rows divided by `count`, the number of
    rows in the whole batch."""
    if objective.loss == "ranking":
        return reward.ranking_loss(scores, real, count)
    first, mask = scores[..., 0], real[..., 0]
    if objective.loss == "classification":
        return reward.classification_loss(first, target > 0, mask, count)
    if objective.loss == "regression":
        return reward.regression_loss(first, target, mask, count)
    second = scores[..., 1]
    if objective.loss == "ties":
        loss, metrics = reward.ties_loss(first, second, target > 0, mask, count, objective.nu)
    else:
        loss, metrics = reward.pairwise_loss(first, second, mask, count, objective.label_smoothing, target)
    loss += objective.center_rewards_coefficient * reward.centring_term(first, second, mask, count)
    return loss, metrics | {"loss": loss}

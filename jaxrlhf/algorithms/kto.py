"""Kahneman-Tversky optimisation (https://arxiv.org/abs/2402.01306): unpaired responses labelled good or bad."""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Metrics, Scalar


def kl_baseline(
    logprobs: Float[Array, " B"], ref_logprobs: Float[Array, " B"], mask: Bool[Array, " B"]
) -> Float[Array, ""]:
    """The paper's z0 = max(0, mean log(pi / ref)) over mismatched prompts and responses. Without a gradient.

    Call it on the WHOLE optimizer batch: the estimate of a micro-batch is another, noisier number. 0 if the mask is
    empty.
    """
    mean = masked.total(logprobs - ref_logprobs, mask) / jnp.maximum(jnp.sum(mask), 1)
    return jax.lax.stop_gradient(jnp.maximum(mean, 0.0))


def kto_loss(
    logprobs: Float[Array, " B"],
    ref_logprobs: Float[Array, " B"],
    desirable: Bool[Array, " B"],
    mask: Bool[Array, " B"],
    count: Scalar,
    kl: Scalar,
    beta: Scalar,
    desirable_weight: Scalar,
    undesirable_weight: Scalar,
) -> tuple[Float[Array, ""], Metrics]:
    """KTO loss, with the value function v = weight sigmoid(+-beta (log(pi / ref) - kl)).

        loss = 1 / count  sum weight (1 - sigmoid(beta (log(pi / ref) - kl)))    if desirable
                          sum weight (1 - sigmoid(beta (kl - log(pi / ref))))    if not

    `logprobs` are sums over the tokens of a response, `mask` marks the rows that are responses, and `count` is their
    number in the whole optimizer batch. `kl` is the `kl_baseline`; with 0, and weights of 1, this is the unpaired form
    of APO-zero (https://arxiv.org/abs/2408.06266). Finite for finite log-probs, also if all responses have one label.
    Metrics add up over micro-batches like the loss; pass their sum to `finalize_metrics`.
    """
    logprobs, ref_logprobs = masked.keep(logprobs, mask), masked.keep(ref_logprobs, mask)
    log_ratio = logprobs - ref_logprobs
    sign = jnp.where(desirable, 1.0, -1.0)
    weight = jnp.where(desirable, desirable_weight, undesirable_weight)
    loss = masked.total(weight * jax.nn.sigmoid(-sign * beta * (log_ratio - kl)), mask) / count
    metrics = {"loss": loss}
    for kind, rows in (("chosen", mask & desirable), ("rejected", mask & ~desirable)):
        metrics[f"rewards/{kind}"] = beta * masked.total(log_ratio, rows) / count
        metrics[f"logps/{kind}"] = masked.total(logprobs, rows) / count
        metrics[f"share/{kind}"] = jnp.sum(rows) / count
    return loss, metrics


def finalize_metrics(metrics: Metrics) -> Metrics:
    """Turn the sum of the micro-batches' metrics into means over the responses of each label, and their margin.

    The means of a label without responses are 0; its share is 0 too.
    """
    chex.assert_rank(list(metrics.values()), 0)
    metrics = dict(metrics)
    for kind in ("chosen", "rejected"):
        share = metrics[f"share/{kind}"]
        for name in (f"rewards/{kind}", f"logps/{kind}"):
            metrics[name] = metrics[name] / jnp.where(share > 0, share, 1.0)
    return metrics | {"rewards/margins": metrics["rewards/chosen"] - metrics["rewards/rejected"]}

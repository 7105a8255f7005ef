"""Direct preference optimisation (https://arxiv.org/abs/2305.18290) and its variants.

All of them compare how far the policy has moved from the reference on the chosen and on the rejected response. `LOSSES`
maps each name to the scores that are compared (`ratios`, `per_token`, `ranked_ratios`, `ranked_margins`) and the loss
of a pair given its scores. In the equations c and r are the scores of the chosen and the rejected response, log(pi /
ref) under reverse KL, and s is the sigmoid. CPO (https://arxiv.org/abs/2401.08417) is `sigmoid` with a reference of 0
and the `sft_term`; losses without a reference are in reference_free.py, unpaired responses in kto.py.
"""

from collections.abc import Callable
from typing import Literal, NamedTuple

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Metrics, Scalar
from jaxrlhf.algorithms.reward import smoothed
from jaxrlhf.config.base import constant


class Logprobs(NamedTuple):
    """log p(response | prompt) of B pairs under policy and reference, summed over the tokens of the response."""

    chosen: Float[Array, " B"]
    rejected: Float[Array, " B"]
    ref_chosen: Float[Array, " B"]
    ref_rejected: Float[Array, " B"]
    chosen_tokens: Int[Array, " B"]  # number of tokens of the response
    rejected_tokens: Int[Array, " B"]


class Coefs(NamedTuple):
    """Coefficients that may change during a run. A loss uses those in its equation."""

    beta: Scalar  # above 0
    label_smoothing: Scalar  # probability that a pair is mislabelled; at least 0, below 0.5
    discopop_tau: Scalar  # above 0 and below 1
    baseline: Scalar = 0.0  # bco_pair: mean of the rewards beta log(pi / ref) of all responses


class Divergence(NamedTuple):
    """f-divergence from the reference. Names are TRL's.

    `alpha`, for alpha_divergence only, is that of the paper (TRL's is 1 - alpha): 0 is reverse, 1 forward KL.
    """

    name: Literal["reverse_kl", "forward_kl", "js_divergence", "alpha_divergence"]
    alpha: Scalar


Scores = tuple[Float[Array, " B"], Float[Array, " B"]]


def divergence_scores(log_ratio: Float[Array, "*shape"], divergence: Divergence) -> Float[Array, "*shape"]:
    """Implicit rewards f'(u), u = pi / ref, up to a factor (https://arxiv.org/abs/2309.16240, table of divergences).

        reverse KL log u,    forward KL 1 - 1 / u,    Jensen-Shannon log(2u / (1 + u)),    alpha (1 - u^-alpha) / alpha

    Constants are chosen so that the reference itself scores 0. Scores are bounded where u^alpha < exp(-40), without a
    gradient there, so that their squares do not overflow in float32.
    """
    chex.assert_type(log_ratio, float)
    if divergence.name == "js_divergence":
        return jnp.log(2.0) + jax.nn.log_sigmoid(log_ratio)
    alpha = {"reverse_kl": 0.0, "forward_kl": 1.0}.get(divergence.name, divergence.alpha)
    if constant(alpha, 0):
        return log_ratio
    return -jnp.expm1(jnp.minimum(-alpha * log_ratio, 40.0)) / alpha


def ratios(logprobs: Logprobs, mask: Bool[Array, " B"], divergence: Divergence) -> Scores:
    """Scores of whole responses."""
    chex.assert_equal_shape([*logprobs, mask])
    return (
        divergence_scores(logprobs.chosen - logprobs.ref_chosen, divergence),
        divergence_scores(logprobs.rejected - logprobs.ref_rejected, divergence),
    )


def log_ratios(logprobs: Logprobs, mask: Bool[Array, " B"], divergence: Divergence) -> Scores:
    """log(pi / ref) of whole responses, whatever the divergence."""
    del divergence
    chex.assert_equal_shape([*logprobs, mask])
    return logprobs.chosen - logprobs.ref_chosen, logprobs.rejected - logprobs.ref_rejected


def per_token(logprobs: Logprobs, mask: Bool[Array, " B"], divergence: Divergence) -> Scores:
    """Scores divided by the number of tokens; an empty response scores 0."""
    chosen, rejected = ratios(logprobs, mask, divergence)
    return chosen / jnp.maximum(logprobs.chosen_tokens, 1), rejected / jnp.maximum(logprobs.rejected_tokens, 1)


def ranked(x: Float[Array, " B"], mask: Bool[Array, " B"]) -> Float[Array, " B"]:
    """The real entries of `x` in ascending order, at the true places of the mask; 0 elsewhere."""
    return masked.keep(jnp.sort(jnp.where(mask, x, jnp.inf))[jnp.cumsum(mask) - 1], mask)


def ranked_ratios(logprobs: Logprobs, mask: Bool[Array, " B"], divergence: Divergence) -> Scores:
    """Sorted scores of the chosen and of the rejected responses (unpaired AOT, https://arxiv.org/abs/2406.05882).

    The k-th smallest of both are compared, so the responses need not be pairs. As in `ranked_margins`, ranks are taken
    over the whole batch.
    """
    chosen, rejected = ratios(logprobs, mask, divergence)
    return ranked(chosen, mask), ranked(rejected, mask)


def ranked_margins(logprobs: Logprobs, mask: Bool[Array, " B"], divergence: Divergence) -> Scores:
    """Sorted log(pi(chosen) / pi(rejected)) of the policy and of the reference (paired AOT).

    Source: https://arxiv.org/abs/2406.05882. The loss makes the margins of the policy stochastically dominate those of
    the reference. Ranks are taken over the WHOLE optimizer batch: do not split it. The losses of micro-batches would
    add up to another loss. Meaningful for reverse KL only.
    """
    del divergence
    chex.assert_equal_shape([*logprobs, mask])
    policy = ranked(logprobs.chosen - logprobs.rejected, mask)
    return policy, ranked(logprobs.ref_chosen - logprobs.ref_rejected, mask)


def sigmoid(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """-(1 - e) log s(beta (c - r)) - e log s(-beta (c - r)), e the label smoothing.

    https://arxiv.org/abs/2305.18290, eq. 7; with e, "conservative DPO" (E. Mitchell, https://ericmitchell.ai/cdpo.pdf).
    """
    chex.assert_equal_shape([chosen, rejected])
    return smoothed(coefs.beta * (chosen - rejected), coefs.label_smoothing)


def robust(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """(-(1 - e) log s(beta (c - r)) + e log s(-beta (c - r))) / (1 - 2e) (https://arxiv.org/abs/2403.00409).

    Its expectation over labels that are wrong with probability e is the loss of the true labels. May be negative.
    """
    chex.assert_equal_shape([chosen, rejected])
    margin, e = coefs.beta * (chosen - rejected), coefs.label_smoothing
    return (-(1 - e) * jax.nn.log_sigmoid(margin) + e * jax.nn.log_sigmoid(-margin)) / (1 - 2 * e)


def hinge(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """max(0, 1 - beta (c - r)) (https://arxiv.org/abs/2309.06657: the hinge loss of SLiC on ratios)."""
    chex.assert_equal_shape([chosen, rejected])
    return jax.nn.relu(1 - coefs.beta * (chosen - rejected))


def ipo(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """(c - r - 1 / (2 beta))^2 (https://arxiv.org/abs/2310.12036, eq. 17, whose tau is beta)."""
    chex.assert_equal_shape([chosen, rejected])
    return jnp.square(chosen - rejected - 0.5 / coefs.beta)


def exo(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """KL(q || p), q = (s(beta (c - r)), s(-beta (c - r))), p = (1 - e, e) (https://arxiv.org/abs/2402.00856, eq. 16).

    e is the label smoothing and must be above 0: the KL to p = (1, 0) is infinite.
    """
    chex.assert_equal_shape([chosen, rejected])
    margin, e = coefs.beta * (chosen - rejected), coefs.label_smoothing
    right = jax.nn.sigmoid(margin) * (jax.nn.log_sigmoid(margin) - jnp.log1p(-e))
    return right + jax.nn.sigmoid(-margin) * (jax.nn.log_sigmoid(-margin) - jnp.log(e))


def nca(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """-log s(beta c) - log s(-beta c) / 2 - log s(-beta r) / 2 (https://arxiv.org/abs/2402.05369)."""
    chex.assert_equal_shape([chosen, rejected])
    chosen, rejected = coefs.beta * chosen, coefs.beta * rejected
    against = jax.nn.log_sigmoid(-chosen) + jax.nn.log_sigmoid(-rejected)
    return -jax.nn.log_sigmoid(chosen) - 0.5 * against


def sppo(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """(c - 1 / (2 beta))^2 + (r + 1 / (2 beta))^2 (https://arxiv.org/abs/2405.00675, eq. 4.7, with eta = 1 / beta).

    The hard form: the chosen response wins with probability 1.
    """
    chex.assert_equal_shape([chosen, rejected])
    return jnp.square(chosen - 0.5 / coefs.beta) + jnp.square(rejected + 0.5 / coefs.beta)


def apo_zero(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """1 - s(beta c) + s(beta r) (https://arxiv.org/abs/2408.06266, eq. 7).

    For chosen responses better than the model's: raises the chosen and lowers the rejected response.
    """
    chex.assert_equal_shape([chosen, rejected])
    return jax.nn.sigmoid(-coefs.beta * chosen) + jax.nn.sigmoid(coefs.beta * rejected)


def apo_down(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """s(beta c) + 1 - s(beta (c - r)) (https://arxiv.org/abs/2408.06266, eq. 8).

    For chosen responses worse than the model's: lowers both, the rejected response more.
    """
    chex.assert_equal_shape([chosen, rejected])
    return jax.nn.sigmoid(coefs.beta * chosen) + jax.nn.sigmoid(-coefs.beta * (chosen - rejected))


def bco_pair(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """-log s(beta c - d) - log s(-(beta r - d)), d the running mean of rewards (https://arxiv.org/abs/2404.04656).

    A classifier of the responses by their rewards, shifted by their mean.
    """
    chex.assert_equal_shape([chosen, rejected])
    chosen, rejected = coefs.beta * chosen - coefs.baseline, coefs.beta * rejected - coefs.baseline
    return -jax.nn.log_sigmoid(chosen) - jax.nn.log_sigmoid(-rejected)


class RunningMean(NamedTuple):
    """Mean of all implicit rewards so far, for `bco_pair`, and their number."""

    seen: Float[Array, ""]
    mean: Float[Array, ""]

    def add(self, mean: Scalar, count: Scalar) -> "RunningMean":
        """Add `count` rewards with this mean; none if it is not finite."""
        total = jnp.maximum(self.seen + count, 1)
        finite = jnp.isfinite(mean)
        moved = self.mean + (mean - self.mean) * count / total
        return RunningMean(jnp.where(finite, self.seen + count, self.seen), jnp.where(finite, moved, self.mean))


def discopop(chosen: Float[Array, " B"], rejected: Float[Array, " B"], coefs: Coefs) -> Float[Array, " B"]:
    """-(1 - w) log s(m) + w exp(-m), m = beta (c - r), w = s(m / tau) (https://arxiv.org/abs/2406.08414, eq. 5).

    w exp(-m) is computed as one exponential, so that exp(-m) does not overflow where w is 0.
    """
    chex.assert_equal_shape([chosen, rejected])
    margin = coefs.beta * (chosen - rejected)
    scaled = margin / coefs.discopop_tau
    exponential = jnp.exp(jax.nn.log_sigmoid(scaled) - margin)
    return exponential - jax.nn.sigmoid(-scaled) * jax.nn.log_sigmoid(margin)


class Loss(NamedTuple):
    """A preference loss: the scores of both responses, and the loss of a pair given its scores."""

    scores: Callable[[Logprobs, Bool[Array, " B"], Divergence], Scores]
    pair_loss: Callable[[Float[Array, " B"], Float[Array, " B"], Coefs], Float[Array, " B"]]


LOSSES = {
    "sigmoid": Loss(ratios, sigmoid),
    "sigmoid_norm": Loss(per_token, sigmoid),
    "robust": Loss(ratios, robust),
    "hinge": Loss(ratios, hinge),
    "ipo": Loss(per_token, ipo),
    "exo_pair": Loss(ratios, exo),
    "nca_pair": Loss(ratios, nca),
    "sppo_hard": Loss(ratios, sppo),
    "aot": Loss(ranked_margins, sigmoid),
    "aot_unpaired": Loss(ranked_ratios, sigmoid),
    "apo_zero": Loss(ratios, apo_zero),
    "apo_down": Loss(ratios, apo_down),
    "discopop": Loss(ratios, discopop),
    "bco_pair": Loss(log_ratios, bco_pair),
}
"""Losses by TRL's names. `ipo` is per token, as in its authors' code, though eq. 17 is for whole responses."""


def preference_loss(
    logprobs: Logprobs,
    mask: Bool[Array, " B"],
    count: Scalar,
    loss: Loss,
    divergence: Divergence,
    coefs: Coefs,
    weights: Float[Array, " B"] | None = None,
) -> tuple[Float[Array, ""], Metrics]:
    """1 / count  sum of the losses of the pairs, and `pair_metrics` with rewards beta log(pi / ref).

    `mask` marks the rows that are pairs, and `count` is the number of pairs of the whole optimizer batch. `weights`
    multiply the losses of the pairs (None: 1); they fit no loss that ranks responses. Loss and gradient are finite for
    finite log-probs and coefficients in their ranges.
    """
    chex.assert_equal_shape([*logprobs, mask])
    kept = Logprobs(*(jnp.where(mask, values, 0) for values in logprobs))
    chosen, rejected = loss.scores(kept, mask, divergence)
    losses = loss.pair_loss(chosen, rejected, coefs)
    value = masked.total(losses if weights is None else losses * masked.keep(weights, mask), mask) / count
    rewards = coefs.beta * (kept.chosen - kept.ref_chosen), coefs.beta * (kept.rejected - kept.ref_rejected)
    return value, {"loss": value} | pair_metrics(rewards, (kept.chosen, kept.rejected), mask, count)


def pair_metrics(rewards: Scores, logprobs: Scores, mask: Bool[Array, " B"], count: Scalar) -> Metrics:
    """Means over the pairs of (chosen, rejected) rewards and log-probs. A tie counts as a wrong prediction."""
    rewards = masked.keep(rewards[0], mask), masked.keep(rewards[1], mask)
    return {
        "rewards/chosen": jnp.sum(rewards[0]) / count,
        "rewards/rejected": jnp.sum(rewards[1]) / count,
        "rewards/accuracies": jnp.sum(rewards[0] > rewards[1]) / count,
        "rewards/margins": jnp.sum(rewards[0] - rewards[1]) / count,
        "logps/chosen": masked.total(logprobs[0], mask) / count,
        "logps/rejected": masked.total(logprobs[1], mask) / count,
    }


def sft_term(chosen: Float[Array, " B"], mask: Bool[Array, " B"], tokens: Scalar) -> Float[Array, ""]:
    """Cross-entropy of the chosen responses, -1 / tokens  sum log pi(chosen), in nats per token.

    To be multiplied by a coefficient and added to the loss, as in CPO and ORPO. `tokens` is the number of tokens in the
    chosen responses of the whole optimizer batch.
    """
    return -masked.total(chosen, mask) / tokens

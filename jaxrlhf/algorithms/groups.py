"""Advantages without a value model: each response is compared with the other responses to its prompt, its group.

A group is identified by an integer per row, as in `Rollout.index`, not by position. So groups may differ in size
(dynamic sampling, the end of a data set), rows may come in any order and on any device, and a prompt that occurs twice
in a batch is one larger group. Every function takes the whole batch, not a micro-batch or one device's shard.

Advantages are computed from differences of scores within the group, so they are exactly 0 in a group whose scores are
all equal, and in a group of one. `zero_variance` marks both, `group_metrics` counts them. Advantages [B] apply to every
token of the response.
"""

import chex
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.algorithms.advantages import reward_to_go, whiten
from jaxrlhf.algorithms.masked import Metrics, Scalar

DEVIATION_FLOOR = 1e-4  # added to the standard deviation of a group's scores, as in TRL


def grpo(scores: Float[Array, " B"], group: Int[Array, " B"], scale: bool) -> Float[Array, " B"]:
    """GRPO: (score - mean) / (std + 1e-4) within the group (https://arxiv.org/abs/2402.03300, 4.1.2).

    Without `scale`, score - mean: Dr. GRPO, which does not give easy and hard prompts a higher weight
    (https://arxiv.org/abs/2503.20783, 3). The unbiased variance (divided by n - 1) and the 1e-4 are TRL's choices.
    """
    differences, size = _differences(scores, group)
    centred = differences / size
    if not scale:
        return centred
    squares = jnp.sum(jnp.where(_same(group), jnp.square(centred), 0.0), axis=1)
    return centred / (jnp.sqrt(squares / jnp.maximum(size - 1, 1)) + DEVIATION_FLOOR)


def rloo(scores: Float[Array, " B"], group: Int[Array, " B"]) -> Float[Array, " B"]:
    """REINFORCE leave-one-out: score - mean of the others of the group (https://arxiv.org/abs/2402.14740)."""
    differences, size = _differences(scores, group)
    return differences / jnp.maximum(size - 1, 1)


def gpg(scores: Float[Array, " B"], group: Int[Array, " B"]) -> Float[Array, " B"]:
    """GPG: alpha (score - mean of the group), with F_norm = 1 (https://arxiv.org/abs/2504.02546).

    alpha = B / (B - rows in zero-variance groups) compensates for rows without a gradient in a mean over all B rows.
    Rows whose score is nan, groups of their own, are not among the B.
    """
    differences, size = _differences(scores, group)
    scored = ~jnp.isnan(scores)
    return differences / size * (jnp.sum(scored) / jnp.maximum(jnp.sum(scored & ~zero_variance(scores, group)), 1))


def remax(scores: Float[Array, " B"], greedy_scores: Float[Array, " B"]) -> Float[Array, " B"]:
    """ReMax: score - score of the greedy response to the same prompt (https://arxiv.org/abs/2310.10505, alg. 1)."""
    chex.assert_equal_shape([scores, greedy_scores])
    return scores - greedy_scores


def reinforce_pp(rewards: Float[Array, "B R"], mask: Bool[Array, "B R"], gamma: Scalar) -> Float[Array, "B R"]:
    """REINFORCE++: rewards to go, whitened over all tokens of the batch (https://arxiv.org/abs/2501.03262).

    `rewards` are those of `ppo.token_rewards`: for gamma = 1 the reward to go is score - kl_coef (KL from t on).
    """
    return whiten(reward_to_go(rewards, mask, jnp.zeros_like(rewards[:, 0]), gamma), mask, shift_mean=True)


def reinforce_pp_baseline(
    scores: Float[Array, " B"], group: Int[Array, " B"], mask: Bool[Array, "B R"]
) -> Float[Array, "B R"]:
    """REINFORCE++ with baseline: score - mean of the group, whitened over all tokens (its KL is in the loss).

    Source: https://arxiv.org/abs/2501.03262. Zero-variance groups end up near 0 rather than at 0: whitening subtracts
    the mean over tokens, which weights responses by their length.
    """
    chex.assert_rank(mask, 2)
    chex.assert_shape(scores, mask.shape[:1])
    return whiten(jnp.broadcast_to(grpo(scores, group, scale=False)[:, None], mask.shape), mask, shift_mean=True)


def zero_variance(scores: Float[Array, " B"], group: Int[Array, " B"]) -> Bool[Array, " B"]:
    """True if all scores of the row's group are equal, so also for a group of one. False for a nan score.

    These are the groups that dynamic sampling replaces (https://arxiv.org/abs/2503.14476, 3.2).
    """
    chex.assert_equal_shape([scores, group])
    return ~jnp.any(_same(group) & (scores[:, None] != scores), axis=1)


def group_metrics(scores: Float[Array, " B"], group: Int[Array, " B"]) -> Metrics:
    """Number of groups, of those whose scores are all equal, and of those with one response. Rows whose score is nan
    are no groups."""
    equal_scores, same = zero_variance(scores, group), _same(group)
    first = (jnp.argmax(same, axis=1) == jnp.arange(len(group))) & ~jnp.isnan(scores)

    def number(rows: Bool[Array, " B"]) -> Float[Array, ""]:
        return jnp.sum(first & rows).astype(jnp.float32)

    return {
        "groups/count": number(first),
        "groups/flat": number(equal_scores),
        "groups/single": number(jnp.sum(same, axis=1) == 1),
    }


def _same(group: Int[Array, " B"]) -> Bool[Array, "B B"]:
    return group[:, None] == group


def _differences(scores: Float[Array, " B"], group: Int[Array, " B"]) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """(sum over the group of score - the other's score, size of the group): exactly 0 if all scores are equal."""
    chex.assert_equal_shape([scores, group])
    same = _same(group)
    return jnp.sum(jnp.where(same, scores[:, None] - scores, 0.0), axis=1), jnp.sum(same, axis=1)

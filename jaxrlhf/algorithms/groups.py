"""Advantages without a value model: each response is compared with the other responses to its prompt, its group.

A group is identified by an integer per row, as in `Rollout.index`, not by position. So groups may differ in size
(dynamic sampling, the end of a data set), rows may come in any order and on any device, and a prompt that occurs twice
in a batch is one larger group. Every function takes the whole batch, not a micro-batch or one device's shard.

Advantages are computed from differences of scores within the group, so they are exactly 0 in a group whose scores are
all equal, and in a group of one. `zero_variance` marks both, `group_metrics` counts them. Advantages [B] apply to every
token of the response.
"""

import chex
import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.algorithms import masked
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
    same = _same(group)
    unit = masked.power_of_two(jnp.max(jnp.where(same, jnp.abs(centred), 0.0), axis=1))
    squares = jnp.sum(jnp.where(same, jnp.square(centred / unit[:, None]), 0.0), axis=1)
    return centred / (unit * jnp.sqrt(squares / jnp.maximum(size - 1, 1)) + DEVIATION_FLOOR)


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


def gdpo(components: Float[Array, "B K"], weights: Float[Array, " K"], group: Int[Array, " B"]) -> Float[Array, " B"]:
    """GDPO: GRPO's advantages of each component of the reward, summed with its weight, then normalised over the batch.

        S = sum_k w_k (r_k - mean_group) / (std_group + 1e-4),    A = (S - mean S) / (std S + 1e-4)

    Source: https://arxiv.org/abs/2601.05242; variances are unbiased and 1e-4 is added as in TRL. A nan is a component
    without a score for that row: it is no part of the group's statistics and adds 0. A row without any score, a group
    of its own, is no part of the batch's statistics and has advantage 0.
    """
    chex.assert_shape(components, (*group.shape, *weights.shape))
    chex.assert_rank([components, weights], [2, 1])

    def of_component(scores: Float[Array, " B"]) -> Float[Array, " B"]:
        return grpo(*_known(scores, group), scale=True)

    summed = jax.vmap(of_component, in_axes=1, out_axes=1)(components) @ weights
    scored = jnp.any(~jnp.isnan(components), axis=1)
    centred = masked.keep(summed - masked.mean(summed, scored), scored)
    return centred / (masked.deviation(centred, scored, jnp.sum(scored) - 1) + DEVIATION_FLOOR)


def pass_at_k(scores: Float[Array, " B"], group: Int[Array, " B"], k: int) -> Float[Array, " B"]:
    """Pass@k: the expected maximum over subsets of k responses with this one, less that over all subsets of k.

        A_i = (E[max of a subset | i in it] - E[max of a subset]) / (std of the max of a subset + 1e-4)

    Subsets are those of the group; expectations and the deviation are exact. For scores of 0 and 1 these are the
    analytical advantages of https://arxiv.org/abs/2508.10751, as max is then 1 with probability 1 - C(n0, k) / C(n, k),
    n0 of the n responses being wrong. A group of k or fewer has advantages of 0.
    """
    chex.assert_equal_shape([scores, group])
    same, row = _same(group), jnp.arange(len(scores))
    size = jnp.sum(same, axis=1)
    before = (scores[:, None] > scores) | ((scores[:, None] == scores) & (row[:, None] > row))
    rank = 1 + jnp.sum(same & before, axis=1)  # in ascending order of the scores, from 1

    def share(below: Int[Array, " B"], n: Int[Array, ""], k: int) -> Float[Array, " B"]:
        """C(below, k - 1) / C(n, k): the probability that the maximum of k out of n is one with so many below it."""
        found = jnp.full(below.shape, 1.0) if k else jnp.zeros(below.shape)
        for m in range(k - 1):
            found *= (below - m) / jnp.maximum(n - 1 - m, 1)
        return found * k / jnp.maximum(n, 1)

    def advantage(i: Int[Array, ""]) -> Float[Array, ""]:
        above = jnp.where(same[i], scores - scores[i], 0.0)  # exactly 0 if all scores are equal
        largest = jnp.where(same[i], share(rank - 1, size[i], k), 0.0)
        with_i = jnp.where(same[i] & (rank > rank[i]), share(rank - 2, size[i] - 1, k - 1), 0.0)
        mean = jnp.sum(largest * above)
        unit = masked.power_of_two(jnp.max(jnp.abs(above)))
        deviation = unit * jnp.sqrt(jnp.sum(largest * jnp.square((above - mean) / unit)))
        return (jnp.sum(with_i * above) - mean) / (deviation + DEVIATION_FLOOR)

    return jnp.where(size > k, jax.vmap(advantage)(row), 0.0)


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


def group_metrics(
    scores: Float[Array, " B"], group: Int[Array, " B"], components: Float[Array, "B K"] | None = None
) -> Metrics:
    """Number of groups, of those whose scores are all equal, and of those with one response. Rows whose score is nan
    are no groups. With the `components` of the reward, the scores of a group are equal if those of every component are.
    """
    equal_scores, same = zero_variance(scores, group), _same(group)
    if components is not None:
        chex.assert_rank(components, 2)
        equal = jax.vmap(lambda one: zero_variance(*_known(one, group)), in_axes=1, out_axes=1)(components)
        groupwise = jnp.all(equal, axis=1)
        equal_scores = ~jnp.any(same & ~groupwise, axis=1)
    first = (jnp.argmax(same, axis=1) == jnp.arange(len(group))) & ~jnp.isnan(scores)

    def number(rows: Bool[Array, " B"]) -> Float[Array, ""]:
        return jnp.sum(first & rows).astype(jnp.float32)

    return {
        "groups/count": number(first),
        "groups/flat": number(equal_scores),
        "groups/single": number(jnp.sum(same, axis=1) == 1),
    }


def _known(scores: Float[Array, " B"], group: Int[Array, " B"]) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """Scores and groups, in which a row whose score is nan has a score of 0 and a group of its own."""
    unknown = jnp.isnan(scores)
    return jnp.where(unknown, 0.0, scores), jnp.where(unknown, -1 - jnp.arange(len(scores)), group)


def _same(group: Int[Array, " B"]) -> Bool[Array, "B B"]:
    return group[:, None] == group


def _differences(scores: Float[Array, " B"], group: Int[Array, " B"]) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """(sum over the group of score - the other's score, size of the group): exactly 0 if all scores are equal."""
    chex.assert_equal_shape([scores, group])
    same = _same(group)
    return jnp.sum(jnp.where(same, scores[:, None] - scores, 0.0), axis=1), jnp.sum(same, axis=1)

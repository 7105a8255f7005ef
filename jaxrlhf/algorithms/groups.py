"""Advantages without a value model: a response is compared with the others of its group, those to the same prompt.

A group is named by an integer per row, as `Rollout.index` does, rather than by its place among `samples` consecutive
rows. Thus groups may differ in size (dynamic sampling, the end of a data set), rows may come in any order and lie on
any device, and a prompt that is twice in a batch is one larger group. Every function is for the whole batch, never for
a micro-batch or one device's share.

Scores enter by their differences to those of the group, so a group without variance has advantages of exactly 0. That
is also what a group of one gets: it has nothing to be compared with. `flat` tells both, `group_metrics` counts them.
Advantages [B] are those of every token of their response.
"""

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.algorithms.advantages import reward_to_go, whiten
from jaxrlhf.algorithms.masked import Scalar

DEVIATION_FLOOR = 1e-4  # added to the deviation of a group's scores, as TRL does


def grpo(scores: Float[Array, " B"], group: Int[Array, " B"], scale: bool) -> Float[Array, " B"]:
    """(score - mean) / (deviation + 1e-4), both of the group (https://arxiv.org/abs/2402.03300, 4.1.2).

    Without `scale`, score - mean: Dr. GRPO, by which easy and hard prompts do not weigh more than others
    (https://arxiv.org/abs/2503.20783, 3). The variance is the unbiased one (divided by n - 1), and 1e-4 is in no
    paper: both are TRL's choice, so that runs compare.
    """
    ahead, size = _ahead(scores, group)
    centred = ahead / size
    if not scale:
        return centred
    squares = jnp.sum(jnp.where(_same(group), jnp.square(centred), 0.0), axis=1)
    return centred / (jnp.sqrt(squares / jnp.maximum(size - 1, 1)) + DEVIATION_FLOOR)


def rloo(scores: Float[Array, " B"], group: Int[Array, " B"]) -> Float[Array, " B"]:
    """score - mean of the others of the group: REINFORCE leave-one-out (https://arxiv.org/abs/2402.14740)."""
    ahead, size = _ahead(scores, group)
    return ahead / jnp.maximum(size - 1, 1)


def gpg(scores: Float[Array, " B"], group: Int[Array, " B"]) -> Float[Array, " B"]:
    """alpha (score - mean of the group), alpha = B / (B - rows of flat groups) (https://arxiv.org/abs/2504.02546).

    alpha makes up for rows without a gradient in a loss that is divided by all of them. F_norm of the paper is 1.
    """
    ahead, size = _ahead(scores, group)
    return ahead / size * (len(scores) / jnp.maximum(jnp.sum(~flat(scores, group)), 1))


def remax(scores: Float[Array, " B"], greedy_scores: Float[Array, " B"]) -> Float[Array, " B"]:
    """score - score of the greedy response to the same prompt (https://arxiv.org/abs/2310.10505, algorithm 1)."""
    return scores - greedy_scores


def reinforce_pp(rewards: Float[Array, "B R"], mask: Bool[Array, "B R"], gamma: Scalar) -> Float[Array, "B R"]:
    """REINFORCE++: rewards to come, whitened over all tokens of the batch (https://arxiv.org/abs/2501.03262).

    `rewards` are those of `ppo.token_rewards`: score - kl_coef (the KL from here on), for gamma = 1.
    """
    return whiten(reward_to_go(rewards, mask, jnp.zeros_like(rewards[:, 0]), gamma), mask, shift_mean=True)


def reinforce_pp_baseline(
    scores: Float[Array, " B"], group: Int[Array, " B"], mask: Bool[Array, "B R"]
) -> Float[Array, "B R"]:
    """REINFORCE++ with baseline: score - mean of the group, whitened over all tokens (its KL is in the loss).

    Source: https://arxiv.org/abs/2501.03262. Flat groups stay near 0, but not at it: the mean over tokens, which is
    taken away, weighs responses by their length.
    """
    return whiten(jnp.broadcast_to(grpo(scores, group, scale=False)[:, None], mask.shape), mask, shift_mean=True)


def flat(scores: Float[Array, " B"], group: Int[Array, " B"]) -> Bool[Array, " B"]:
    """True where all scores of the row's group are equal, and thus for a group of one.

    It is what dynamic sampling replaces (https://arxiv.org/abs/2503.14476, 3.2). False where a score is not a number.
    """
    return ~jnp.any(_same(group) & (scores[:, None] != scores), axis=1)


def group_metrics(scores: Float[Array, " B"], group: Int[Array, " B"]) -> dict[str, Float[Array, ""]]:
    """How many groups there are, how many of them are flat, and how many of those are of one response."""
    same = _same(group)
    first = jnp.argmax(same, axis=1) == jnp.arange(len(group))

    def number(of: Bool[Array, " B"]) -> Float[Array, ""]:
        return jnp.sum(first & of).astype(jnp.float32)

    return {
        "groups/count": number(first),
        "groups/flat": number(flat(scores, group)),
        "groups/single": number(jnp.sum(same, axis=1) == 1),
    }


def _same(group: Int[Array, " B"]) -> Bool[Array, "B B"]:
    return group[:, None] == group


def _ahead(scores: Float[Array, " B"], group: Int[Array, " B"]) -> tuple[Float[Array, " B"], Int[Array, " B"]]:
    """(sum over the group of score - the other's score, size of the group): nothing cancels where all are equal."""
    same = _same(group)
    return jnp.sum(jnp.where(same, scores[:, None] - scores, 0.0), axis=1), jnp.sum(same, axis=1)

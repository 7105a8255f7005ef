"""The vocabulary: what the parts of jaxrlhf hand to each other.

Axis letters, used in every shape comment, jaxtyping annotation and einsum string (lower case there):

    B sequences   P prompt   R response   T = P + R   D hidden   N query heads   K kv heads   H head dim
    F mlp         V vocab    L layers     S cache slots   G group      M pairs of a packed row

Every class is a frozen dataclass and a pytree of arrays. Shapes are trailing comments and not annotations that run:
jax builds these classes with tracers, shape structs and sharding objects in place of arrays.
"""

from dataclasses import dataclass
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Params = dict[str, Any]
"""A plain nested dict of arrays."""


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Sequences to learn from or to score, right-padded. A packed row has several, none of which sees another."""

    tokens: Array  # int32 [B, T]
    mask: Array  # bool [B, T]   real tokens
    loss_mask: Array  # bool [B, T]   tokens to predict; never true where mask is false, nor for a first token
    segments: Array | None = None  # int32 [B, T]   of packed rows: which sequence a token belongs to
    positions: Array | None = None  # int32 [B, T]   of packed rows: from 0 in each sequence


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """A preference batch; one forward runs over the 2B rows."""

    chosen: Batch  # [B, T]
    rejected: Batch  # [B, T]

    @property
    def valid(self) -> Array:
        """bool [B]: every row is a pair."""
        return jnp.ones(self.chosen.tokens.shape[0], bool)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedPairs:
    """A preference batch with up to M pairs in a row."""

    texts: Batch  # [B, T]   packed: 2M sequences and fewer
    chosen: Array  # int32 [B, M]   column of the last token
    rejected: Array  # int32 [B, M]
    valid: Array  # bool [B, M]   there is such a pair

    @property
    def real(self) -> Array:
        """bool [B, M, 2], as in `Responses`."""
        return jnp.repeat(self.valid[..., None], 2, axis=-1)

    @property
    def target(self) -> Array:
        """f32 [B, M]: nothing is said of a packed pair beside which text is better."""
        return jnp.zeros(self.valid.shape, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Responses:
    """What a reward model learns from: right-padded responses to a prompt, best first, and what is said of them.

    Two of a pair, up to G of a ranking, one that has a label or a score.
    """

    tokens: Array  # int32 [B, G, T]
    mask: Array  # bool [B, G, T]   real tokens; where there is no response, the first alone
    real: Array  # bool [B, G]   there is such a response
    target: Array  # f32 [B]   margin of a pair, or 1 for a tie; 1 for a good response; its score; of a ranking 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """Prompts to continue, left-padded, so that every prompt ends in column P - 1."""

    tokens: Array  # int32 [B, P]
    mask: Array  # bool [B, P]
    index: Array  # int32 [B]   row number in the data set: for RNG and logs, whatever the batch
    sample: Array  # int32 [B]   which of a prompt's completions this is


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of the tokens seen so far, per layer; what each slot holds is said once for all layers."""

    k: tuple[Array, ...]  # per layer [B, K, S, H]: twice as fast to read on a CPU as [B, S, K, H]
    v: tuple[Array, ...]  # per layer [B, K, S, H]
    positions: Array  # int32 [B, S]
    valid: Array  # bool [B, S]   a real token was written here


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """B rows in the middle of being answered.

    They share a clock: at each tick all rows write their keys and values to one column of the cache, which therefore is
    updated in place; the columns after the prompt's are a ring. Which of its own tokens that is, a row's count says.
    """

    clock: Array  # int32 []
    count: Array  # int32 [B]   tokens drawn
    ended: Array  # bool [B]   drew a stop token
    prompt_length: Array  # int32 [B]
    keys: Array  # key [B]
    tokens: Array  # int32 [B, R]
    logprobs: Array  # f32 [B, R]
    support: Array | None  # uint8 [B, R, ceil(V / 8)]
    cache: KVCache  # [B, K, P + R, H]

    @property
    def busy(self) -> Array:
        """bool [B]: rows that go on."""
        return ~self.ended & (self.count < self.tokens.shape[1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """Prompts and what the policy answered: tokens[:, :P] is the prompt, tokens[:, P:] the response."""

    tokens: Array  # int32 [B, T]
    mask: Array  # bool [B, T]   real tokens; a stop token counts, what follows it does not
    response_mask: Array  # bool [B, R]
    logprobs: Array  # f32 [B, R]   as sampled, 0 outside response_mask
    finished: Array  # bool [B]   ended with a stop token or string, not by running out of room
    index: Array  # int32 [B]
    sample: Array  # int32 [B]
    support: Array | None = None  # uint8 [B, R, ceil(V / 8)]   with sampling.renormalise_logprobs, tokens that could
    # be drawn as bits (jnp.packbits along V), no bit set outside response_mask; None: the whole vocabulary


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """A rollout with everything an update needs. All [B, R] arrays are 0 outside the response mask."""

    rollout: Rollout
    scores: Array  # f32 [B]
    old_logprobs: Array  # f32 [B, R]
    ref_logprobs: Array  # f32 [B, R]
    values: Array  # f32 [B, R]   before the token of that column was chosen
    rewards: Array  # f32 [B, R]
    advantages: Array  # f32 [B, R]
    returns: Array  # f32 [B, R]
    bootstrap: Array  # f32 [B]   value after the last token of a truncated response, 0 where the end is terminal
    token_scores: Array | None = None  # f32 [B, R]   rewards of single tokens beside the scores, if there are any
    features: Array | None = None  # f32 [B, R + 1, D]   what a frozen critic trunk says, before and after each token
    weights: Array | None = None  # f32 [B, R]   of tokens in the policy loss, for a sampler that is not pi_old


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupExperience:
    """A rollout whose responses have been compared within groups, with what an update needs. For online DPO the leading
    axes of all are [n, 2]: chosen and rejected of n pairs. 0 outside the response mask."""

    rollout: Rollout
    advantages: Array  # f32 [B, R]; of pairs [n, 2], 1 where the two differ in score, 0 for a tie
    old_logprobs: Array | None  # f32 [B, R]   None: those of the update's one step
    ref_logprobs: Array | None  # f32 [B, R]   None: there is no reference


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """What an update changes, and so what a checkpoint holds. What does not train is `frozen` and travels beside it."""

    step: Array  # int32 []   optimizer steps (SFT, reward) or updates (PPO) done
    params: dict[str, Params]  # by role: "policy", "critic", "reward"; only what trains
    opt_state: dict[str, Any]  # by role
    kl_coef: Array  # f32 []
    score_stats: Any = None  # PPO: algorithms.scores.ScoreStats
    reference: Params | None = None  # PPO: the reference, where it moves
    replay: Experience | None = None  # PPO: the last n experiences [n, B, ...]; update number u is in place u % n

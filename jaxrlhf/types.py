"""The vocabulary: the data types that the parts of jaxrlhf pass to each other.

Axis letters of shape comments, jaxtyping annotations and (in lower case) einsum strings:

    B sequences   P prompt   R response   T = P + R   D hidden   N query heads   K kv heads   H head dim
    F mlp         V vocab    L layers     S cache slots   G group      M pairs of a packed row

Every class is a frozen dataclass and a pytree of arrays. Shapes are comments, not checked annotations: jax builds these
classes with tracers, ShapeDtypeStructs and shardings in place of arrays.
"""

import functools
import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import jax
import jax.numpy as jnp
from jax import Array

Params = dict[str, Any]
"""A plain nested dict of arrays."""


def leaf_at(tree: Params, path: tuple[str, ...]) -> Any:
    """The leaf or branch of a nested dict at `path`."""
    return functools.reduce(operator.getitem, path, tree)


def set_leaf(tree: Params, path: tuple[str, ...], value: Any) -> None:
    """Put `value` into a nested dict at `path`."""
    for key in path[:-1]:
        tree = tree.setdefault(key, {})
    tree[path[-1]] = value


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Batch:
    """Sequences to train on or to score, right-padded. Those of a packed row do not see each other."""

    tokens: Array  # int32 [B, T]
    mask: Array  # bool [B, T]   real tokens
    loss_mask: Array  # bool [B, T]   tokens in the loss; false for padding and for the first token of a sequence
    segments: Array | None = None  # int32 [B, T]   of packed rows: the sequence of each token
    positions: Array | None = None  # int32 [B, T]   of packed rows: count from 0 in each sequence


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Pairs:
    """A batch of preference pairs. One forward pass runs over the 2B rows."""

    chosen: Batch  # [B, T]
    rejected: Batch  # [B, T]

    @property
    def valid(self) -> Array:
        """bool [B]: real pairs. False for the empty rows that fill up a micro-batch."""
        return jnp.any(self.chosen.mask, axis=1)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class PackedPairs:
    """A batch of preference pairs, with up to M pairs in a packed row."""

    texts: Batch  # [B, T]   packed: at most 2M sequences a row
    chosen: Array  # int32 [B, M]   column of the last token
    rejected: Array  # int32 [B, M]
    valid: Array  # bool [B, M]   real pairs

    @property
    def real(self) -> Array:
        """bool [B, M, 2], as in `Responses`."""
        return jnp.repeat(self.valid[..., None], 2, axis=-1)

    @property
    def target(self) -> Array:
        """f32 [B, M]: 0, as packed pairs have neither margins nor ties."""
        return jnp.zeros(self.valid.shape, jnp.float32)


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Responses:
    """Training data of a reward model: right-padded responses to each prompt, best first, and their target.

    G is 2 for pairs, the longest ranking for rankings, and 1 for labels and scores.
    """

    tokens: Array  # int32 [B, G, T]
    mask: Array  # bool [B, G, T]   real tokens; only the first token of a missing response
    real: Array  # bool [B, G]   responses that are not missing
    target: Array  # f32 [B]   pair: margin, or 1 for a tie; label: 1 if good; score: the score; ranking: 0


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Prompts:
    """Prompts to continue, left-padded, so that every prompt ends in column P - 1."""

    tokens: Array  # int32 [B, P]
    mask: Array  # bool [B, P]
    index: Array  # int32 [B]   row number in the data set, for random keys and logs
    sample: Array  # int32 [B]   number of the response among those to the same prompt
    given: Array | None = None  # int32 [B]   last tokens of the prompt that are the beginning of its response, of which
    # only the rest is to be generated; None: none


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class KVCache:
    """Keys and values of all layers with attention, and the position and validity of each slot, shared by all of them.

    Keys and values are one array per layer, or stacked (`ModelConfig.scans_layers`). A layer with a delta net
    (models/delta.py) has a state of fixed size instead, which holds all the tokens read so far and cannot forget one.
    """

    k: tuple[Array, ...] | Array  # per layer [B, K, S, H], or [B, K, H, S] (`ModelConfig.key_columns`): twice as
    # fast to read on a CPU as [B, S, K, H]
    v: tuple[Array, ...] | Array  # stacked: [L, S, K, B, H], in which a TPU writes a slot of all rows in one place
    positions: Array  # int32 [B, S]
    valid: Array  # bool [B, S]   slots that hold a real token
    states: tuple[tuple[Array, Array], ...] = ()  # f32 per layer [B, W, C], [B, N, key, value]   of delta nets


def map_layers(function: Callable[..., Any], *layers: Any) -> Any:
    """Apply a function of the keys or values [B, K, S, H] of one layer to those of all layers of a cache."""
    if isinstance(layers[0], tuple):
        return jax.tree.map(function, *layers)
    return jax.vmap(lambda *each: turned(function(*map(turned, each))))(*layers)


def turned(layer: Array) -> Array:
    """[S, K, B, H] of a stacked cache as [B, K, S, H], and back."""
    return jnp.transpose(layer, (2, 1, 0, 3))


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Slots:
    """B slots of the generation engine, each with a response in progress.

    All rows share a clock: at each tick they write their keys and values to the same cache column, so that the cache is
    updated in place. The columns after the prompt's are a ring buffer. `count` is a row's own token number.
    """

    clock: Array  # int32 []
    count: Array  # int32 [B]   tokens sampled
    ended: Array  # bool [B]   sampled a stop token
    prompt_length: Array  # int32 [B]
    keys: Array  # key [B]
    tokens: Array  # int32 [B, R]
    logprobs: Array  # f32 [B, R]
    support: Array | None  # uint8 [B, R, ceil(V / 8)]
    cache: KVCache  # [B, K, P + R, H]

    @property
    def busy(self) -> Array:
        """bool [B]: rows that are not done."""
        return ~self.ended & (self.count < self.tokens.shape[1])


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Rollout:
    """Prompts and sampled responses: tokens[:, :P] is the prompt, tokens[:, P:] the response.

    The real tokens of a response are in its first columns. Those that the policy did not sample, of an environment,
    are in `mask` and not in `response_mask`; the last one was sampled.
    """

    tokens: Array  # int32 [B, T]
    mask: Array  # bool [B, T]   real tokens, the stop token included
    response_mask: Array  # bool [B, R]   sampled tokens; all false: a response without a score, which has no part in
    # the update
    logprobs: Array  # f32 [B, R]   as sampled, 0 outside response_mask
    finished: Array  # bool [B]   ended with a stop token or string; false: truncated
    index: Array  # int32 [B]
    sample: Array  # int32 [B]
    support: Array | None = None  # uint8 [B, R, ceil(V / 8)]   with sampling.renormalise_logprobs: tokens that could be
    # sampled, as bits (jnp.packbits along V), all 0 outside response_mask; None: the whole vocabulary
    turn_rewards: Array | None = (
        None  # f32 [B, R]   from an environment, at the last token of each turn; None once they
    )
    # are part of the scores
    start: Array | None = None  # int32 [B]   of rows cut to a micro-batch: column of the first response token; None: P


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class Experience:
    """A rollout with everything a PPO update needs. All [B, R] arrays are 0 outside the response mask."""

    rollout: Rollout
    scores: Array  # f32 [B]
    old_logprobs: Array  # f32 [B, R]
    ref_logprobs: Array  # f32 [B, R]
    values: Array  # f32 [B, R]   of the state before the token
    rewards: Array  # f32 [B, R]
    advantages: Array  # f32 [B, R]
    returns: Array  # f32 [B, R]
    bootstrap: Array  # f32 [B]   value after the last token of a truncated response; 0 if finished
    token_scores: Array | None = None  # f32 [B, R]   scores of single tokens, in addition to `scores`
    features: Array | None = None  # f32 [B, R + 1, D]   hidden states of a frozen critic trunk
    ref_hidden: Array | None = None  # [B, R, D]   the reference's hidden states, with kl_estimator: exact
    weights: Array | None = None  # f32 [B, R]   token weights that correct for a sampler that is not pi_old
    # the discounting with which the advantages were computed, for a reader; programs have it from their settings
    gamma: float | None = field(default=None, metadata={"static": True})
    lam: float | None = field(default=None, metadata={"static": True})
    lam_alpha: float | None = field(default=None, metadata={"static": True})  # of a lam that depends on the length


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class GroupExperience:
    """A rollout with advantages from groups and everything a GRPO update needs. 0 outside the response mask.

    For online DPO the leading axes of all arrays are [n, 2]: the chosen and the rejected response of n pairs.
    """

    rollout: Rollout
    advantages: Array  # f32 [B, R]   of pairs f32 [n, 2]: 1 if the two scores differ, 0 for a tie
    old_logprobs: Array | None  # f32 [B, R]   None: the policy's own, for a single optimizer step
    ref_logprobs: Array | None  # f32 [B, R]   None: no reference
    entropy: Array | None = None  # f32 [B, R]   of pi_old, if tokens are selected by it
    ref_hidden: Array | None = None  # [B, R, D]   the reference's hidden states, with kl_estimator: exact


@jax.tree_util.register_dataclass
@dataclass(frozen=True)
class TrainState:
    """Everything an update changes and a checkpoint stores. Frozen parameters are passed separately."""

    step: Array  # int32 []   number of steps done: optimizer steps (supervised) or updates (PPO, GRPO)
    params: dict[str, Params]  # by role ("policy", "critic", "reward"): trainable parameters only
    opt_state: dict[str, Any]  # by role
    kl_coef: Array  # f32 []
    score_stats: Any = None  # PPO, GRPO: algorithms.scores.ScoreStats; bco_pair: algorithms.dpo.RunningMean
    reference: Params | None = None  # parameters of a reference that moves
    entropy: Any = None  # GRPO: algorithms.entropy.EntropyControl
    replay: Experience | None = None  # PPO: the last n experiences [n, B, ...]; that of update u is at u % n

"""Log-probabilities and scores of given tokens. The one function for the old, the new and the reference policy.

At V = 150 000, logits of a whole batch dwarf everything else. They are made for a piece of the vocabulary at a time, in
the forward pass (with a running softmax) and again in the backward pass, which so writes each row of the head's
gradient once. Nothing of shape [B, R, V] ever exists.
"""

import math
from dataclasses import dataclass
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from jaxrlhf import runtime
from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Scalar
from jaxrlhf.models import ModelConfig, forward, lm_weight, scalar_head
from jaxrlhf.models.attention import MASKED
from jaxrlhf.models.product import product
from jaxrlhf.types import Params, Rollout

LEAST_PIECE = 1024  # tokens of a piece, however many positions there are: narrower products are slow
SHARES = 8  # a piece takes as much from each eighth of the vocabulary: from every device of a mesh that shards it


def token_logprobs(
    params: Params,
    model: ModelConfig,
    hidden: Float[Array, "B R D"],
    targets: Int[Array, "B R"],
    temperature: Scalar,
    support: UInt8[Array, "B R _"] | None = None,
    entropy_gradient: bool = False,
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """log softmax(logits / temperature)[target], and the entropy of that distribution, in nats.

    `hidden[:, t]` is what predicts `targets[:, t]`. The softmax is over the whole vocabulary, whatever sampling
    filtered, or over the tokens in `support`, bits as in `Rollout.support`; where that is empty (padding) results are
    finite and mean nothing. Products follow the model's rule (`product`), as the sampler's logits do; sums and
    softmax are float32. Gradients go to `params` (where rows of tokens train beside adapters, to those in place of the
    table's) and `hidden` through the log-probabilities, and through the entropy
    only with `entropy_gradient`: else it is a measurement, behind a stop_gradient, and costs the backward pass nothing.
    """
    weight, rows = lm_weight(params, model)
    layout = "tvd" if model.tie_embeddings else "dtv"
    tokens = model.adapters.tokens if model.adapters and rows is not None else ()
    pieces = _pieces(layout, model.vocab_size, targets.size, model.dtype, entropy_gradient, tokens)
    return _token_logprobs(pieces, weight, rows, hidden, targets, support, jnp.asarray(temperature, jnp.float32))


def logits_bytes(model: ModelConfig, positions: int) -> int:
    """Bytes of the logits that `token_logprobs` holds at once for so many positions."""
    pieces = _pieces("tvd", model.vocab_size, positions, model.dtype, False, ())
    return 4 * positions * pieces.shares * pieces.width


@dataclass(frozen=True)
class _Pieces:
    """The vocabulary as `shares` of `size` tokens. Piece i has those from `start(i)` on, `width` of each share.

    The last piece begins early enough to be as wide as the others, and all begin at a whole byte of the support's
    bits; so neighbours overlap, and a token counts in the first piece that has it.
    """

    layout: str  # of the weight, with the vocabulary's axis in two: "tvd" or "dtv"
    shares: int
    size: int
    step: int
    width: int
    dtype: str
    entropy_gradient: bool
    own: tuple[int, ...]  # tokens with rows of their own, in place of those of the weight

    @property
    def count(self) -> int:
        return 1 + math.ceil((self.size - self.width) / self.step)

    @property
    def axis(self) -> int:
        """The axis of the weight along which pieces are cut."""
        return self.layout.index("v")

    def start(self, piece: Array) -> Array:
        return jnp.minimum(piece * self.step, self.size - self.width)

    def split(self, weight: Array) -> Array:
        """[V, D] -> [t, v, D], or [D, V] -> [D, t, v]."""
        at = self.axis - 1
        return weight.reshape(*weight.shape[:at], self.shares, self.size, *weight.shape[at + 1 :])

    def cut(self, split: Array, piece: Array) -> Array:
        return lax.dynamic_slice_in_dim(split, self.start(piece), self.width, self.axis)

    def weight(self, split: Array, rows: Array | None, piece: Array) -> Array:
        """The piece of the weight, with the rows of tokens that have their own."""
        cut = self.cut(split, piece)
        if rows is None:
            return cut
        at = (slice(None),) * (self.axis - 1) + self.places(piece)
        return cut.astype(self.dtype).at[at].set(rows.astype(self.dtype), mode="drop")

    def places(self, piece: Array) -> tuple[Array, Array]:
        """Where tokens with rows of their own are in the piece: (share, column) [n]; the column after the last, if they
        are not in it."""
        ids = jnp.array(self.own)
        column = ids % self.size - self.start(piece)
        return ids // self.size, jnp.where((column >= 0) & (column < self.width), column, self.width)

    def tokens(self, piece: Array) -> tuple[Array, Array]:
        """(ids [t, w] of the piece's tokens, whether no earlier piece had them [w])."""
        column = self.start(piece) + jnp.arange(self.width)
        seen = jnp.where(piece > 0, (piece - 1) * self.step + self.width, 0)
        return self.size * jnp.arange(self.shares)[:, None] + column, column >= seen

    def logits(self, cut: Array, hidden: Array, support: Array | None, temperature: ArrayLike, piece: Array) -> Array:
        """[B, R, t, w]. MASKED where an earlier piece has the token or the support has not.

        MASKED is finite: padding, whose support is empty, must stay so (its cotangent is 0, and 0 * nan is nan).
        """
        inside = self.tokens(piece)[1]
        if support is not None:
            share = support.reshape(*support.shape[:2], self.shares, -1)
            bits = lax.dynamic_slice_in_dim(share, self.start(piece) // 8, math.ceil(self.width / 8), axis=3)
            inside &= jnp.unpackbits(bits, axis=-1, count=self.width).astype(bool)
        return jnp.where(inside, self.product(f"brd,{self.layout}->brtv", hidden, cut) / temperature, MASKED)

    def product(self, subscripts: str, a: Array, b: Array) -> Array:
        return product(subscripts, a, b, self.dtype)


def _pieces(
    layout: str, vocabulary: int, positions: int, dtype: str, entropy_gradient: bool, own: tuple[int, ...]
) -> _Pieces:
    shares = SHARES if vocabulary % (8 * SHARES) == 0 else 1
    size = vocabulary // shares
    wanted = max(8, runtime.logits_alive(jax.default_backend()) // positions // shares, LEAST_PIECE // shares)
    step = width = size
    if wanted < size:
        step = 8 * math.ceil(size / math.ceil(size / wanted) / 8)
        width = step + size % 8
    return _Pieces(layout, shares, size, step, width, dtype, entropy_gradient, own)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(
    pieces: _Pieces,
    weight: Array,
    rows: Array | None,
    hidden: Array,
    targets: Array,
    support: Array | None,
    temperature: Array,
) -> tuple[Array, Array]:
    return _forward(pieces, weight, rows, hidden, targets, support, temperature)[0]


def _forward(pieces, weight, rows, hidden, targets, support, temperature):
    split, hidden = pieces.split(weight), hidden.astype(pieces.dtype)

    def add(sums, piece):
        """`sums` are relative to the largest logit so far: of exp(x), and of x exp(x)."""
        largest, mass, moment, target = sums
        logits = pieces.logits(pieces.weight(split, rows, piece), hidden, support, temperature, piece)
        ids, _ = pieces.tokens(piece)
        largest, before = jnp.maximum(largest, jnp.max(logits, axis=(2, 3))), largest
        fall = before - largest
        moment = jnp.exp(fall) * (moment + fall * mass)
        mass = jnp.exp(fall) * mass
        relative = logits - largest[..., None, None]
        share = jnp.exp(relative)
        mass += jnp.sum(share, axis=(2, 3))
        moment += jnp.sum(share * relative, axis=(2, 3))
        chosen = (targets[..., None, None] == ids) & (logits > MASKED)
        return (largest, mass, moment, target + jnp.sum(jnp.where(chosen, logits, 0), axis=(2, 3))), None

    nothing = jnp.zeros(targets.shape, jnp.float32)
    sums, _ = lax.scan(add, (nothing + MASKED, nothing, nothing, nothing), jnp.arange(pieces.count))
    largest, mass, moment, target = sums
    total = largest + jnp.log(mass)
    entropy = jnp.log(mass) - moment / mass
    # who does not look at the entropy needs it too: without it the compiler makes another program, which rounds
    # differently, and a policy must score as its copy does to the bit
    logprobs = jnp.where(jnp.isnan(entropy), jnp.nan, target - total)
    return (logprobs, entropy), (weight, rows, hidden, targets, support, temperature, total, entropy)


def _backward(pieces, kept, cotangents):
    weight, rows, hidden, targets, support, temperature, total, entropy = kept
    split = pieces.split(weight)
    scale, entropy_scale = ((cotangent / temperature)[..., None, None] for cotangent in cotangents)

    def add(grads, piece):
        grad_split, grad_hidden, grad_own = grads
        cut = pieces.weight(split, rows, piece)
        logits = pieces.logits(cut, hidden, support, temperature, piece)
        logprobs = logits - total[..., None, None]
        probabilities = jnp.exp(logprobs)  # 0 for what an earlier piece had
        ids, new = pieces.tokens(piece)
        chosen = (targets[..., None, None] == ids) & new
        grad_logits = (chosen - probabilities) * scale
        if pieces.entropy_gradient:  # of -sum p log p by a logit: -p (log p + entropy)
            grad_logits -= probabilities * (logprobs + entropy[..., None, None]) * entropy_scale
        grad_logits = grad_logits.astype(pieces.dtype)
        grad_hidden += pieces.product(f"brtv,{pieces.layout}->brd", grad_logits, cut)
        if rows is not None:
            own = (slice(None), slice(None), *pieces.places(piece))
            grad_own += grad_logits.at[own].get(mode="fill", fill_value=0)
            grad_logits = grad_logits.at[own].set(0, mode="drop")
        grad_cut = pieces.cut(grad_split, piece) + pieces.product(f"brtv,brd->{pieces.layout}", grad_logits, hidden)
        grad_split = lax.dynamic_update_slice_in_dim(grad_split, grad_cut, pieces.start(piece), pieces.axis)
        return (grad_split, grad_hidden, grad_own), None

    shapes = split.shape, hidden.shape, (*targets.shape, len(pieces.own))
    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    (grad_split, grad_hidden, grad_own), _ = lax.scan(add, zeros, jnp.arange(pieces.count))
    grad_rows = None
    if rows is not None:
        grad_rows = pieces.product(f"brv,brd->{pieces.layout.replace('t', '')}", grad_own, hidden).astype(rows.dtype)
    return grad_split.reshape(weight.shape).astype(weight.dtype), grad_rows, grad_hidden, None, None, None


_token_logprobs.defvjp(_forward, _backward)


def response_states(params: Params, model: ModelConfig, rollout: Rollout) -> Float[Array, "B _ D"]:
    """The hidden states [B, R + 1, D] before each response token, which predict it, and after the last column."""
    return forward(params, model, rollout.tokens, rollout.mask)[:, -rollout.response_mask.shape[1] - 1 :]


def last_hidden(
    params: Params,
    model: ModelConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    keys: Key[Array, " B"] | None = None,
) -> Float[Array, "B D"]:
    """The hidden state of each sequence's last real token, wherever the padding is; of column 0 if there is none.
    `keys` are for dropout."""
    column = jnp.argmax(masked.last(mask), axis=1)
    return jnp.take_along_axis(forward(params, model, tokens, mask, keys=keys), column[:, None, None], axis=1)[:, 0]


def last_token_scores(
    params: Params, model: ModelConfig, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """The scalar head's score of each sequence, read at its last real token, without dropout.

    A row without a real token gets some finite score that means nothing.
    """
    return scalar_head(params, model, last_hidden(params, model, tokens, mask))

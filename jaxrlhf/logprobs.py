"""Log-probabilities, entropies and scalar-head scores of given tokens, for the old, the new and the reference policy.

With a vocabulary of 150,000 the logits of a whole batch would be by far the largest array. They are computed for one
chunk of the vocabulary at a time: in the forward pass (with a running softmax) and again in the backward pass, where
each row of the head's gradient is written once. No array of shape [B, R, V] ever exists.
"""

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int, Key, UInt8

from jaxrlhf import runtime
from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Scalar
from jaxrlhf.models import (
    ModelConfig,
    finish_logits,
    forward,
    forward_with_router,
    lm_weight,
    place,
    row_axes,
    scalar_head,
)
from jaxrlhf.models.attention import MASKED
from jaxrlhf.models.product import product
from jaxrlhf.types import Params, Rollout

MIN_CHUNK = 1024  # tokens in a chunk at least: narrower products are slow
SHARES = 8  # a chunk has columns of each eighth of the vocabulary, so that every device of a sharded one takes part
LOGITS = ("rows", None, "tensor", None)  # placement of a chunk [B, R, t, w]


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

    `hidden[:, t]` predicts `targets[:, t]`. The softmax is over the whole vocabulary, or over the tokens in `support`
    (bits as in `Rollout.support`); where the support is empty (padding) results are finite but meaningless. Logits use
    the model's `product`, as in sampling; sums and softmax are float32. Gradients flow to `params` (for tokens trained
    beside adapters, to their own rows) and `hidden` through the log-probabilities, and through the entropy only with
    `entropy_gradient`: otherwise the entropy is a metric without a gradient, and adds nothing to the backward pass.
    """
    weight, rows = lm_weight(params, model)
    layout = "tvd" if model.tie_embeddings else "dtv"
    tokens = model.adapters.tokens if model.adapters and rows is not None else ()
    positions = targets.size // (
        math.prod(model.mesh.shape[axis] for axis in row_axes(model.mesh)) if model.mesh else 1
    )
    chunks = _chunks(layout, model, positions, entropy_gradient, tokens)
    return _token_logprobs(chunks, weight, rows, hidden, targets, support, jnp.asarray(temperature, jnp.float32))


def logits_bytes(model: ModelConfig, positions: int) -> int:
    """Peak size in bytes of the logits that `token_logprobs` holds on a device for this number of positions on it."""
    chunks = _chunks("tvd", model, positions, False, ())
    return 4 * positions * chunks.shares * chunks.width // _tensor(model)


@dataclass(frozen=True)
class _Chunks:
    """Division of the vocabulary, as `shares` of `size` tokens, into chunks of `width` columns of each share.

    Chunk i begins at column `start(i)`. All chunks are equally wide and begin at a whole byte of the support's bits, so
    neighbours may overlap: a token belongs to the first chunk that contains it.
    """

    layout: str  # axes of the weight, the vocabulary split into shares: "tvd" or "dtv"
    model: ModelConfig
    shares: int
    size: int
    step: int
    width: int
    entropy_gradient: bool
    row_tokens: tuple[int, ...]  # tokens with trained rows of their own, which replace those of the weight

    @property
    def count(self) -> int:
        return 1 + math.ceil((self.size - self.width) / self.step)

    @property
    def axis(self) -> int:
        """Axis of the split weight along which chunks are sliced."""
        return self.layout.index("v")

    def start(self, chunk: Array) -> Array:
        return jnp.minimum(chunk * self.step, self.size - self.width)

    @property
    def dtype(self) -> str:
        return self.model.dtype

    @property
    def missing(self) -> int:
        """Columns that the shares have beyond the vocabulary, at the end of the last ones."""
        return self.shares * self.size - self.model.vocab_size

    def split(self, weight: Array) -> Array:
        """[V, D] -> [t, v, D], or [D, V] -> [D, t, v], with zeros for missing columns."""
        axis = self.axis - 1
        padding = [(0, self.missing if i == axis else 0) for i in range(weight.ndim)]
        weight = jnp.pad(weight, padding) if self.missing else weight
        return self.place(weight.reshape(*weight.shape[:axis], self.shares, self.size, *weight.shape[axis + 1 :]))

    def joined(self, split: Array) -> Array:
        """Inverse of `split`."""
        axis = self.axis - 1
        whole = split.reshape(*split.shape[:axis], self.shares * self.size, *split.shape[axis + 2 :])
        if not self.missing:
            return whole
        # such a weight is stored split along D
        whole = place(whole, self.model, *({"v": None, "d": "both"}[axis] for axis in self.layout.replace("t", "")))
        return lax.slice_in_dim(whole, 0, self.model.vocab_size, axis=axis)

    def place(self, split: Array, d: Literal["fsdp"] | None = "fsdp") -> Array:
        """Split weight, or a slice of it, with its shares over `tensor` and D over `fsdp` or whole."""
        return place(split, self.model, *({"t": "tensor", "v": None, "d": d}[axis] for axis in self.layout))

    def slice(self, split: Array, chunk: Array) -> Array:
        return lax.dynamic_slice_in_dim(split, self.start(chunk), self.width, self.axis)

    def weight(self, split: Array, rows: Array | None, chunk: Array) -> Array:
        """Slice of the weight, as an operand, with the trained rows of tokens in place of its own."""
        weight = self.place(self.slice(split, chunk).astype(self.dtype), None)
        if rows is None:
            return weight
        index = (slice(None),) * (self.axis - 1) + self.row_indices(chunk)
        return weight.at[index].set(rows.astype(self.dtype), mode="drop")

    def row_indices(self, chunk: Array) -> tuple[Array, Array]:
        """(share, column) [n] of `row_tokens` in the chunk; a column of `width`, out of bounds, for tokens outside."""
        ids = jnp.array(self.row_tokens)
        column = ids % self.size - self.start(chunk)
        return ids // self.size, jnp.where((column >= 0) & (column < self.width), column, self.width)

    def tokens(self, chunk: Array) -> tuple[Array, Array]:
        """(token ids [t, w] of the chunk, True [w] for columns that no earlier chunk contains)."""
        column = self.start(chunk) + jnp.arange(self.width)
        seen = jnp.where(chunk > 0, (chunk - 1) * self.step + self.width, 0)
        return self.size * jnp.arange(self.shares)[:, None] + column, column >= seen

    def logits(
        self, weight: Array, hidden: Array, support: Array | None, temperature: ArrayLike, chunk: Array
    ) -> tuple[Array, Array]:
        """([B, R, t, w]; MASKED for tokens of an earlier chunk or outside the support, the products they come from).

        MASKED is finite so that padding, whose support is empty, stays finite (its cotangent is 0, and 0 * nan is nan).
        """
        ids, inside = self.tokens(chunk)
        if self.missing:
            inside &= ids < self.model.vocab_size
        if support is not None:
            if self.missing:
                support = jnp.pad(support, ((0, 0), (0, 0), (0, self.shares * self.size // 8 - support.shape[-1])))
            share = support.reshape(*support.shape[:2], self.shares, -1)
            bits = lax.dynamic_slice_in_dim(share, self.start(chunk) // 8, math.ceil(self.width / 8), axis=3)
            inside &= jnp.unpackbits(bits, axis=-1, count=self.width).astype(bool)
        products = place(self.product(f"brd,{self.layout}->brtv", hidden, weight), self.model, *LOGITS)
        return jnp.where(inside, finish_logits(products, self.model) * (1 / temperature), MASKED), products

    def grad_products(self, products: Array, grad_logits: Array) -> Array:
        """Gradient by the products of hidden states and weight, from that by the logits before the temperature."""
        _, backward = jax.vjp(lambda products: finish_logits(products, self.model), products)
        return backward(grad_logits)[0]

    def product(self, subscripts: str, a: Array, b: Array) -> Array:
        return product(subscripts, a, b, self.dtype)


def _chunks(
    layout: str, model: ModelConfig, positions: int, entropy_gradient: bool, row_tokens: tuple[int, ...]
) -> _Chunks:
    """Chunks for this number of positions on a device. A vocabulary that cannot be divided into shares of whole bytes
    is one share, or on a mesh with `tensor` filled up."""
    vocabulary, tensor = model.vocab_size, _tensor(model)
    shares = math.lcm(SHARES, tensor)
    if tensor == 1 and vocabulary % (8 * shares):
        shares = 1
    size = vocabulary if shares == 1 else 8 * math.ceil(vocabulary / (8 * shares))
    target = max(8, runtime.logits_alive(model.platform) * tensor // positions // shares, MIN_CHUNK // shares)
    step = width = size
    if target < size:
        step = 8 * math.ceil(size / math.ceil(size / target) / 8)
        width = step + size % 8
    return _Chunks(layout, model, shares, size, step, width, entropy_gradient, row_tokens)


def _tensor(model: ModelConfig) -> int:
    return model.mesh.shape["tensor"] if model.mesh else 1


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(chunks: _Chunks, *arrays: Any) -> tuple[Array, Array]:
    return _forward(chunks, *arrays)[0]


def _forward(chunks, weight, rows, hidden, targets, support, temperature):
    split, hidden = chunks.split(weight), place(hidden.astype(chunks.dtype), chunks.model, "rows", None, None)

    def add(sums, chunk):
        """Running sums relative to the largest logit so far: mass of exp(x), moment of x exp(x)."""
        largest, mass, moment, target = sums
        logits, _ = chunks.logits(chunks.weight(split, rows, chunk), hidden, support, temperature, chunk)
        ids, _ = chunks.tokens(chunk)
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

    zeros = jnp.zeros(targets.shape, jnp.float32)
    sums, _ = lax.scan(add, (zeros + MASKED, zeros, zeros, zeros), jnp.arange(chunks.count))
    largest, mass, moment, target = sums
    total = largest + jnp.log(mass)
    entropy = jnp.log(mass) - moment / mass
    # The log-probs depend on the entropy so that it is always computed: XLA compiles a program without it to other
    # rounding, and a policy and its copy must agree to the bit.
    logprobs = jnp.where(jnp.isnan(entropy), jnp.nan, target - total)
    return (logprobs, entropy), (weight, rows, hidden, targets, support, temperature, total, entropy)


def _backward(chunks, residuals, cotangents):
    weight, rows, hidden, targets, support, temperature, total, entropy = residuals
    split = chunks.split(weight)
    scale, entropy_scale = ((cotangent * (1 / temperature))[..., None, None] for cotangent in cotangents)

    def add(grads, chunk):
        grad_split, grad_hidden, grad_rows = grads
        weight_chunk = chunks.weight(split, rows, chunk)
        logits, products = chunks.logits(weight_chunk, hidden, support, temperature, chunk)
        logprobs = logits - total[..., None, None]
        probabilities = jnp.exp(logprobs)  # 0 for tokens of an earlier chunk
        ids, new = chunks.tokens(chunk)
        chosen = (targets[..., None, None] == ids) & new
        grad_logits = (chosen - probabilities) * scale
        if chunks.entropy_gradient:  # derivative of -sum p log p by a logit: -p (log p + entropy)
            grad_logits -= probabilities * (logprobs + entropy[..., None, None]) * entropy_scale
        grad_logits = chunks.grad_products(products, grad_logits).astype(chunks.dtype)
        share = chunks.product(f"brtv,{chunks.layout}->brd", grad_logits, weight_chunk)
        grad_hidden += place(share, chunks.model, "rows", None, None)
        if rows is not None:
            index = (slice(None), slice(None), *chunks.row_indices(chunk))
            grad_rows += grad_logits.at[index].get(mode="fill", fill_value=0)
            grad_logits = grad_logits.at[index].set(0, mode="drop")
        grad_chunk = chunks.slice(grad_split, chunk) + chunks.product(f"brtv,brd->{chunks.layout}", grad_logits, hidden)
        grad_split = lax.dynamic_update_slice_in_dim(
            grad_split, chunks.place(grad_chunk), chunks.start(chunk), chunks.axis
        )
        return (grad_split, grad_hidden, grad_rows), None

    shapes = split.shape, hidden.shape, (*targets.shape, len(chunks.row_tokens))
    zeros = tuple(jnp.zeros(shape, jnp.float32) for shape in shapes)
    (grad_split, grad_hidden, grad_rows), _ = lax.scan(add, zeros, jnp.arange(chunks.count))
    grad_weight = chunks.joined(grad_split).astype(weight.dtype)
    if rows is None:
        return grad_weight, None, grad_hidden, None, None, None
    subscripts = f"brv,brd->{chunks.layout.replace('t', '')}"
    return grad_weight, chunks.product(subscripts, grad_rows, hidden).astype(rows.dtype), grad_hidden, None, None, None


_token_logprobs.defvjp(_forward, _backward)


def response_states(params: Params, model: ModelConfig, rollout: Rollout) -> Float[Array, "B _ D"]:
    """Hidden states [B, R + 1, D] that predict each response token, and the one after the last column."""
    return _at_responses(forward(params, model, rollout.tokens, rollout.mask), rollout)


def response_states_with_router(
    params: Params, model: ModelConfig, rollout: Rollout
) -> tuple[Float[Array, "B _ D"], dict[str, Array]]:
    """`response_states`, and the router's sums as of `forward_with_router`."""
    hidden, router = forward_with_router(params, model, rollout.tokens, rollout.mask)
    return _at_responses(hidden, rollout), router


def _at_responses(hidden: Float[Array, "B T D"], rollout: Rollout) -> Float[Array, "B _ D"]:
    length = rollout.response_mask.shape[1]
    if rollout.start is None:
        return hidden[:, -length - 1 :]
    return jnp.take_along_axis(hidden, _columns(rollout, -1, length + 1)[..., None], axis=1)


def response_tokens(rollout: Rollout) -> Int[Array, "B R"]:
    """The tokens of the responses; any where `response_mask` is false."""
    length = rollout.response_mask.shape[1]
    if rollout.start is None:
        return rollout.tokens[:, -length:]
    return jnp.take_along_axis(rollout.tokens, _columns(rollout, 0, length), axis=1)


def _columns(rollout: Rollout, first: int, count: int) -> Int[Array, "B _"]:
    """`count` columns from that of response token `first` on, in a cut rollout; where there is none, some other."""
    assert rollout.start is not None
    columns = rollout.start[:, None] + jnp.arange(first, first + count)
    return jnp.clip(columns, 0, rollout.tokens.shape[1] - 1)


def last_hidden(
    params: Params,
    model: ModelConfig,
    tokens: Int[Array, "B T"],
    mask: Bool[Array, "B T"],
    keys: Key[Array, " B"] | None = None,
) -> tuple[Float[Array, "B D"], dict[str, Array]]:
    """Hidden state of each sequence's last real token (column 0 if there is none), and the router's sums as of
    `forward_with_router`. `keys` are for dropout."""
    column = jnp.argmax(masked.last(mask), axis=1)
    hidden, router = forward_with_router(params, model, tokens, mask, keys=keys)
    return jnp.take_along_axis(hidden, column[:, None, None], axis=1)[:, 0], router


def last_token_scores(
    params: Params, model: ModelConfig, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """Scalar-head score of each sequence at its last real token, without dropout.

    Finite but meaningless for a row without real tokens.
    """
    return scalar_head(params, model, last_hidden(params, model, tokens, mask)[0])

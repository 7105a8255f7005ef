"""Log-probabilities and scores of given tokens. The one function for the old, the new and the reference policy.

At V = 150 000, logits of a whole batch dwarf everything else. They are made a few columns of the response at a time, in
the forward pass and again in the backward pass, and only what is asked for is kept. Columns and not vocabulary are cut,
so that B and V keep whatever sharding they have.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, UInt8

from jaxrlhf.algorithms import masked
from jaxrlhf.algorithms.masked import Scalar
from jaxrlhf.models import ModelConfig, forward, scores
from jaxrlhf.models.layers import MASKED, product
from jaxrlhf.types import Params, Rollout

CHUNK_LOGITS = 2**25  # logits alive at once, 128 MB: enough rows for fast products, little beside the weights


def token_logprobs(
    params: Params,
    model: ModelConfig,
    hidden: Float[Array, "B R D"],
    targets: Int[Array, "B R"],
    temperature: Scalar,
    support: UInt8[Array, "B R _"] | None = None,
) -> tuple[Float[Array, "B R"], Float[Array, "B R"]]:
    """log softmax(logits / temperature)[target], and the entropy of that distribution, in nats.

    `hidden[:, t]` is what predicts `targets[:, t]`. The softmax is over the whole vocabulary, whatever sampling
    filtered, or over the tokens in `support`, bits as in `Rollout.support`; where that is empty (padding) results are
    finite and mean nothing. Products follow the model's rule (`layers.product`), as the sampler's logits do; sums and
    softmax are float32. Gradients go to `params` and `hidden` through the log-probabilities alone: the entropy is a
    measurement, behind a stop_gradient.
    """
    weight = params["embed"]["embedding"] if model.tie_embeddings else params["lm_head"]["kernel"]
    batch, columns = targets.shape
    chunks = min(columns, math.ceil(batch * columns * model.vocab_size / CHUNK_LOGITS))
    head = _Head("vd" if model.tie_embeddings else "dv", model.vocab_size, model.dtype, math.ceil(columns / chunks))
    return _token_logprobs(head, weight, hidden, targets, support, jnp.asarray(temperature, jnp.float32))


class _Head(NamedTuple):
    layout: str  # of the weight: "vd" or "dv"
    vocabulary: int
    dtype: str
    width: int  # columns per chunk

    def logits(self, weight, hidden, support, temperature):
        logits = self.product(f"brd,{self.layout}->brv", hidden, weight) / temperature
        if support is None:
            return logits
        # MASKED is finite: padding, whose support is empty, must stay so (its cotangent is 0, and 0 * nan is nan)
        return jnp.where(jnp.unpackbits(support, axis=-1, count=self.vocabulary), logits, MASKED)

    def product(self, subscripts, a, b):
        return product(subscripts, a, b, self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token_logprobs(
    head: _Head, weight: Array, hidden: Array, targets: Array, support: Array | None, temperature: Array
) -> tuple[Array, Array]:
    return _forward(head, weight, hidden, targets, support, temperature)[0]


def _forward(head, weight, hidden, targets, support, temperature):
    operand, hidden = weight.astype(head.dtype), hidden.astype(head.dtype)

    def chunk(inputs):
        hidden, targets, support = inputs
        logits = head.logits(operand, hidden, support, temperature)
        total = jax.nn.logsumexp(logits, axis=-1)
        target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
        mean = jnp.sum(jnp.exp(logits - total[..., None]) * logits, axis=-1)
        return target - total, total - mean, total

    outputs = jax.lax.map(chunk, _cut((hidden, targets, support), head.width))
    logprobs, entropy, total = (_join(x, targets.shape[1]) for x in outputs)
    return (logprobs, entropy), (weight, hidden, targets, support, temperature, total)


def _backward(head, kept, cotangents):
    weight, hidden, targets, support, temperature, total = kept
    operand = weight.astype(head.dtype)

    def chunk(grad_weight, inputs):
        hidden, targets, support, total, cotangent = inputs
        probabilities = jnp.exp(head.logits(operand, hidden, support, temperature) - total[..., None])
        chosen = targets[..., None] == jnp.arange(head.vocabulary)
        grad_logits = ((chosen - probabilities) * (cotangent / temperature)[..., None]).astype(head.dtype)
        grad_hidden = head.product(f"brv,{head.layout}->brd", grad_logits, operand)
        return grad_weight + head.product(f"brv,brd->{head.layout}", grad_logits, hidden), grad_hidden

    inputs = _cut((hidden, targets, support, total, cotangents[0]), head.width)
    grad_weight, grad_hidden = jax.lax.scan(chunk, jnp.zeros(weight.shape, jnp.float32), inputs)
    return grad_weight.astype(weight.dtype), _join(grad_hidden, targets.shape[1]), None, None, None


_token_logprobs.defvjp(_forward, _backward)


def _cut(tree: Any, width: int) -> Any:
    """[B, R, ...] -> [chunks, B, width, ...] for every leaf, zeros after the last column."""

    def cut(x: Array) -> Array:
        x = jnp.pad(x, [(0, 0), (0, -x.shape[1] % width)] + [(0, 0)] * (x.ndim - 2))
        return jnp.moveaxis(x.reshape(x.shape[0], -1, width, *x.shape[2:]), 1, 0)

    return jax.tree.map(cut, tree)


def _join(x: Array, columns: int) -> Array:
    """The inverse of `_cut`."""
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :columns]


def response_states(params: Params, model: ModelConfig, rollout: Rollout) -> Float[Array, "B _ D"]:
    """The hidden states [B, R + 1, D] before each response token, which predict it, and after the last column."""
    return forward(params, model, rollout.tokens, rollout.mask)[:, -rollout.response_mask.shape[1] - 1 :]


def last_hidden(
    params: Params, model: ModelConfig, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, "B D"]:
    """The hidden state of each sequence's last real token, wherever the padding is; of column 0 if there is none."""
    column = jnp.argmax(masked.last(mask), axis=1)
    return jnp.take_along_axis(forward(params, model, tokens, mask), column[:, None, None], axis=1)[:, 0]


def last_token_scores(
    params: Params, model: ModelConfig, tokens: Int[Array, "B T"], mask: Bool[Array, "B T"]
) -> Float[Array, " B"]:
    """The scalar head's score of each sequence, read at its last real token, without dropout.

    A row without a real token gets some finite score that means nothing.
    """
    return scores(params, model, last_hidden(params, model, tokens, mask))

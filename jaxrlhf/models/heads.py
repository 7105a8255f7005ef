"""Heads on the hidden states: the language-model head, and the scalar heads of reward and value models."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from jaxrlhf.models.attention import softcapped
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.layers import along_last, int8_product, left_product, product
from jaxrlhf.types import Params

MLP_SIZES = (512, 256)
DROPOUT = 0.1
LEAD = "abcefg"  # einsum letters of leading axes


def init_head(model: ModelConfig, key: Array) -> Params:
    """Fresh head parameters: `lm_head`, `score`, or none if the embedding is tied."""
    if model.head == "lm":
        if model.tie_embeddings:
            return {}
        return {"lm_head": {"kernel": 0.02 * jax.random.normal(key, (model.hidden_size, model.vocab_size))}}
    if model.head == "linear":
        return {"score": {"kernel": _scalar_kernel(key, model.hidden_size, model.num_labels)}}
    sizes = (model.hidden_size, *MLP_SIZES, model.num_labels)
    keys = jax.random.split(key, len(sizes) - 1)
    return {
        "score": {
            f"dense_{i}": {"kernel": _scalar_kernel(keys[i], sizes[i], sizes[i + 1]), "bias": jnp.zeros(sizes[i + 1])}
            for i in range(len(sizes) - 1)
        }
    }


def _scalar_kernel(key: Array, size: int, outputs: int) -> Array:
    """N(0, 1 / (D + 1)), for scores of unit scale on normalised hidden states (Stiennon et al. 2020, appendix B)."""
    return jax.random.normal(key, (size, outputs)) * (size + 1) ** -0.5


def lm_weight(params: Params, model: ModelConfig) -> tuple[Array, Array | None]:
    """(output weight, rows of it trained for the tokens of `model.adapters`, or None).

    The weight is [V, D] if the embedding is tied, or kernels are on the left, else [D, V]; rows lie along its axis V.
    """
    part, leaf = ("embed", "embedding") if model.tie_embeddings else ("lm_head", "kernel")
    return params[part][leaf], params.get("lora", {}).get("rows", {}).get(leaf)


def lm_logits(params: Params, model: ModelConfig, hidden: Float[Array, "*lead D"]) -> Float[Array, "*lead V"]:
    """Next-token logits, float32."""
    if model.kernels == "int8":
        table = params["embed"] if model.tie_embeddings else params["lm_head"]
        kernel = table["embedding" if model.tie_embeddings else "kernel"]
        return finish_logits(int8_product(hidden, kernel, table["scale"]), model)
    weight, rows = lm_weight(params, model)
    if model.kernels == "left":
        return finish_logits(left_product(hidden, weight, model.dtype), model)
    if rows is not None:  # inserted into the weight: a separate product would round differently
        assert model.adapters is not None
        tokens = jnp.array(model.adapters.tokens)
        index = tokens if model.tie_embeddings else (slice(None), tokens)
        weight = weight.astype(model.dtype).at[index].set(rows.astype(model.dtype))
    lead = LEAD[: hidden.ndim - 1]
    subscripts = f"{lead}d,{'vd' if model.tie_embeddings else 'dv'}->{lead}v"
    return finish_logits(product(subscripts, hidden, weight, model.dtype), model)


def finish_logits(products: Float[Array, "*lead V"], model: ModelConfig) -> Float[Array, "*lead V"]:
    """Next-token logits from the products of hidden states and output weight: divided and softcapped."""
    if model.logits_divisor != 1:
        products = products / model.logits_divisor
    return softcapped(products, model.logits_softcap)


def label_logits(
    params: Params, model: ModelConfig, hidden: Float[Array, "*lead D"], dropout_key: Array | None = None
) -> Float[Array, "*lead labels"]:
    """Outputs of the scalar head, one or two per position, computed in float32.

    With `dropout_key`, the hidden layers of the MLP head have dropout (rate 0.1); the linear head has none.
    """
    score, x = params["score"], hidden
    if model.head == "linear":
        return _matmul(x, score["kernel"])
    for i in range(len(MLP_SIZES)):
        x = jax.nn.relu(_affine(score[f"dense_{i}"], x))
        if dropout_key is not None:
            kept = jax.random.bernoulli(jax.random.fold_in(dropout_key, i), 1 - DROPOUT, x.shape)
            x = jnp.where(kept, x / (1 - DROPOUT), 0)
    return _affine(score[f"dense_{len(MLP_SIZES)}"], x)


def _affine(layer: Params, x: Array) -> Array:
    y = _matmul(x, layer["kernel"])
    return y + along_last(layer["bias"], y)


def _matmul(x: Array, kernel: Array) -> Array:
    lead = LEAD[: x.ndim - 1]
    return product(f"{lead}i,io->{lead}o", x, kernel, jnp.float32)


def scalar_head(
    params: Params, model: ModelConfig, hidden: Float[Array, "*lead D"], dropout_key: Array | None = None
) -> Float[Array, "*lead"]:
    """Score or value per position: the output, or with two labels the probability of label 1."""
    outputs = label_logits(params, model, hidden, dropout_key)
    if model.num_labels == 1:
        return outputs[..., 0]
    return jax.nn.softmax(outputs, axis=-1)[..., 1]


def log_odds(
    params: Params, model: ModelConfig, hidden: Float[Array, "*lead D"], dropout_key: Array | None = None
) -> Float[Array, "*lead"]:
    """Unbounded score, for the losses of a reward model: the output, or with two labels logit 1 - logit 0."""
    outputs = label_logits(params, model, hidden, dropout_key)
    return outputs[..., 0] if model.num_labels == 1 else outputs[..., 1] - outputs[..., 0]


def with_two_labels(model: ModelConfig, params: Params) -> tuple[ModelConfig, Params]:
    """Add an output for label 0, always 0, to a reward model with one output.

    The score becomes its sigmoid, the probability of label 1; the log-odds stay the same.
    """

    def prepend_zero(x: Array) -> Array:
        return jnp.concatenate([jnp.zeros_like(x), x], axis=-1)

    score = params["score"]
    if model.head == "linear":
        score = jax.tree.map(prepend_zero, score)
    else:
        last = f"dense_{len(MLP_SIZES)}"
        score = {**score, last: jax.tree.map(prepend_zero, score[last])}
    return dataclasses.replace(model, num_labels=2), {**params, "score": score}

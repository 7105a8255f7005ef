"""The copy of a model that decodes: made once per rollout phase, thrown away after it.

Training wants layers stacked and parameters in float32. Decoding reads every weight once per token, so it wants each
layer's weights in one piece, in the precision of the product, and in the order in which the device multiplies fastest.
"""

import dataclasses
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp

from jaxrlhf import lora
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig, unstack
from jaxrlhf.sharding import path_of
from jaxrlhf.types import Params

RolloutDType = Literal["float32", "bfloat16", "int8"]


def inference_copy(model: ModelConfig, params: Params, dtype: RolloutDType) -> tuple[ModelConfig, Params]:
    """`model` and its stacked `params` as `forward_cached` and `generate` take them; norms and biases stay as they are.

    float32 and bfloat16 are the operands of products and what the weights are kept in. int8 keeps kernels and
    embeddings in 8 bits with a scale for each output (for each token in an embedding); products then round activations
    to 8 bits per position too, while attention is bfloat16, or float32 if `model` computes in float32. Raises
    ConfigError for another dtype.
    """
    known = get_args(RolloutDType)
    if dtype not in known:
        raise ConfigError(f"an inference copy in {dtype!r} was asked for; it can be {', '.join(known)}")
    inference = inference_model(model, dtype)
    return inference, convert(params, model, inference)


def inference_model(model: ModelConfig, dtype: RolloutDType) -> ModelConfig:
    """The model that `inference_copy` returns."""
    operands = model.dtype if dtype == "int8" else dtype
    # XLA's float32 products on a CPU read W[in, out] a fifth faster than W[out, in], which is what an embedding is
    untie = model.tie_embeddings and dtype == "float32" and jax.default_backend() == "cpu"
    return dataclasses.replace(
        model,
        dtype=operands,
        kernels="int8" if dtype == "int8" else "float",
        tie_embeddings=model.tie_embeddings and not untie,
        remat="none",
        attention="plain",
        adapters=None,
    )


@partial(jax.jit, static_argnames=("model", "inference"))
def convert(params: Params, model: ModelConfig, inference: ModelConfig) -> Params:
    """Parameters of `model` as those of `inference`, one of its `inference_model`s; adapters are merged."""
    if inference.kernels == "int8":  # all layers at once: they are small when they are rounded
        return unstack(_int8(lora.merge(params, model)), model)
    params = (
        _merged(params, model)
        if "lora" in params or "codes" in params["layers"]["mlp"]["up"]
        else unstack(params, model)
    )
    if model.tie_embeddings and not inference.tie_embeddings:
        params = {**params, "lm_head": {"kernel": params["embed"]["embedding"].T}}

    def cast(keys, x):
        return x.astype(inference.dtype) if path_of(keys).endswith(("kernel", "embedding")) else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _merged(params: Params, model: ModelConfig) -> Params:
    """`lora.merge` and `unstack`, a layer at a time: a stack of merged kernels would be as large as what comes out."""
    adapters = params.get("lora", {})
    first, last = (model.adapters and model.adapters.layers) or (0, model.num_layers)
    one = model.adapters and dataclasses.replace(model.adapters, layers=None, tokens=())
    alone = dataclasses.replace(model, num_layers=1, sliding_layers=model.sliding_layers[:1], adapters=one)

    def layer(index: int) -> Params:
        part = {"layers": jax.tree.map(lambda x: x[index][None], params["layers"])}
        if adapters and first <= index < last:
            part["lora"] = {"layers": jax.tree.map(lambda x: x[index - first][None], adapters["layers"])}
        return jax.tree.map(lambda x: x[0], lora.merge(part, alone)["layers"])

    outside = {**params, "layers": {}} | ({"lora": {**adapters, "layers": {}}} if adapters else {})
    return {**lora.merge(outside, model), "layers": tuple(layer(i) for i in range(model.num_layers))}


def _int8(params: Params) -> Params:
    """Kernels [..., in, out] as int8 [..., out, in] with "scale" f32 [..., out]; the embedding as int8, one per row.

    Quantised before they are transposed: a quarter of the bytes.
    """
    quantised: Params = {}
    for name, value in params.items():
        if name in ("positions", "score"):
            quantised[name] = value
        elif isinstance(value, dict):
            quantised[name] = _int8(value)
        elif name in ("kernel", "embedding"):
            along = -1 if name == "embedding" else -2
            value = value.astype(jnp.float32)
            # max and min are vectorised on CPUs; the maximum of abs is not, and three times slower
            largest = jnp.maximum(jnp.max(value, axis=along), -jnp.min(value, axis=along))
            scale = jnp.maximum(largest, 1e-30) / 127
            rounded = jnp.round(value / jnp.expand_dims(scale, along)).astype(jnp.int8)
            quantised[name] = rounded if name == "embedding" else jnp.swapaxes(rounded, -1, -2)
            quantised["scale"] = scale
        else:
            quantised[name] = value
    return quantised

"""Copy of a model for decoding, created for each rollout phase and dropped after it.

Training uses stacked layers and float32 parameters. Decoding reads every weight once per token and is faster with
separate layers (except on TPUs), weights in the precision of the products, and the memory layout the device multiplies
fastest.

On a mesh the copy is laid out anew. Training splits its weights over `fsdp`, which a decode step would pay for at every
token, by gathering weights or by adding up partial sums of all rows. The copy is split over `tensor` alone, if it fits,
so that each device decodes its own rows and exchanges no more than tensor parallelism needs.
"""

import dataclasses
from functools import partial
from typing import Literal, get_args

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike
from jaxtyping import Array

from jaxrlhf import lora, runtime, sharding
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig, adapters_of_all_layers, init, layer_of, unstack
from jaxrlhf.sharding import path_of
from jaxrlhf.types import Params

RolloutDType = Literal["float32", "bfloat16", "int8"]
Layout = Literal["auto", "replicated", "sharded"]
SHARE = 1 / 4
"""Part of a device's memory that the copy may take on each device to be replicated by layout "auto"."""


def inference_copy(
    model: ModelConfig, params: Params, dtype: RolloutDType, rows: int | None = None
) -> tuple[ModelConfig, Params]:
    """Convert `model` and its stacked `params` for `forward_cached` and `generate`.

    `dtype` is the dtype of weights and product operands; norms and biases are not converted. int8 stores kernels and
    embeddings in 8 bits with one scale per output (per token in an embedding) and rounds activations to 8 bits per
    position; attention is in bfloat16, or in float32 if `model` computes in float32. `rows` is the number of sequences
    that will be decoded at a time: some processors are faster with other layouts of the weights of few rows
    (`runtime.weights_left`) and of the keys of many (`runtime.keys_by_column`).

    Raises:
        ConfigError: another dtype.
    """
    if dtype not in get_args(RolloutDType):
        raise ConfigError(
            f"the dtype of an inference copy cannot be {dtype!r}; choose one of {', '.join(get_args(RolloutDType))}"
        )
    inference = inference_model(model, dtype, rows)
    return inference, convert(params, model, inference)


def inference_model(model: ModelConfig, dtype: RolloutDType, rows: int | None = None) -> ModelConfig:
    """Model config that `inference_copy` returns."""
    left = runtime.weights_left(model.platform, dtype, rows)
    # on CPUs, XLA's float32 products read W[in, out] 20 % faster than W[out, in], the layout of an embedding
    untie = model.tie_embeddings and dtype == "float32" and model.platform == "cpu" and not left
    computed = model.dtype if dtype == "int8" else dtype
    return dataclasses.replace(
        model,
        dtype=computed,
        key_columns=3 if runtime.keys_by_column(model.platform, computed, rows) else 2,
        kernels="int8" if dtype == "int8" else "left" if left else "float",
        tie_embeddings=model.tie_embeddings and not untie,
        remat="none",
        attention="plain",
        adapters=None,
    )


def split_axes(inference: ModelConfig, mesh: jax.sharding.Mesh, layout: Layout) -> tuple[str, ...]:
    """Axes of the mesh over which the weights of a copy are split, by layout.

    replicated: `tensor` only. sharded: `fsdp` too, as in training. auto: replicated if the copy then takes at most
    `SHARE` of a device's memory, or if that is not known, as on CPUs.
    """
    if layout == "auto":
        capacity = sharding.device_memory(mesh)
        weights = jax.eval_shape(lambda: init(dataclasses.replace(inference, kernels="float"), jax.random.key(0)))
        itemsize = 1 if inference.kernels == "int8" else jnp.dtype(inference.dtype).itemsize
        each = sum(x.size for x in jax.tree.leaves(weights)) * itemsize // mesh.shape["tensor"]
        layout = "replicated" if capacity is None or each <= SHARE * capacity else "sharded"
    return ("tensor",) if layout == "replicated" else ("fsdp", "tensor")


def copy_shardings(copy: Params, inference: ModelConfig, mesh: jax.sharding.Mesh, axes: tuple[str, ...]) -> Params:
    """NamedShardings of a copy: those of training (`sharding.RULES`), with `axes` alone."""

    def place(keys, x):
        path, order = path_of(keys), [*range(x.ndim)]
        turned = {"float": False, "left": _turns(path, x), "int8": path.endswith("kernel")}
        if turned[inference.kernels]:
            order[-2:] = order[:-3:-1]
        shape = tuple(x.shape[i] for i in order)
        unstacked = path.startswith("layers/") and not inference.scans_layers
        spec = tuple(sharding.spec(path, (1, *shape) if unstacked else shape, mesh))[unstacked:]
        kept = [axis if axis in axes else None for axis in spec + (None,) * (len(shape) - len(spec))]
        return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*(kept[i] for i in order)))

    return jax.tree_util.tree_map_with_path(place, copy)


@partial(jax.jit, static_argnames=("model", "inference", "mesh", "axes"))
def convert(
    params: Params,
    model: ModelConfig,
    inference: ModelConfig,
    mesh: jax.sharding.Mesh | None = None,
    axes: tuple[str, ...] = (),
) -> Params:
    """Convert parameters of `model` to those of `inference` (see `inference_model`), with adapters merged; on a mesh
    also to the layout of `copy_shardings`."""
    copy = _converted(params, model, inference)
    if mesh is None or mesh.size == 1:
        return copy
    return jax.lax.with_sharding_constraint(copy, copy_shardings(copy, inference, mesh, axes))


def _converted(params: Params, model: ModelConfig, inference: ModelConfig) -> Params:
    if inference.kernels == "int8":  # merged all layers at once, as the int8 result is small
        return unstack(_int8(lora.merge(params, model)), model)
    quantised = "codes" in params["layers"]["attention"]["q"]
    if "lora" in params or quantised:
        params = _merge_by_layer(params, model, inference.dtype)
    else:
        params = unstack(params, model)
    if model.tie_embeddings and not inference.tie_embeddings:
        params = {**params, "lm_head": {"kernel": params["embed"]["embedding"].T}}
    params = _cast(params, inference.dtype)
    return _left(params) if inference.kernels == "left" else params


def _cast(params: Params, dtype: DTypeLike) -> Params:
    def cast(keys, x):
        return x.astype(dtype) if path_of(keys).endswith(("kernel", "embedding")) else x

    return jax.tree_util.tree_map_with_path(cast, params)


def _left(params: Params) -> Params:
    """Kernels [in, out] of unstacked layers as [out, in]."""
    return jax.tree_util.tree_map_with_path(lambda keys, x: x.T if _turns(path_of(keys), x) else x, params)


def _turns(path: str, x: Array | jax.ShapeDtypeStruct) -> bool:
    """True for the kernels that `_left` transposes: not those of experts, which are 3-dimensional, and of routers."""
    return path.endswith("kernel") and x.ndim == 2 and "router" not in path


def _merge_by_layer(params: Params, model: ModelConfig, dtype: DTypeLike) -> Params:
    """`lora.merge` and `unstack` one layer at a time, with kernels of `dtype`: a stack of all merged kernels would
    double the memory."""
    adapters = params.get("lora", {})
    first, last = model.adapted_layers
    layer_adapters = model.adapters and dataclasses.replace(model.adapters, layers=None, tokens=())

    def layer(weights: Params, adapter: Params, number: int = 0) -> Params:
        layer_model = dataclasses.replace(
            model,
            num_layers=1,
            sliding_layers=model.sliding_layers[:1],
            rope_layers=(),
            delta=model.delta and dataclasses.replace(model.delta, layers=model.delta_layers[number : number + 1]),
            adapters=layer_adapters,
        )
        stack = {"layers": jax.tree.map(lambda x: x[None], weights)}
        if adapter:
            stack["lora"] = {"layers": jax.tree.map(lambda x: x[None], adapter)}
        return _cast(jax.tree.map(lambda x: x[0], lora.merge(stack, layer_model)["layers"]), dtype)

    if model.scans_layers:
        layers = jax.lax.map(lambda x: layer(*x), (params["layers"], adapters_of_all_layers(params, model)))
    else:
        layers = tuple(
            layer(
                layer_of(params["layers"], model, i),
                layer_of(adapters["layers"], model, i, first) if adapters and first <= i < last else {},
                i,
            )
            for i in range(model.num_layers)
        )
    outside = {**params, "layers": {}} | ({"lora": {**adapters, "layers": {}}} if adapters else {})
    return {**lora.merge(outside, model), "layers": layers}


def _int8(params: Params) -> Params:
    """Quantise kernels [..., in, out] to int8 [..., out, in] with "scale" f32 [..., out], and the embedding by row.

    Kernels are quantised before they are transposed, which moves a quarter of the bytes.
    """
    quantised: Params = {}
    for name, value in params.items():
        if name in ("positions", "score", "router"):  # the choice of experts is not rounded
            quantised[name] = value
        elif isinstance(value, dict):
            quantised[name] = _int8(value)
        elif name in ("kernel", "embedding"):
            axis = -1 if name == "embedding" else -2
            value = value.astype(jnp.float32)
            # on CPUs max and min are vectorised; max(abs) is not, and takes three times as long
            largest = jnp.maximum(jnp.max(value, axis=axis), -jnp.min(value, axis=axis))
            scale = jnp.maximum(largest, 1e-30) / 127
            rounded = jnp.round(value / jnp.expand_dims(scale, axis)).astype(jnp.int8)
            quantised[name] = rounded if name == "embedding" else jnp.swapaxes(rounded, -1, -2)
            quantised["scale"] = scale
        else:
            quantised[name] = value
    return quantised

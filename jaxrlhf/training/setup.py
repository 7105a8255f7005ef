"""Before the first step of any trainer: tokenizer, model, what trains and what is frozen."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jaxrlhf import lora as adapters
from jaxrlhf import runtime, sharding, weights
from jaxrlhf.checkpoint.digest import digests, leaves_by_name
from jaxrlhf.config import (
    DPOConfig,
    DType,
    GRPOConfig,
    LoRA,
    ModelSource,
    PPOConfig,
    RewardConfig,
    Sampling,
    SFTConfig,
)
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import Adapters, Bits, ModelConfig, cudnn_trouble, init
from jaxrlhf.types import Params
from jaxrlhf.weights import peft

RunConfig = SFTConfig | RewardConfig | DPOConfig | PPOConfig | GRPOConfig


def keys(seed: int) -> jax.Array:
    """The keys [4] of a run: for parameters that are drawn, for the run itself, for a critic, for adapters."""
    return jax.random.split(jax.random.key(seed), 4)


def model_config(source: ModelSource, tokenizer: Tokenizer, head: str | None, lora: LoRA) -> ModelConfig:
    """The model that `load_model` will return with its parameters, before any weights are read; its adapters are those
    that `lora` asks for. Raises ConfigError for matrices and layers that it does not have."""
    compute = runtime.resolve_dtype(source.compute_dtype, jax.default_backend())
    model = weights.load_config(
        source.path,
        revision=source.revision,
        head=head,
        compute_dtype=compute,
        remat=runtime.resolve_remat(source.remat, jax.default_backend()),
    )
    if tokenizer.added and tokenizer.size > model.vocab_size:
        model = dataclasses.replace(model, vocab_size=tokenizer.size)
    added = tuple(range(tokenizer.size - tokenizer.added, tokenizer.size))
    return with_attention(with_adapters(model, lora, added), source)


def with_adapters(model: ModelConfig, lora: LoRA, added: tuple[int, ...] = ()) -> ModelConfig:
    """The model with adapters as `lora` says, and rows of their own for tokens that were `added`. Raises ConfigError
    for matrices and layers that it does not have."""
    if not lora.enabled:
        return model
    peft.modules(model, lora.target_modules)
    if lora.layers and lora.layers[1] > model.num_layers:
        raise ConfigError(f"lora.layers is {list(lora.layers)}, and the model has {model.num_layers} layers")
    adapters = Adapters(lora.rank, lora.alpha, lora.use_rslora, lora.dropout, lora.layers, added)
    return dataclasses.replace(model, adapters=adapters)


def with_attention(model: ModelConfig, source: ModelSource) -> ModelConfig:
    """The model with the attention that `source` asks for; ConfigError if that is cudnn and cannot be had."""
    kind = runtime.resolve_attention(source.attention, jax.default_backend(), model.dtype)
    if kind == "cudnn":
        trouble = "it computes in bfloat16, and the model's products are in float32" * (model.dtype != "bfloat16")
        trouble = trouble or cudnn_trouble(model.num_heads, model.num_kv_heads, model.head_dim)
        if trouble and source.attention == "cudnn":
            raise ConfigError(f"model.attention is cudnn, which cannot be used: {trouble}. Use plain, or auto")
        kind = "plain" if trouble else "cudnn"
    return dataclasses.replace(model, attention=kind)


def param_shapes(model: ModelConfig, dtype: str, mesh: jax.sharding.Mesh, lora: LoRA) -> Params:
    """Shapes, dtypes and places of a model's parameters stored in `dtype`, adapters included."""
    key = jax.random.key(0)
    return abstract_call(lambda: add_adapters(init(model, key, dtype=dtype), model, lora, key), mesh)


def abstract_call(make: Callable[..., Any], mesh: jax.sharding.Mesh, *args: Any) -> Any:
    """What `make` returns for `args`, arrays or their shapes, as shapes in their places. What it returns twice is one
    object, and what it was given and returns is the same one, as with arrays."""
    leaves, tree = jax.tree.flatten(args)
    given = {id(leaf): leaf for leaf in leaves}
    known: dict[int, Any] = {}
    names: list[int] = []

    def traced(inputs: dict[int, Any]) -> Any:
        known.update({id(tracer): given[name] for name, tracer in inputs.items()})
        made = make(*jax.tree.unflatten(tree, [inputs[id(leaf)] for leaf in leaves]))
        names.extend(id(leaf) for leaf in jax.tree.leaves(made))
        return made

    shapes = jax.eval_shape(traced, given)
    found, structure = jax.tree.flatten(sharding.with_shardings(shapes, sharding.shardings(shapes, mesh)))
    return jax.tree.unflatten(structure, [known.setdefault(n, x) for n, x in zip(names, found, strict=True)])


def load_model(
    source: ModelSource,
    *,
    tokenizer: Tokenizer,
    mesh: jax.sharding.Mesh,
    key: jax.Array,
    head: str | None,
    storage: DType,
) -> Params:
    """The parameters of a model of a run, placed on the mesh, with room for the tokens the tokenizer has added.

    `storage` is the dtype of the parameters ("auto": the compute dtype). Raises DataError
    if the tokenizer has more tokens than the model has rows.
    """
    compute = runtime.resolve_dtype(source.compute_dtype, jax.default_backend())
    model, params = weights.load(
        source.path,
        revision=source.revision,
        dtype=compute if storage == "auto" else storage,
        compute_dtype=compute,
        head=head,
        remat=runtime.resolve_remat(source.remat, jax.default_backend()),
        init=source.init,
        key=key,
        mesh=mesh,
    )
    if tokenizer.added and tokenizer.size > model.vocab_size:
        model, params = weights.resize_embeddings(model, params, tokenizer.size)
        params = jax.device_put(params, sharding.shardings(params, mesh))
    check_vocab(tokenizer, model.vocab_size)
    whole, adapters_folder = weights.base_and_adapters(weights.resolve(source.path, source.revision, weights=False))
    if source.merged_path and adapters_folder:
        facts = {"method": "merge", "base_model": str(whole), "adapters": str(adapters_folder)}
        weights.export(source.merged_path, model, params, source=whole, tokenizer=tokenizer, facts=facts)
    return params


def param_dtype(config: RunConfig) -> DType:
    """Storage of the parameters that a run loads. auto: float32 where they train, whatever the compute dtype; that of
    products where adapters train and they do not."""
    if config.model.param_dtype != "auto":
        return config.model.param_dtype
    if not config.lora.enabled:
        return "float32"
    return runtime.resolve_dtype(config.model.compute_dtype, jax.default_backend())


def add_adapters(params: Params, model: ModelConfig, lora: LoRA, key: jax.Array) -> Params:
    """The parameters with new adapters beside them, if `lora` asks for any, and packed if it asks for that. Runs under
    eval_shape."""
    if not lora.enabled:
        return params
    params = quantize(params, lora)
    return {**params, **_adapters(params, model, lora, key)}


def quantize(params: Params, lora: LoRA) -> Params:
    """The parameters as they lie under adapters: packed, if `lora` asks for that and they are not yet."""
    if lora.quantize == "none" or "codes" in params["layers"]["mlp"]["up"]:
        return params
    return _packed(params, lora.quantize, lora.double_quant)


@functools.partial(jax.jit, static_argnames=("bits", "double"))
def _packed(params: Params, bits: Bits, double: bool) -> Params:
    return adapters.pack(params, bits, double)


@functools.partial(jax.jit, static_argnames=("model", "lora"))
def _adapters(base: Params, model: ModelConfig, lora: LoRA, key: jax.Array) -> Params:
    return adapters.init(model, base, peft.modules(model, lora.target_modules), key, magnitudes=lora.use_dora)


def split_trainable(params: Params, frozen_trunk: bool) -> tuple[Params, Params]:
    """(what trains, what is frozen): everything and nothing, or adapters and scalar head, and the rest. Laid over each
    other they are the model."""
    if not frozen_trunk:
        return params, {}
    return (
        {k: v for k, v in params.items() if k in ("lora", "score")},
        {k: v for k, v in params.items() if k not in ("lora", "score")},
    )


def cast_copy(params: Params, dtype: str, mesh: jax.sharding.Mesh) -> Params:
    """A copy with kernels and embeddings in `dtype`; never an alias, since what trains is donated and its buffers go.

    Norms and biases keep their dtype: they enter the forward pass unrounded, so a copy for products in bfloat16 still
    computes exactly what the original does.
    """

    return _copy(params, dtype=dtype, mesh=mesh)


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def _copy(params: Params, *, dtype: str, mesh: jax.sharding.Mesh) -> Params:
    def cast(keys: Any, x: jax.Array) -> jax.Array:
        return jnp.array(x, dtype if sharding.path_of(keys).endswith(("kernel", "embedding")) else x.dtype, copy=True)

    return sharding.constrain(jax.tree_util.tree_map_with_path(cast, params), mesh)


def fingerprint(rows: Sequence[Any]) -> str:
    """A hash of tokenised rows: equal if and only if a resumed run reads the same data in the same words."""
    total = hashlib.sha256()
    for row in rows:
        total.update(repr(row).encode())
    return total.hexdigest()


def params_fingerprint(params: Any) -> str:
    """A hash of arrays that a run uses and does not train."""
    return hashlib.sha256(repr(sorted(digests(leaves_by_name(params)).items())).encode()).hexdigest()


def check_context(lengths: Sequence[int], model: ModelConfig, what: str, lower: str) -> None:
    """Refuse rows that are longer than the model's context; `what` is long, `lower` the config keys to lower."""
    longest = max(lengths)
    if longest > model.max_positions:
        raise ConfigError(
            f"{what} comes to {longest} tokens but the model's context is {model.max_positions}; lower {lower}"
        )


def fit_response(sampling: Sampling, prompt_length: int, model: ModelConfig) -> Sampling:
    """`sampling` with its response cut to the room the context leaves after the prompt (at least one token)."""
    room = max(model.max_positions - prompt_length, 1)
    return dataclasses.replace(sampling, response_length=min(sampling.response_length, room))


def describe(config: RunConfig, model: ModelConfig, tokenizer: Tokenizer, report: Any, mesh: jax.sharding.Mesh) -> str:
    """What a run is about to work with, a line each: model, precision, devices, tokenizer decisions, data."""
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    millions = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    device = jax.devices()[0]
    new = f" and the rows of {tokenizer.added} new tokens" if tokenizer.added else ""
    below = "the model under them" + (f", in {config.lora.quantize}," if config.lora.quantize != "none" else "")
    grid = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    return "\n".join(
        (
            f"model {config.model.path}: {model.family}, {millions:.1f} M parameters, context {model.max_positions}, "
            f"parameters {param_dtype(config)}, products {model.dtype}, attention {model.attention}",
            *([f"adapters of rank {config.lora.rank}{new} train, {below} does not"] * config.lora.enabled),
            f"devices: {grid} of {jax.device_count()} {device.platform} ({device.device_kind})",
            *tokenizer.notes,
            str(report),
        )
    )

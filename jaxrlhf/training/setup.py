"""Setup shared by all trainers: tokenizer, model, parameters, and hashes of the data and the frozen parameters."""

import dataclasses
import functools
import hashlib
from collections.abc import Callable, Iterable, Sequence
from itertools import chain
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf import distributed, runtime, sharding, weights
from jaxrlhf.checkpoint.digest import digests, leaves_by_name
from jaxrlhf.config import (
    DistillConfig,
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
from jaxrlhf.data import batching
from jaxrlhf.data.tokenizer import Tokenizer, check_vocab
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import ModelConfig, cudnn_trouble, init
from jaxrlhf.training.abstract import build, is_abstract
from jaxrlhf.training.adapters import with_adapters
from jaxrlhf.types import Params

RunConfig = SFTConfig | RewardConfig | DPOConfig | PPOConfig | GRPOConfig | DistillConfig

LOOKED_AT = 256
"""Batches at most whose lengths decide on the widths of a run."""


def keys(seed: int) -> tuple[jax.Array, ...]:
    """The four random keys of a run: for new parameters, the run itself, the critic, adapters."""
    return _keys(np.uint32(seed))


@jax.jit  # one program in place of those of its parts
def _keys(seed: jax.Array) -> tuple[jax.Array, ...]:
    return tuple(jax.random.split(jax.random.key(seed), 4))


def model_config(
    source: ModelSource, tokenizer: Tokenizer, head: str | None, lora: LoRA, mesh: jax.sharding.Mesh
) -> ModelConfig:
    """The model of a run, before any weights are read. Raises ConfigError for adapters on matrices and layers that it
    does not have, and for the load-balancing loss of a model without experts."""
    model = weights.load_config(
        source.path,
        revision=source.revision,
        head=head,
        compute_dtype=source.compute_dtype,
        remat=source.remat,
        platform=sharding.platform(mesh),
    )
    if (coef := source.router_aux_loss_coef) is not None:
        if coef and not model.num_experts:
            raise ConfigError(
                f"model.router_aux_loss_coef is {coef:g}, but {source.path} is no mixture of experts; leave it out"
            )
        model = dataclasses.replace(model, router_aux_loss_coef=coef)
    if tokenizer.added and tokenizer.size > model.vocab_size:
        model = dataclasses.replace(model, vocab_size=tokenizer.size)
    added = tuple(range(tokenizer.size - tokenizer.added, tokenizer.size))
    sharding.check_heads(model, mesh, source.path)
    model = dataclasses.replace(with_adapters(model, lora, added), mesh=mesh if mesh.size > 1 else None)
    return with_attention(model, source)


def with_attention(model: ModelConfig, source: ModelSource) -> ModelConfig:
    """The model with the attention that `source` asks for; ConfigError if that is cudnn and cannot be used. For devices
    that are not here (`sharding.on_devices`) it is taken to work for the shapes that it has kernels for."""
    kind = runtime.resolve_attention(source.attention, model.platform, model.dtype)
    if kind == "cudnn":
        reason = "it computes in bfloat16, and the model's products are in float32" * (model.dtype != "bfloat16")
        reason = reason or "the model caps its attention logits, for which it has no kernel" * bool(
            model.attention_softcap
        )
        reason = reason or cudnn_trouble(model.num_heads, model.num_kv_heads, model.head_dim, trial=sharding.is_here())
        if reason and source.attention == "cudnn":
            raise ConfigError(f"model.attention is cudnn, which cannot be used: {reason}. Use plain, or auto")
        kind = "plain" if reason else "cudnn"
    return dataclasses.replace(model, attention=kind)


def with_kept_products(model: ModelConfig, config: RunConfig, tokens: int) -> ModelConfig:
    """The model with `remat: dots` if that is what `model.remat: auto` stands for with micro-batches of so many
    tokens: see `runtime.keeps_products`. Not under adapters: their state is small, and what is kept would not be."""
    asked = config.model.remat == "auto" and not config.lora.enabled
    kept = asked and runtime.keeps_products(model.platform, model.dtype, tokens, model.hidden_size)
    return dataclasses.replace(model, remat="dots") if kept else model


def load_model(config: RunConfig, tokenizer: Tokenizer, mesh: jax.sharding.Mesh, head: str | None) -> Params:
    """The initial parameters of a run on the mesh, with rows for the tokens that the tokenizer has added.

    Inside `weights.abstract_weights()` nothing is loaded, and they are shapes. Raises DataError if the tokenizer has
    more tokens than the model has rows.
    """
    source = config.model
    model, params = weights.load(
        source.path,
        revision=source.revision,
        dtype=param_dtype(config, mesh),
        compute_dtype=source.compute_dtype,
        head=head,
        remat=source.remat,
        init=source.init,
        key=keys(config.seed)[0],
        mesh=mesh,
    )
    if tokenizer.added and tokenizer.size > model.vocab_size:
        old, model = model, dataclasses.replace(model, vocab_size=tokenizer.size)
        params = build(lambda p: weights.resize_embeddings(old, p, tokenizer.size)[1], mesh, params)
        if not is_abstract(params):
            params = sharding.place(params, sharding.shardings(params, mesh))
    check_vocab(tokenizer, model.vocab_size)
    base, adapters_folder = weights.base_and_adapters(weights.resolve(source.path, source.revision, weights=False))
    if source.merged_path and adapters_folder and not is_abstract(params):
        facts = {"method": "merge", "base_model": str(base), "adapters": str(adapters_folder)}
        weights.export(source.merged_path, model, params, source=base, tokenizer=tokenizer, facts=facts)
    return params


def param_dtype(config: RunConfig, mesh: jax.sharding.Mesh) -> DType:
    """Storage dtype of the parameters that a run loads. auto: float32 if they train, the compute dtype under
    adapters."""
    if config.model.param_dtype != "auto":
        return config.model.param_dtype
    if not config.lora.enabled:
        return "float32"
    return runtime.resolve_dtype(config.model.compute_dtype, sharding.platform(mesh))


@functools.partial(jax.jit, static_argnames=("dtype", "mesh"))
def cast_copy(params: Params, dtype: str, mesh: jax.sharding.Mesh) -> Params:
    """A copy with kernels and embeddings in `dtype`; never an alias, because buffers of what trains are donated.

    Norms and biases keep their dtype: they enter the forward pass unrounded, so a bfloat16 copy of a model that
    computes in bfloat16 gives exactly the same results.
    """

    def cast(keys: Any, x: jax.Array) -> jax.Array:
        return jnp.array(x, dtype if sharding.path_of(keys).endswith(("kernel", "embedding")) else x.dtype, copy=True)

    return sharding.constrain(jax.tree_util.tree_map_with_path(cast, params), mesh)


def fingerprint(rows: Iterable[Any]) -> str:
    """A hash of tokenised rows: equal if and only if a resumed run reads the same data."""
    total = hashlib.sha256()
    for row in rows:
        total.update(repr(row).encode())
    return total.hexdigest()


def check_data(model: ModelConfig, *parts: Sequence[Any]) -> None:
    """Raise ConfigError, in every process of a run on several, if they have read another model or other rows."""
    if distributed.count() > 1:
        rows, digest = sum(map(len, parts)), fingerprint(chain(*parts))
        facts = {"model": str(model), "number of rows": rows, "tokens of the rows (sha256)": digest}
        distributed.require_agreement("data", facts)


def params_fingerprint(params: Any) -> str:
    """A hash of frozen parameters."""
    return hashlib.sha256(repr(sorted(digests(leaves_by_name(params)).items())).encode()).hexdigest()


def few_widths(
    longest_at: Callable[[int], int], steps: int, rows: int, model: ModelConfig, mesh: jax.sharding.Mesh, limit: int
) -> tuple[int, ...]:
    """Widths for the batches of a run, at most `limit`, without those that save less time than their programs take to
    compile. `longest_at(step)` are the tokens of the longest row of a step's batch, of which LOOKED_AT are looked at;
    `rows` is the number of texts that a step trains on."""
    every = -(-steps // LOOKED_AT)
    parameters = sum(x.size for x in jax.tree.leaves(jax.eval_shape(lambda: init(model, jax.random.key(0)))))
    worth = runtime.flops_of_compiling(model.platform) * mesh.size / (6 * parameters * rows)
    return batching.widths(map(longest_at, range(0, steps, every)), limit, worth / every)


def check_context(length: int, model: ModelConfig, what: str, lower: str) -> None:
    """Raise ConfigError if `length` tokens exceed the model's context, or the length that its rotary embeddings are
    fixed for; `what` they are, `lower` the keys to lower."""
    if length > model.max_positions:
        raise ConfigError(
            f"{what} comes to {length} tokens but the model's context is {model.max_positions}; lower {lower}"
        )
    fixed = model.rope and model.rope.length
    if fixed and length > fixed:
        raise ConfigError(
            f"{what} comes to {length} tokens but the rotary embeddings of this run are those for up to {fixed}, as "
            f"its data and options allow no more; lower {lower}, or start the run with such rows in its data"
        )


def fit_response(sampling: Sampling, prompt_length: int, model: ModelConfig) -> Sampling:
    """`sampling` with its response length cut to what the context leaves after the prompt (at least one token)."""
    room = max(model.max_positions - prompt_length, 1)
    return dataclasses.replace(sampling, response_length=min(sampling.response_length, room))


def slow_products(config: RunConfig, model: ModelConfig, platform: str) -> list[str]:
    """A warning if the run multiplies in bfloat16 on a processor without instructions for it."""
    here = runtime.processor()
    if platform != "cpu" or here.multiplies_bfloat16:
        return []
    dtypes = {"model.compute_dtype": model.dtype}
    if isinstance(config, PPOConfig | GRPOConfig | DistillConfig):
        dtypes["rollout.dtype"] = config.rollout.dtype
    slow = [key for key, dtype in dtypes.items() if dtype == "bfloat16"]
    if not slow:
        return []
    return [
        f"warning: {' and '.join(slow)}: this processor ({here}) has no instructions for bfloat16, so its products are "
        "slower than those of float32"
    ]


def describe(config: RunConfig, model: ModelConfig, tokenizer: Tokenizer, report: Any, mesh: jax.sharding.Mesh) -> str:
    """Model, precision, devices, tokenizer and data of a run, one line each."""
    shapes = jax.eval_shape(lambda: init(model, jax.random.key(0)))
    millions = sum(x.size for x in jax.tree.leaves(shapes)) / 1e6
    device = mesh.devices.flat[0]
    new = f" and the rows of {tokenizer.added} new tokens" if tokenizer.added else ""
    base = "the base model" + (f", in {config.lora.quantize}," if config.lora.quantize != "none" else "")
    grid = " x ".join(f"{axis} {size}" for axis, size in mesh.shape.items())
    lines = [
        f"model {config.model.path}: {model.family}, {millions:.1f} M parameters, context {model.max_positions}, "
        f"parameters {param_dtype(config, mesh)}, products {model.dtype}, attention {model.attention}"
    ]
    if model.balances_experts:
        lines.append(
            f"{model.experts_per_token} of {model.num_experts} experts for every token; the loss includes "
            f"{model.router_aux_loss_coef:g} times the router's load-balancing loss"
        )
    if config.lora.enabled:
        lines.append(f"adapters of rank {config.lora.rank}{new} train, {base} is frozen")
    count = jax.device_count() if sharding.is_here(mesh) else mesh.size
    lines.append(f"devices: {grid} of {count} {device.platform} ({device.device_kind})")
    lines += slow_products(config, model, device.platform)
    paths = jax.tree_util.tree_leaves_with_path(shapes)
    whole = {
        note: sharding.path_of(keys)
        for keys, x in paths
        for note in sharding.undivided(sharding.path_of(keys), x.shape, mesh)
    }
    lines += [f"not split over the mesh as much as others: {path}: {note}" for note, path in whole.items()]
    warnings = [f"warning: {text}" for text in getattr(report, "warnings", ())]
    return "\n".join([*lines, *tokenizer.notes, str(report), *warnings])

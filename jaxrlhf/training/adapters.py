"""LoRA adapters of a run: added to a model, their base model quantized, trainable and frozen parameters split."""

import dataclasses
import functools

import jax

from jaxrlhf import lora as lora_params
from jaxrlhf.config import LoRA
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import Adapters, ModelConfig
from jaxrlhf.types import Params
from jaxrlhf.weights import peft


def with_adapters(model: ModelConfig, lora: LoRA, added: tuple[int, ...] = ()) -> ModelConfig:
    """The model with the adapters that `lora` configures, and trainable rows for the `added` token ids. Raises
    ConfigError for matrices and layers that the model does not have."""
    if not lora.enabled:
        return model
    modules = peft.modules(model, lora.target_modules)
    if lora.layers and lora.layers[1] > model.num_layers:
        raise ConfigError(f"lora.layers is {list(lora.layers)}, and the model has {model.num_layers} layers")
    if any(peft.of_experts(module) for module in modules):
        for option, value in (("dropout", lora.dropout), ("use_dora", lora.use_dora)):
            if value:
                raise ConfigError(
                    f"lora.{option} is {value}, and lora.target_modules ({', '.join(lora.target_modules)}) includes "
                    f"the experts of a {model.family}, whose adapters cannot have it, as in PEFT; leave it out, or let "
                    "lora.target_modules name the attention matrices alone, [q_proj, k_proj, v_proj, o_proj]"
                )
    adapters = Adapters(lora.rank, lora.alpha, lora.use_rslora, lora.dropout, lora.layers, added)
    model = dataclasses.replace(model, adapters=adapters)
    if not any(last > first for first, last in (model.adapted_in(module[0]) for module in modules)):
        names = ", ".join(lora.target_modules)
        raise ConfigError(f"lora.layers is {list(model.adapted_layers)}, and none of these layers has {names}")
    return model


def add_adapters(params: Params, model: ModelConfig, lora: LoRA, key: jax.Array) -> Params:
    """The parameters with new adapters, over a quantized base model if `lora.quantize` is set; unchanged without
    adapters."""
    if not lora.enabled:
        return params
    base = quantize(params, lora)
    return {**base, **_init_adapters(base, model, lora, key)}


def quantize(params: Params, lora: LoRA) -> Params:
    """The base model as `lora.quantize` stores it; unchanged if it is quantized already."""
    if lora.quantize == "none" or "codes" in params["layers"]["attention"]["q"]:
        return params
    return jax.jit(lora_params.pack, static_argnames=("bits", "double"))(params, lora.quantize, lora.double_quant)


def split_trainable(params: Params, frozen_trunk: bool) -> tuple[Params, Params]:
    """(trainable, frozen) parameters; laid over each other they are the model. With `frozen_trunk` only adapters and
    the scalar head train, else everything does."""
    if not frozen_trunk:
        return params, {}
    trainable = {k: v for k, v in params.items() if k in ("lora", "score")}
    return trainable, {k: v for k, v in params.items() if k not in trainable}


@functools.partial(jax.jit, static_argnames=("model", "lora"))
def _init_adapters(base: Params, model: ModelConfig, lora: LoRA, key: jax.Array) -> Params:
    return lora_params.init(model, base, peft.modules(model, lora.target_modules), key, magnitudes=lora.use_dora)

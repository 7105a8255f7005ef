"""Low-rank adapters beside a model's frozen parameters (https://arxiv.org/abs/2106.09685).

They are a tree of their own, under "lora" of the parameters: {"layers": {module: {...: {"a" [n, in, r], "b" [n, r, out]
and, for DoRA, "magnitude" [n, out]}}}}, over the n layers that have them. New tokens have {"rows": {"embedding" [k, D]
and, for an untied head, "kernel" [D, k]}} there, which count in place of the model's own. So a base is shared by laying
several such trees beside it, and is its own reference where there is none. `models.forward` runs both as they are;
`merge` makes one of them, for decoding and for models that go out.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import models
from jaxrlhf.models import ModelConfig
from jaxrlhf.models.layers import gain
from jaxrlhf.types import Params

Module = tuple[str, ...]  # ("attention", "q"), within a layer


def init(model: ModelConfig, base: Params, modules: Iterable[Module], key: Array, *, magnitudes: bool) -> Params:
    """{"lora": adapters of `model.adapters` for `modules`}, float32: A uniform with variance 1 / (3 in), as PEFT draws
    it, B zero, so that the model is unchanged; with `magnitudes` (DoRA) those of `base`, and the rows of
    `model.adapters.tokens` as they are there. Runs under jit and eval_shape.
    """
    assert model.adapters is not None
    first, last = model.adapters.layers or (0, model.num_layers)
    rank, tree = model.adapters.rank, {}
    base = unpacked(base)
    modules = sorted(modules)
    for module, module_key in zip(modules, jax.random.split(key, len(modules)), strict=True):
        kernel = _at(base["layers"], module)["kernel"][first:last]
        count, inputs, outputs = kernel.shape
        bound = inputs**-0.5
        adapter = {
            "a": jax.random.uniform(module_key, (count, inputs, rank), minval=-bound, maxval=bound),
            "b": jnp.zeros((count, rank, outputs)),
        }
        if magnitudes:
            adapter["magnitude"] = jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=1))
        _put(tree, module, adapter)
    added = {"layers": tree}
    if tokens := model.adapters.tokens:
        at = jnp.array(tokens)
        added["rows"] = {"embedding": base["embed"]["embedding"][at].astype(jnp.float32)}
        if "lm_head" in base:
            added["rows"]["kernel"] = base["lm_head"]["kernel"][:, at].astype(jnp.float32)
    return {"lora": added}


def merge(params: Params, model: ModelConfig) -> Params:
    """The parameters with their adapters added in, and no "lora"; sums in float32, in the dtype of each kernel. Packed
    kernels become float32."""
    params = unpacked(params)
    if "lora" not in params:
        return params
    assert model.adapters is not None
    first, last = model.adapters.layers or (0, model.num_layers)
    scale = model.adapters.scale

    def whole(layer: Params, adapter: Params) -> Params:
        if "a" not in adapter:
            return {name: whole(value, adapter[name]) if name in adapter else value for name, value in layer.items()}

        def kernel_of(carry: None, parts: tuple[Array, Params]) -> tuple[None, Array]:
            kernel, one = parts
            full = kernel.astype(jnp.float32) + scale * jnp.matmul(one["a"], one["b"], precision="highest")
            if "magnitude" in one:
                full *= gain(kernel, one["a"], one["b"], one["magnitude"], scale)
            return None, full.astype(kernel.dtype)

        # a layer at a time: the products of all layers at once would be a copy of the model in float32
        kernel = layer["kernel"]
        _, made = jax.lax.scan(kernel_of, None, (kernel[first:last], adapter))
        return {**layer, "kernel": made if made.shape == kernel.shape else kernel.at[first:last].set(made)}

    made = {name: value for name, value in params.items() if name != "lora"}
    made["layers"] = whole(params["layers"], params["lora"]["layers"])
    rows, at = params["lora"].get("rows", {}), jnp.array(model.adapters.tokens, jnp.int32)
    if "embedding" in rows:
        made["embed"] = {"embedding": params["embed"]["embedding"].at[at].set(rows["embedding"])}
    if "kernel" in rows and "lm_head" in params:  # a critic on the policy's trunk has none
        made["lm_head"] = {"kernel": params["lm_head"]["kernel"].at[:, at].set(rows["kernel"])}
    return made


def pack(params: Params, bits: models.Bits, double: bool) -> Params:
    """The parameters with the kernels of all layers packed, a layer at a time."""

    def packed(tree: Params) -> Params:
        if "kernel" not in tree:
            return {name: packed(value) if isinstance(value, dict) else value for name, value in tree.items()}
        rest = {name: value for name, value in tree.items() if name != "kernel"}
        return {**jax.lax.map(lambda kernel: models.pack(kernel, bits, double), tree["kernel"]), **rest}

    return {**params, "layers": packed(params["layers"])}


def unpacked(params: Params) -> Params:
    """The parameters with kernels that are float32 where they were packed."""

    def whole(tree: Params) -> Params:
        if "codes" not in tree:
            return {name: whole(value) if isinstance(value, dict) else value for name, value in tree.items()}
        parts = {name: value for name, value in tree.items() if name != "bias"}
        rest = {name: value for name, value in tree.items() if name == "bias"}
        return {"kernel": jax.lax.map(models.unpack, parts), **rest}

    return {**params, "layers": whole(params["layers"])}


def modules_of(tree: Params, inside: Module = ()) -> list[Module]:
    """The modules that a tree of adapters, or of a layer's parameters, has kernels for."""
    if "a" in tree or "kernel" in tree:
        return [inside]
    return [m for name, value in tree.items() if isinstance(value, dict) for m in modules_of(value, (*inside, name))]


def _at(tree: Params, path: Module) -> Params:
    for name in path:
        tree = tree[name]
    return tree


def _put(tree: Params, path: Module, value: Params) -> None:
    for name in path[:-1]:
        tree = tree.setdefault(name, {})
    tree[path[-1]] = value

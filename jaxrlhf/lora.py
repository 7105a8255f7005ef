"""Low-rank adapters on a frozen base model (https://arxiv.org/abs/2106.09685).

Adapters are a tree under "lora" of the parameters: {"layers": {module: {...: {"a" [n, in, r], "b" [n, r, out] and, for
DoRA, "magnitude" [n, out]}}}}, over the n layers that have adapters; "a" [n, E, in, r] and "b" [n, E, r, out] for the E
experts of a mixture. Trained tokens have {"rows": {"embedding" [k, D] and, for an untied head, "kernel" [D, k]}}, used
in place of the base model's rows. Several such trees can share a base model, and the base model without any is the
reference. `models.forward` runs base and adapters unmerged; `merge` adds them up for decoding and export.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
from jax import Array

from jaxrlhf import models
from jaxrlhf.models import ModelConfig
from jaxrlhf.models.layers import dora_gain
from jaxrlhf.types import Params, leaf_at, set_leaf

Module = tuple[str, ...]  # path within a layer: ("attention", "q")


def init(model: ModelConfig, base: Params, modules: Iterable[Module], key: Array, *, magnitudes: bool) -> Params:
    """Fresh adapters {"lora": ...} of `model.adapters` for `modules`, float32, which leave the model unchanged.

    A is uniform with variance 1 / (3 in), as in PEFT, and B is zero. Magnitudes (DoRA, with `magnitudes`) and the rows
    of `model.adapters.tokens` are those of `base`. Runs under jit and eval_shape.
    """
    assert model.adapters is not None
    rank, tree = model.adapters.rank, {}
    base = unpack(base)
    modules = sorted(modules)
    for module, module_key in zip(modules, jax.random.split(key, len(modules)), strict=True):
        first, last = model.adapted_in(module[0])
        if first == last:
            continue
        kernel = leaf_at(base["layers"], module)["kernel"][first:last]
        *lead, inputs, outputs = kernel.shape
        bound = inputs**-0.5
        adapter = {
            "a": jax.random.uniform(module_key, (*lead, inputs, rank), minval=-bound, maxval=bound),
            "b": jnp.zeros((*lead, rank, outputs)),
        }
        if magnitudes:
            assert len(lead) == 1, "DoRA of experts is not implemented"
            adapter["magnitude"] = jnp.sqrt(jnp.sum(jnp.square(kernel.astype(jnp.float32)), axis=1))
        set_leaf(tree, module, adapter)
    adapters = {"layers": tree}
    if tokens := model.adapters.tokens:
        ids = jnp.array(tokens)
        adapters["rows"] = {"embedding": base["embed"]["embedding"][ids].astype(jnp.float32)}
        if "lm_head" in base:
            adapters["rows"]["kernel"] = base["lm_head"]["kernel"][:, ids].astype(jnp.float32)
    return {"lora": adapters}


def merge(params: Params, model: ModelConfig) -> Params:
    """Add the adapters to the kernels, in float32, and remove "lora".

    Kernels keep their dtype, except that packed kernels become float32.
    """
    params = unpack(params)
    if "lora" not in params:
        return params
    assert model.adapters is not None
    scale = model.adapters.scale

    def merge_module(layer: Params, adapter: Params, first: int, last: int) -> Params:
        if "a" not in adapter:
            return {k: merge_module(v, adapter[k], first, last) if k in adapter else v for k, v in layer.items()}

        def merge_kernel(carry: None, inputs: tuple[Array, Params]) -> tuple[None, Array]:
            kernel, adapter = inputs
            merged = kernel.astype(jnp.float32) + scale * jnp.matmul(adapter["a"], adapter["b"], precision="highest")
            if "magnitude" in adapter:
                merged *= dora_gain(kernel, adapter["a"], adapter["b"], adapter["magnitude"], scale)
            return None, merged.astype(kernel.dtype)

        # one layer at a time: the products of all layers at once would be a copy of the model in float32
        kernel = layer["kernel"]
        _, merged = jax.lax.scan(merge_kernel, None, (kernel[first:last], adapter))
        return {**layer, "kernel": merged if merged.shape == kernel.shape else kernel.at[first:last].set(merged)}

    merged = {name: value for name, value in params.items() if name != "lora"}
    adapters = params["lora"]["layers"]
    merged["layers"] = {
        name: merge_module(module, adapters[name], *model.adapted_in(name)) if name in adapters else module
        for name, module in params["layers"].items()
    }
    rows, tokens = params["lora"].get("rows", {}), jnp.array(model.adapters.tokens, jnp.int32)
    if "embedding" in rows:
        merged["embed"] = {"embedding": params["embed"]["embedding"].at[tokens].set(rows["embedding"])}
    if "kernel" in rows and "lm_head" in params:  # not in a critic on the policy's trunk
        merged["lm_head"] = {"kernel": params["lm_head"]["kernel"].at[:, tokens].set(rows["kernel"])}
    return merged


def pack(params: Params, bits: models.Bits, double: bool) -> Params:
    """Pack the kernels of all layers, one layer at a time; see models.pack."""

    def pack_module(tree: Params) -> Params:
        if "kernel" not in tree:
            # a router is small, and its rounding would change the choice of experts
            return {k: pack_module(v) if isinstance(v, dict) and k != "router" else v for k, v in tree.items()}
        rest = {k: v for k, v in tree.items() if k != "kernel"}
        return {**jax.lax.map(lambda kernel: models.pack(kernel, bits, double), tree["kernel"]), **rest}

    return {**params, "layers": pack_module(params["layers"])}


def unpack(params: Params) -> Params:
    """Replace packed kernels by float32 kernels; others stay."""

    def unpack_module(tree: Params) -> Params:
        if "codes" not in tree:
            return {k: unpack_module(v) if isinstance(v, dict) else v for k, v in tree.items()}
        packed = {k: v for k, v in tree.items() if k != "bias"}
        bias = {k: v for k, v in tree.items() if k == "bias"}
        return {"kernel": jax.lax.map(models.unpack, packed), **bias}

    return {**params, "layers": unpack_module(params["layers"])}


def modules_of(tree: Params, prefix: Module = ()) -> list[Module]:
    """Paths of the modules with adapters, in a tree of adapters, or with kernels, in the parameters of a layer."""
    if "a" in tree or "kernel" in tree:
        return [prefix]
    return [m for name, value in tree.items() if isinstance(value, dict) for m in modules_of(value, (*prefix, name))]

"""Mixture of experts: a router that picks a few of many gated MLPs for every token (Shazeer et al. 2017).

Every token gets its experts, whatever the other tokens get: there is no capacity beyond which tokens are dropped, so a
token's result does not depend on padding or on its batch. Tokens are sorted by expert, and those of each expert are
filled up to whole blocks; a block is multiplied by the weights of one expert. The shapes do not depend on what the
router decides, and the work is that of the chosen experts and of less than one block more for each expert.
"""

from functools import partial
from typing import cast

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Bool, Float, Int

from jaxrlhf.models.activations import ACTIVATIONS
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.packed import unpack
from jaxrlhf.models.placement import row_axes
from jaxrlhf.models.product import int8_product, product
from jaxrlhf.types import Params

LARGEST_BLOCK = 256  # rows


class Experts(nn.Module):
    """Router and gated MLPs in place of `Mlp`, with kernels [E, in, out].

    With variables in the collection "lora", each expert's x W becomes x W + scale x A B, with A [E, in, r] and B
    [E, r, out]. The kernels of the experts then have no gradient: they are frozen.
    """

    model: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        m, width = self.model, x.shape[-1]
        router = _Kernel((width, m.num_experts), name="router")()
        if "a" in router:
            delta = m.adapter_scale * jnp.matmul(router["a"], router["b"], precision="highest")
            router = {"kernel": router["kernel"].astype(jnp.float32) + delta}
        # the input is not rounded, as that could change the choice of experts; the weight is, as in an inference copy
        router = router["kernel"].astype(m.dtype).astype(jnp.float32)
        probabilities = jax.nn.softmax(product("btd,de->bte", x, router, "float32"), axis=-1)
        shares, chosen = jax.lax.top_k(probabilities, m.experts_per_token)
        self.sow("intermediates", "routing", (probabilities, chosen))
        if m.normalise_expert_shares:
            shares = shares / jnp.sum(shares, axis=-1, keepdims=True)
        inward, outward = (m.num_experts, width, m.mlp_size), (m.num_experts, m.mlp_size, width)
        int8 = m.kernels == "int8"
        weights = {name: _Kernel(inward, int8, name=name)() for name in ("gate", "up")}
        weights["down"] = _Kernel(outward, int8, name="down")()
        return _mixed_on_mesh(m, x, shares, chosen, weights)


def router_sums(
    probabilities: Float[Array, "B T E"], chosen: Int[Array, "B T k"], mask: Bool[Array, "B T"]
) -> Float[Array, "2 E"]:
    """For each expert, the number of choices and the sum of its probabilities over the tokens of `mask`."""
    experts = jnp.arange(probabilities.shape[-1])
    choices = jnp.sum((chosen[..., None] == experts) & mask[..., None, None], axis=(0, 1, 2), dtype=jnp.float32)
    return jnp.stack([choices, jnp.sum(jnp.where(mask[..., None], probabilities, 0), axis=(0, 1))])


class _Kernel(nn.Module):
    """Kernels [..., in, out], packed (packed.py) or not, or their int8 form [..., out, in] with a scale per output;
    "a" and "b" of their adapters, if there are any."""

    shape: tuple[int, ...]
    int8: bool = False

    @nn.compact
    def __call__(self) -> Params:
        adapters = dict(self.variables.get("lora", {}))
        if self.has_variable("params", "codes"):
            return {**self.variables["params"], **adapters}
        if not self.int8:
            return {"kernel": self.param("kernel", nn.initializers.normal(0.02), self.shape), **adapters}
        *lead, inputs, outputs = self.shape
        kernel = self.param("kernel", nn.initializers.zeros, (*lead, outputs, inputs), jnp.int8)
        return {"kernel": kernel, "scale": self.param("scale", nn.initializers.ones, (*lead, outputs))}


def _mixed_on_mesh(m: ModelConfig, x: Array, shares: Array, chosen: Array, weights: Params) -> Array:
    """`_mixed`, on the mesh of the model: each device sorts its own rows, and has a share of every expert's width."""
    mixed = partial(_mixed, activation=m.activation, dtype=m.dtype, adapter_scale=m.adapter_scale)
    if m.mesh is None or m.mesh.size == 1:
        return mixed(x, shares, chosen, weights)
    sizes, rows = m.mesh.shape, row_axes(m.mesh)
    split = len(x) % (m.mesh.size // sizes["tensor"]) == 0
    by_row = P(rows if split else None)
    packed = "codes" in weights["gate"]  # blocks of inputs share a scale, and a share of the width may cut them
    width = "tensor" if m.mlp_size % sizes["tensor"] == 0 and not packed else None
    first, last, turned = P(None, width), P(None, None, width), m.kernels == "int8"
    outputs_split = {"kernel": first if turned else last, "scale": first, "b": last}
    inputs_split = {"kernel": last if turned else first, "a": first}
    specs = {
        name: {leaf: (inputs_split if name == "down" else outputs_split).get(leaf, P()) for leaf in weight}
        for name, weight in weights.items()
    }

    def local(x: Array, shares: Array, chosen: Array, weights: Params) -> Array:
        y = mixed(x, shares, chosen, weights)
        return y if width is None else jax.lax.psum(y, width)

    on_mesh = jax.shard_map(
        local, mesh=m.mesh, in_specs=(by_row, by_row, by_row, specs), out_specs=by_row, check_vma=False
    )
    return on_mesh(x, shares, chosen, weights)


def _mixed(
    x: Float[Array, "B T D"],
    shares: Float[Array, "B T k"],
    chosen: Int[Array, "B T k"],
    weights: Params,
    *,
    activation: str,
    dtype: str,
    adapter_scale: float,
) -> Float[Array, "B T D"]:
    """Sum of the outputs of every token's chosen experts, times their shares."""
    experts, k, width = len(jax.tree.leaves(weights)[0]), chosen.shape[-1], x.shape[-1]
    expert = chosen.reshape(-1)  # of every choice of every token
    block, blocks = block_shape(len(expert) // k, k, experts)
    counts = jnp.bincount(expert, length=experts)
    in_blocks = -(-counts // block) * block
    ends = jnp.cumsum(in_blocks)
    order = jnp.argsort(expert, stable=True)
    ordered = expert[order]
    rank = jnp.arange(len(expert)) - (jnp.cumsum(counts) - counts)[ordered]
    row = jnp.zeros_like(expert).at[order].set((ends - in_blocks)[ordered] + rank, unique_indices=True)
    # by rows that are all different, so that the gradients are no sums in an order that is not fixed
    repeated = jnp.repeat(x.reshape(-1, width), k, axis=0)
    filled = jnp.zeros((blocks * block, width), x.dtype).at[row].set(repeated, unique_indices=True)
    expert_of_block = jnp.searchsorted(ends, jnp.arange(blocks) * block, side="right").clip(max=experts - 1)
    filled = filled.reshape(blocks, block, width)
    y = cast(Array, _blocks(filled, expert_of_block, *_by_training(weights), activation, dtype, adapter_scale))
    y = y.reshape(-1, width).at[row].get(unique_indices=True, mode="promise_in_bounds")
    return jnp.sum(y.reshape(*chosen.shape, width) * shares[..., None], axis=-2)


def block_shape(tokens: int, k: int, experts: int) -> tuple[int, int]:
    """(rows of a block, number of blocks) that hold every choice, whatever the router decides."""
    mean = max(tokens * k // experts, 1)
    block = min(_power_of_two(max(8, mean)), _power_of_two(tokens), LARGEST_BLOCK)
    used = min(experts, tokens * k)  # at most; each has at most one block that is not full, and no token twice
    return block, min((tokens * k + used * (block - 1)) // block, used * -(-tokens // block))


def _power_of_two(least: int) -> int:
    return 1 << (least - 1).bit_length()


def _by_training(weights: Params) -> tuple[Params, Params]:
    """(frozen, trained) parts of the weights: under adapters only those train, and kernels in fewer bits never do."""
    adapters = {name: {leaf: weight[leaf] for leaf in "ab"} for name, weight in weights.items() if "a" in weight}
    rest = {name: {leaf: w for leaf, w in weight.items() if leaf not in ("a", "b")} for name, weight in weights.items()}
    return (rest, adapters) if adapters or set(rest["gate"]) != {"kernel"} else ({}, rest)


def _expert(
    x: Float[Array, "b D"], frozen: Params, trained: Params, activation: str, dtype: str, adapter_scale: float
) -> Float[Array, "b D"]:
    """One gated MLP."""

    def times(x: Array, name: str) -> Array:
        weight, adapter = frozen.get(name) or trained[name], trained.get(name, {})
        if "kernel" in weight and "scale" in weight:
            return int8_product(x, weight["kernel"], weight["scale"])
        y = product("bi,io->bo", x, unpack(weight) if "codes" in weight else weight["kernel"], dtype)
        if "a" in adapter:
            low = product("bi,ir->br", x, adapter["a"], dtype)
            y = y + adapter_scale * product("br,ro->bo", low, adapter["b"], dtype)
        return y

    return times(ACTIVATIONS[activation](times(x, "gate")) * times(x, "up"), "down")


@partial(jax.custom_vjp, nondiff_argnums=(4, 5, 6))
def _blocks(
    x: Float[Array, "blocks b D"],
    expert: Int[Array, " blocks"],
    frozen: Params,
    trained: Params,
    activation: str,
    dtype: str,
    adapter_scale: float,
) -> Float[Array, "blocks b D"]:
    """Each block through its expert; without a gradient for what is frozen."""
    frozen, trained = _rounded(frozen, dtype), _rounded(trained, dtype)

    def step(carry: None, block: tuple[Array, Array]) -> tuple[None, Array]:
        x, expert = block
        return None, _expert(x, _of(expert, frozen), _of(expert, trained), activation, dtype, adapter_scale)

    return jax.lax.scan(step, None, (x, expert))[1]


def _blocks_forward(x, expert, frozen, trained, *static):
    return _blocks(x, expert, frozen, trained, *static), (x, expert, frozen, trained)


def _blocks_backward(activation, dtype, adapter_scale, residuals, cotangent):
    # By jax's own rule, every block would add a gradient of all experts, nearly all of it zero.
    x, expert, frozen, trained = residuals
    frozen, rounded = _rounded(frozen, dtype), _rounded(trained, dtype)

    def step(sums, block):
        x, expert, cotangent = block
        fixed = _of(expert, frozen)
        # in float32, as the gradient of a weight would be rounded to the dtype of the weight
        of_expert = jax.tree.map(lambda w: w.astype(jnp.float32), _of(expert, rounded))
        _, pull = jax.vjp(lambda x, own: _expert(x, fixed, own, activation, dtype, adapter_scale), x, of_expert)
        grad_x, grads = pull(cotangent)
        return jax.tree.map(lambda total, grad: total.at[expert].add(grad), sums, grads), grad_x

    zeros = jax.tree.map(lambda w: jnp.zeros(w.shape, jnp.float32), trained)
    sums, grad_x = jax.lax.scan(step, zeros, (x, expert, cotangent))
    return grad_x, None, None, jax.tree.map(lambda total, w: total.astype(w.dtype), sums, trained)


_blocks.defvjp(_blocks_forward, _blocks_backward)


def _rounded(weights: Params, dtype: str) -> Params:
    """Kernels and adapters in the dtype of products, so that a block does not convert them again; but int8 and packed
    ones."""
    return {name: w if "scale" in w else jax.tree.map(lambda x: x.astype(dtype), w) for name, w in weights.items()}


def _of(expert: Array, weights: Params) -> Params:
    return jax.tree.map(lambda w: jax.lax.dynamic_index_in_dim(w, expert, keepdims=False), weights)

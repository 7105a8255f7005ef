"""The parts of a decoder layer, and the one definition of the layer itself.

Operands of every matrix product are in `model.dtype` and accumulate in float32; the residual stream, norms, rotary
angles and the attention softmax are float32.
"""

import math
import zlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Int8, Key, Shaped

from jaxrlhf.models.attention import attend, cudnn_attend, fits_cudnn
from jaxrlhf.models.config import ModelConfig, Rope
from jaxrlhf.models.packed import packed_product, unpack
from jaxrlhf.models.product import product

ACTIVATIONS = {
    "silu": jax.nn.silu,
    "gelu": partial(jax.nn.gelu, approximate=False),
    "gelu_tanh": partial(jax.nn.gelu, approximate=True),
    "relu": jax.nn.relu,
}

NORMAL = nn.initializers.normal(0.02)


def along_last(vector: Float[Array, "D"], like: Shaped[Array, "*lead D"]) -> Float[Array, "*ones D"]:
    """A vector with axes of size 1 put before it, to combine with the last axis of `like`."""
    return vector.reshape((1,) * (like.ndim - 1) + vector.shape)


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Angle per position of each of the head_dim / 2 planes (float32 [H/2]), and the factor on cos and sin.

    Su et al. 2021, eq. 15, theta^(-2i/H), stretched: `linear` divides all by `factor` (Chen et al. 2023); `llama3`
    leaves wavelengths below original/high_freq_factor, divides those above original/low_freq_factor, and blends in
    between; `yarn` blends by the number of turns over the original length and scales attention (Peng et al. 2023,
    eq. 17-23, where the temperature appears as a factor on q and k).
    """
    frequencies = rope.theta ** (-np.arange(0, head_dim, 2) / head_dim)
    scale = 1.0
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_positions * frequencies / (2 * math.pi)
        keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        frequencies = frequencies * (keep + (1 - keep) / rope.factor)
    elif rope.kind == "yarn":
        keep = _yarn_keep(rope, head_dim)
        frequencies = frequencies * (keep + (1 - keep) / rope.factor)
        scale = _yarn_attention_factor(rope)
    return frequencies.astype(np.float32), scale


def _yarn_keep(rope: Rope, head_dim: int) -> np.ndarray:
    """How much of each frequency YaRN keeps: 1 for planes that turn often, 0 for those that turn less than once."""

    def plane(turns: float) -> float:
        return head_dim * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = plane(rope.beta_fast), plane(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, head_dim - 1)
    if low == high:
        high += 0.001
    return 1 - np.clip((np.arange(head_dim // 2) - low) / (high - low), 0, 1)


def _yarn_attention_factor(rope: Rope) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


Rotation = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]


def rotation(model: ModelConfig, positions: Int[Array, "B T"]) -> Rotation | None:
    """Cosine and sine of every rotary angle, the same for all layers; None for a model without rotary embeddings."""
    if model.rope is None:
        return None
    frequencies, scale = rope_frequencies(model.rope, model.head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Float[Array, "B T heads H"], by: Rotation | None) -> Float[Array, "B T heads H"]:
    """Turns plane i, made of components i and i + H/2, by its angle."""
    if by is None:
        return x
    cos, sin = by
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def int8_product(
    x: Float[Array, "*lead I"], kernel: Int8[Array, "O I"], scale: Float[Array, " O"]
) -> Float[Array, "*lead O"]:
    """x W, with W's columns as rows of int8 and a scale for each, and each x rounded to 8 bits by its largest entry.

    Both operands are whole numbers of 8 bits, since converting the weights at every use would cost more than they save.
    Not differentiable.
    """
    step = jnp.maximum(jnp.max(jnp.abs(x), axis=-1, keepdims=True), 1e-30) / 127
    rounded = jnp.round(x / step).astype(jnp.int8)
    whole = jax.lax.dot_general(rounded, kernel, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=jnp.int32)
    return whole.astype(jnp.float32) * step * along_last(scale, whole)


def dropped(x: Float[Array, "B T I"], keys: Key[Array, " B"], rate: float, site: str) -> Float[Array, "B T I"]:
    """Inverted dropout with a key for each row, so that what a row loses does not depend on the rows beside it.
    `site` tells the places of a layer apart."""
    here = zlib.crc32(site.encode())
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, here), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0)


class Dense(nn.Module):
    """x W (+ b), with W [in, out]; with int8 kernels see `int8_product`, with those of a packed model packed.py.

    With variables of its own in the collection "lora": x W + scale x A B, of which A sees x with dropout if there are
    `keys`; with a magnitude m, every output of that times m / |W + scale A B| (DoRA, https://arxiv.org/abs/2402.09353,
    eq. 5, the norm a constant to the gradient as in section 4.3).
    """

    features: int
    bias: bool
    model: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"], keys: Key[Array, " B"] | None = None) -> Float[Array, "B T O"]:
        if self.model.kernels == "int8":
            kernel = self.param("kernel", nn.initializers.zeros, (self.features, x.shape[-1]), jnp.int8)
            y = int8_product(x, kernel, self.param("scale", nn.initializers.ones, (self.features,)))
        elif self.has_variable("params", "codes"):
            packed = {k: v for k, v in self.variables["params"].items() if k != "bias"}
            y = packed_product(x, packed, self.model.dtype)
            if self.has_variable("lora", "a"):
                y = self._adapted(x, y, lambda: unpack(packed), keys)
        else:
            kernel = self.param("kernel", NORMAL, (x.shape[-1], self.features))
            y = product("bti,io->bto", x, kernel, self.model.dtype)
            if self.has_variable("lora", "a"):
                y = self._adapted(x, y, lambda: kernel, keys)
        if self.bias:
            y = y + along_last(self.param("bias", nn.initializers.zeros, (self.features,)), y)
        return y

    def _adapted(self, x: Array, y: Array, kernel: Callable[[], Array], keys: Array | None) -> Array:
        a, b = (self.get_variable("lora", name) for name in "ab")
        adapters = self.model.adapters
        assert adapters is not None
        if keys is not None and adapters.dropout:
            x = dropped(x, keys, adapters.dropout, "/".join(self.path))
        low = product("btr,ro->bto", product("bti,ir->btr", x, a, self.model.dtype), b, self.model.dtype)
        y = y + adapters.scale * low
        if self.has_variable("lora", "magnitude"):
            y = y * along_last(gain(kernel(), a, b, self.get_variable("lora", "magnitude"), adapters.scale), y)
        return y


def gain(
    kernel: Float[Array, "I O"],
    a: Float[Array, "I R"],
    b: Float[Array, "R O"],
    magnitude: Float[Array, " O"],
    scale: float,
) -> Float[Array, " O"]:
    """m / |W + scale A B| for each output; 1 where m is 0, which is how a layer without a magnitude says so.

    |w + scale A b|^2 = |w|^2 + 2 scale (A' w) b + scale^2 b' (A' A) b: nothing of W's size is made for it.
    """
    kernel, a, b = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (kernel, a, b))
    cross = jnp.einsum("ir,io->ro", a, kernel)
    square = jnp.sum(kernel * kernel, axis=0) + scale * jnp.sum(b * (2 * cross + scale * (a.T @ a @ b)), axis=0)
    return jnp.where(magnitude == 0, 1.0, magnitude * jax.lax.rsqrt(jnp.maximum(square, 1e-30)))


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last axis, in float32."""

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        width = x.shape[-1:]
        scale = along_last(self.param("scale", nn.initializers.ones, width), x)
        if self.kind == "rmsnorm":
            return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * scale
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale + along_last(self.param("bias", nn.initializers.zeros, width), x)


class Attention(nn.Module):
    """Causal self-attention. With a cache, new keys and values go to slots `slot` .. `slot` + T - 1 of it."""

    model: ModelConfig

    @nn.compact
    def __call__(self, x, rotation, mask, scale, cache, slot, keys):
        m = self.model
        heads = {"q": m.num_heads, "k": m.num_kv_heads, "v": m.num_kv_heads}
        q, k, v = (
            Dense(count * m.head_dim, m.qkv_bias, m, name=name)(x, keys).reshape(*x.shape[:2], count, m.head_dim)
            for name, count in heads.items()
        )
        if m.qk_norm:
            q, k = Norm("rmsnorm", m.norm_eps, name="q_norm")(q), Norm("rmsnorm", m.norm_eps, name="k_norm")(k)
        q, k = rotate(q, rotation) * scale, rotate(k, rotation)
        # rounded here, so that training sees the very keys and values that a cache would hold
        k, v = (heads.astype(m.dtype).swapaxes(1, 2) for heads in (k, v))
        if cache is not None:
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k.astype(cache[0].dtype), slot, axis=2)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), slot, axis=2)
            cache = k, v
        read = cudnn_attend if m.attention == "cudnn" and cache is None and fits_cudnn(q) else attend
        y = read(q, k, v, mask, m.dtype).reshape(*x.shape[:2], -1)
        return Dense(x.shape[-1], m.attention_out_bias, m, name="o")(y, keys), cache


class Mlp(nn.Module):
    """Gated (Shazeer 2020) or plain feed-forward part."""

    model: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], keys: Key[Array, " B"] | None) -> Float[Array, "B T D"]:
        m = self.model
        activation = ACTIVATIONS[m.activation]
        up = Dense(m.mlp_size, m.mlp_bias, m, name="up")(x, keys)
        inner = (
            activation(Dense(m.mlp_size, m.mlp_bias, m, name="gate")(x, keys)) * up if m.gated_mlp else activation(up)
        )
        return Dense(x.shape[-1], m.mlp_bias, m, name="down")(inner, keys)


Cached = tuple[Float[Array, "B K S H"], Float[Array, "B K S H"]] | None


class Block(nn.Module):
    """One pre-norm decoder layer, for training, scoring and decoding alike."""

    model: ModelConfig

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation | None,
        mask: Bool[Array, "B T S"],
        scale: Float[Array, ""],
        cache: Cached = None,
        slot: Int[Array, ""] | int = 0,
        keys: Key[Array, " B"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cached]:
        """Hidden states [B, T, D] and the cache with the new keys and values in it (None without a cache). `keys` are
        for the dropout of adapters."""
        norm = partial(Norm, self.model.norm, self.model.norm_eps)
        y, cache = Attention(self.model, name="attention")(
            norm(name="attention_norm")(x), rotation, mask, scale, cache, slot, keys
        )
        x = x + y
        return x + Mlp(self.model, name="mlp")(norm(name="mlp_norm")(x), keys), cache

"""The decoder layer (`Block`) and its modules.

Operands of every matrix product are in `model.dtype` and accumulate in float32; the residual stream, norms, rotary
angles and the attention softmax are float32.
"""

import zlib
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from jaxtyping import Array, Bool, Float, Int, Key

from jaxrlhf.models import delta
from jaxrlhf.models.activations import ACTIVATIONS
from jaxrlhf.models.attention import attend, cudnn_attend, fits_cudnn
from jaxrlhf.models.config import ModelConfig
from jaxrlhf.models.experts import Experts
from jaxrlhf.models.packed import packed_product, unpack
from jaxrlhf.models.placement import place
from jaxrlhf.models.product import along_last, int8_product, left_product, product
from jaxrlhf.models.rope import Rotation, rotate, rotate_queries
from jaxrlhf.types import turned

NORMAL = nn.initializers.normal(0.02)


def dropout(x: Float[Array, "B T I"], keys: Key[Array, " B"], rate: float, site: str) -> Float[Array, "B T I"]:
    """Inverted dropout with a key per row, so that the mask of a row does not depend on the other rows.

    `site` names the module within the layer: each has its own mask.
    """
    site_hash = zlib.crc32(site.encode())
    kept = jax.vmap(lambda key: jax.random.bernoulli(jax.random.fold_in(key, site_hash), 1 - rate, x.shape[1:]))(keys)
    return jnp.where(kept, x / (1 - rate), 0)


class Dense(nn.Module):
    """x W (+ b), with W [in, out]; int8 kernels use `int8_product`, left ones `left_product`, packed ones packed.py.

    With variables in the collection "lora": x W + scale x A B, where the x of A has dropout if `keys` are given; with a
    magnitude m, each output is multiplied by m / |W + scale A B| (DoRA, https://arxiv.org/abs/2402.09353, eq. 5, no
    gradient through the norm as in section 4.3).
    """

    features: int
    bias: bool
    model: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T I"], keys: Key[Array, " B"] | None = None) -> Float[Array, "B T O"]:
        if self.model.kernels == "int8":
            kernel = self.param("kernel", nn.initializers.zeros, (self.features, x.shape[-1]), jnp.int8)
            y = int8_product(x, kernel, self.param("scale", nn.initializers.ones, (self.features,)))
        elif self.model.kernels == "left":
            kernel = self.param("kernel", NORMAL, (self.features, x.shape[-1]))
            y = left_product(x, kernel, self.model.dtype)
        elif self.has_variable("params", "codes"):
            packed = {k: v for k, v in self.variables["params"].items() if k != "bias"}
            y = packed_product(x, packed, self.model.dtype, self.model.mesh)
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
            x = dropout(x, keys, adapters.dropout, "/".join(self.path))
        low = product("btr,ro->bto", product("bti,ir->btr", x, a, self.model.dtype), b, self.model.dtype)
        y = y + adapters.scale * low
        if self.has_variable("lora", "magnitude"):
            y = y * along_last(dora_gain(kernel(), a, b, self.get_variable("lora", "magnitude"), adapters.scale), y)
        return y


def dora_gain(
    kernel: Float[Array, "I O"],
    a: Float[Array, "I R"],
    b: Float[Array, "R O"],
    magnitude: Float[Array, " O"],
    scale: float,
) -> Float[Array, " O"]:
    """m / |W + scale A B| of each output; 1 where m is NaN, as in layers without a magnitude.

    |w + scale A b|^2 = |w|^2 + 2 scale (A' w) b + scale^2 b' (A' A) b, which needs no second array of W's size.
    """
    kernel, a, b = (jax.lax.stop_gradient(x).astype(jnp.float32) for x in (kernel, a, b))
    cross = jnp.einsum("ir,io->ro", a, kernel)
    square = jnp.sum(kernel * kernel, axis=0) + scale * jnp.sum(b * (2 * cross + scale * (a.T @ a @ b)), axis=0)
    return jnp.where(jnp.isnan(magnitude), 1.0, magnitude * jax.lax.rsqrt(jnp.maximum(square, 1e-30)))


class Norm(nn.Module):
    """RMSNorm (Zhang & Sennrich 2019) or LayerNorm (Ba et al. 2016) over the last axis, in float32.

    "rmsnorm_1p" multiplies by 1 + scale in place of scale, which starts at 0.
    """

    kind: str
    eps: float

    @nn.compact
    def __call__(self, x: Float[Array, "*lead D"]) -> Float[Array, "*lead D"]:
        width = x.shape[-1:]
        plus_one = self.kind == "rmsnorm_1p"
        scale = along_last(self.param("scale", nn.initializers.zeros if plus_one else nn.initializers.ones, width), x)
        scale = 1 + scale.astype(jnp.float32) if plus_one else scale  # a sum in bfloat16 would lose most of it
        if self.kind != "layernorm":
            return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps) * scale
        x = x - jnp.mean(x, axis=-1, keepdims=True)
        x = x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + self.eps)
        return x * scale + along_last(self.param("bias", nn.initializers.zeros, width), x)


class Attention(nn.Module):
    """Causal self-attention. With a cache, new keys and values are written to slots `slot` .. `slot` + T - 1, of layer
    `layer` if the cache is stacked."""

    model: ModelConfig

    @nn.compact
    def __call__(self, x, rotation, mask, scale, cache, slot, keys, layer):
        m = self.model
        heads = {"q": m.num_heads, "k": m.num_kv_heads, "v": m.num_kv_heads}
        widths = {"q": 2 * m.head_dim if m.attention_gate else m.head_dim, "k": m.head_dim, "v": m.head_dim}
        q, k, v = (
            Dense(count * widths[name], m.qkv_bias, m, name=name)(x, keys).reshape(*x.shape[:2], count, widths[name])
            for name, count in heads.items()
        )
        gate = None
        if m.attention_gate:
            q, gate = jnp.split(q, 2, axis=-1)
        if m.qk_norm:
            q, k = self._normalised(q, "q_norm"), self._normalised(k, "k_norm")
        q, k = rotate_queries(q, rotation) * scale, rotate(k, rotation)
        # rounded here, so that training uses exactly the keys and values that a cache would hold
        k, v = (heads.astype(m.dtype).swapaxes(1, 2) for heads in (k, v))
        if cache is None:  # with one, the layout of its parameters decides
            q = place(q, m, "rows", None, "tensor", None)
            k, v = (place(heads, m, "rows", "tensor", None, None) for heads in (k, v))
        elif layer is None:
            k = k.swapaxes(2, m.key_columns).astype(cache[0].dtype)
            k = jax.lax.dynamic_update_slice_in_dim(cache[0], k, slot, axis=m.key_columns)
            v = jax.lax.dynamic_update_slice_in_dim(cache[1], v.astype(cache[1].dtype), slot, axis=2)
            cache = k, v
        else:
            start = layer, slot, 0, 0, 0
            all_k = jax.lax.dynamic_update_slice(cache[0], turned(k)[None].astype(cache[0].dtype), start)
            all_v = jax.lax.dynamic_update_slice(cache[1], turned(v)[None].astype(cache[1].dtype), start)
            cache = all_k, all_v
            k, v = (turned(jax.lax.dynamic_index_in_dim(x, layer, keepdims=False)) for x in cache)
        fused = m.attention == "cudnn" and cache is None and m.attention_softcap is None and fits_cudnn(q)
        columns_last = cache is not None and m.key_columns == 3
        plain = partial(attend, softcap=m.attention_softcap, columns_last=columns_last)
        attention = partial(cudnn_attend, mesh=m.mesh) if fused else plain
        y = attention(q, k, v, mask, m.dtype)
        if cache is None:
            y = place(y, m, "rows", None, "tensor", None)
        y = y.reshape(*x.shape[:2], -1)
        if gate is not None:
            y = y * jax.nn.sigmoid(gate.reshape(y.shape))
        return Dense(x.shape[-1], m.attention_out_bias, m, name="o")(y, keys), cache

    def _normalised(self, heads: Float[Array, "B T N H"], name: str) -> Float[Array, "B T N H"]:
        m = self.model
        x = heads.reshape(*heads.shape[:2], -1) if m.qk_norm_over == "all_heads" else heads
        return Norm("rmsnorm" if m.norm == "layernorm" else m.norm, m.norm_eps, name=name)(x).reshape(heads.shape)


class GatedDeltaNet(nn.Module):
    """The gated delta rule on queries, keys and values that a short convolution has mixed (delta.py)."""

    model: ModelConfig

    @nn.compact
    def __call__(self, x, tokens: delta.Tokens, cache: delta.DeltaState | None, keys):
        m, net = self.model, self.model.delta
        assert net is not None
        rows, length = x.shape[:2]
        if cache is None:
            window = jnp.zeros((rows, net.conv_width - 1, net.channels))
            cache = window, jnp.zeros((rows, net.value_heads, net.key_size, net.value_size))
        window, state = cache
        qkv = Dense(net.channels, False, m, name="qkv")(x, keys)
        mixed, window = delta.convolve(qkv, Taps(net.channels, net.conv_width, name="conv")(), tokens, window)
        keys_width = net.key_heads * net.key_size
        q, k, v = jnp.split(ACTIVATIONS[m.activation](mixed), (keys_width, 2 * keys_width), axis=-1)
        q, k = (delta.unit(each.reshape(rows, length, net.key_heads, -1)) for each in (q, k))
        q, k = (jnp.repeat(each, net.value_heads // net.key_heads, axis=2) for each in (q * net.key_size**-0.5, k))
        a, b = (Dense(net.value_heads, False, m, name=name)(x, keys) for name in ("decay", "beta"))
        rate = jnp.exp(self.param("log_rate", log_uniform, (net.value_heads,)).astype(jnp.float32))
        a = a + along_last(self.param("step_bias", nn.initializers.ones, (net.value_heads,)), a)
        real = tokens.real[..., None]
        log_a = jnp.where(real, -along_last(rate, a) * jax.nn.softplus(a), 0)
        v = v.reshape(rows, length, net.value_heads, -1)
        inputs = delta.Inputs(q, k, v, log_a, jnp.where(real, jax.nn.sigmoid(b), 0))
        inputs = delta.Inputs(*(place(each, m, "rows", None, "tensor", *[None] * (each.ndim - 3)) for each in inputs))
        y, state = delta.step(inputs, state) if length == 1 else delta.chunked(inputs, tokens.segments, state)
        z = Dense(net.value_heads * net.value_size, False, m, name="z")(x, keys).reshape(y.shape)
        y = Norm("rmsnorm", m.norm_eps, name="norm")(y) * jax.nn.silu(z)
        return Dense(x.shape[-1], False, m, name="o")(y.reshape(rows, length, -1), keys), (window, state)


class Taps(nn.Module):
    """The taps [C, 1, width] of a convolution of each channel."""

    channels: int
    width: int

    @nn.compact
    def __call__(self) -> Float[Array, "C 1 W1"]:
        return self.param("taps", NORMAL, (self.channels, 1, self.width)).astype(jnp.float32)


def log_uniform(key: Array, shape: tuple[int, ...]) -> Float[Array, " N"]:
    """Logarithms of numbers from 0.01 to 16, as transformers draws decay rates."""
    return jnp.log(jax.random.uniform(key, shape, minval=0.01, maxval=16.0))


class Mlp(nn.Module):
    """Gated (Shazeer 2020) or plain feed-forward network."""

    model: ModelConfig

    @nn.compact
    def __call__(self, x: Float[Array, "B T D"], keys: Key[Array, " B"] | None) -> Float[Array, "B T D"]:
        m = self.model
        activation = ACTIVATIONS[m.activation]
        up = Dense(m.mlp_size, m.mlp_bias, m, name="up")(x, keys)
        if m.gated_mlp:
            inner = activation(Dense(m.mlp_size, m.mlp_bias, m, name="gate")(x, keys)) * up
        else:
            inner = activation(up)
        return Dense(x.shape[-1], m.mlp_bias, m, name="down")(inner, keys)


Cached = tuple[Float[Array, "..."], Float[Array, "..."]] | None  # keys and values as in a KVCache, or a DeltaState


class Block(nn.Module):
    """Decoder layer, for training, scoring and decoding, with attention or a delta net."""

    model: ModelConfig
    with_delta: bool = False

    @nn.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        rotation: Rotation | None,
        mask: Bool[Array, "B T S"] | delta.Tokens,
        scale: Float[Array, ""],
        cache: Cached = None,
        slot: Int[Array, ""] | int = 0,
        keys: Key[Array, " B"] | None = None,
        layer: Int[Array, ""] | None = None,
    ) -> tuple[Float[Array, "B T D"], Cached]:
        """Hidden states [B, T, D] and the updated cache (None without a cache): that of this layer, or with `layer`
        those of all layers, stacked. `mask` is that of attention, or the tokens of a delta net. `keys` are for adapter
        dropout."""
        m = self.model

        def norm(name: str, x: Array) -> Array:
            used = m.norm_placement in ("both", "post" if name.endswith("post_norm") else "pre")
            return Norm(m.norm, m.norm_eps, name=name)(x) if used else x

        def added(x: Array, y: Array) -> Array:
            return x + (y if m.residual_multiplier == 1 else m.residual_multiplier * y)

        normed = norm("attention_norm", x)
        if self.with_delta:
            assert isinstance(mask, delta.Tokens)
            y, cache = GatedDeltaNet(m, name="delta")(normed, mask, cache, keys)
        else:
            y, cache = Attention(m, name="attention")(normed, rotation, mask, scale, cache, slot, keys, layer)
        attended = added(x, norm("attention_post_norm", y))
        mlp_input = norm("mlp_norm", x if m.parallel_residual else attended)
        inner = Experts(m, name="experts")(mlp_input) if m.num_experts else Mlp(m, name="mlp")(mlp_input, keys)
        return added(attended, norm("mlp_post_norm", inner)), cache

"""Quantised kernels of a frozen model: packing, unpacking, and a product that unpacks one tile at a time.

int8: one scale per output (absolute maximum / 127). nf4: two 4-bit codes per byte, each a quantile of the normal
distribution, and one scale per block of inputs of each output (https://arxiv.org/abs/2305.14314, section 3). With
double quantisation (same paper) the scales are int8 themselves.
"""

import functools
import math
from typing import Literal, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from jaxrlhf.models.product import product
from jaxrlhf.types import Params

Bits = Literal["int8", "nf4"]
BLOCK = 64  # inputs that share a scale
TILE = 2**20  # weights unpacked at a time at most: 4 MiB in float32
SHARES = 8
"""A tile has outputs of each of at least so many equal shares, so that every device of a sharded kernel takes part."""
# Appendix E of the paper: quantiles of N(0, 1), computed separately for both signs, so that -1, 0 and 1 are exact
_LEVELS = """
-1.0 -0.6961928009986877 -0.5250730514526367 -0.39491748809814453 -0.28444138169288635 -0.18477343022823334
-0.09105003625154495 0.0 0.07958029955625534 0.16093020141124725 0.24611230194568634 0.33791524171829224
0.44070982933044434 0.5626170039176941 0.7229568362236023 1.0
"""
LEVELS = np.array(_LEVELS.split(), np.float32)


def pack(kernel: Float[Array, "*lead I O"], bits: Bits, double: bool) -> Params:
    """Quantise a kernel to {"codes", "scale", ...}, the input of `unpack`; `double`: quantise the scales too (nf4)."""
    kernel = kernel.astype(jnp.float32)
    if bits == "int8":
        scale = jnp.maximum(jnp.max(jnp.abs(kernel), axis=-2, keepdims=True), 1e-30) / 127
        return {"codes": jnp.round(kernel / scale).astype(jnp.int8), "scale": scale}
    *lead, inputs, outputs = kernel.shape
    block = math.gcd(BLOCK, inputs)
    blocks = kernel.reshape(*lead, inputs // block, block, outputs)
    scale = jnp.maximum(jnp.max(jnp.abs(blocks), axis=-2), 1e-30)
    middle = (LEVELS[1:] + LEVELS[:-1]) / 2
    codes = jnp.searchsorted(jnp.asarray(middle), blocks / scale[..., None, :]).astype(jnp.uint8)
    pairs = codes.reshape(*lead, inputs // 2, 2, outputs)  # neighbours share a byte, so that codes shard like inputs
    packed = {"codes": pairs[..., 0, :] | (pairs[..., 1, :] << 4)}
    if not double:
        return packed | {"scale": scale}
    # QLoRA subtracts the mean; the midpoint does not depend on the sharding of the scales
    ends = [f(scale, axis=(-2, -1), keepdims=True) for f in (jnp.min, jnp.max)]
    middle = 0.5 * (ends[0] + ends[1])
    step = jnp.maximum(jnp.max(jnp.abs(scale - middle), axis=-1, keepdims=True), 1e-30) / 127
    return packed | {"scale": jnp.round((scale - middle) / step).astype(jnp.int8), "step": step, "middle": middle}


def unpack(packed: Params) -> Float[Array, "*lead I O"]:
    """Dequantised kernel, float32."""
    codes, scale = packed["codes"], packed["scale"]
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.float32) * scale
    if "step" in packed:
        scale = scale.astype(jnp.float32) * packed["step"] + packed["middle"]
    *lead, pairs, outputs = codes.shape
    nibbles = jnp.stack([codes & 15, codes >> 4], axis=-2)
    blocks = jnp.asarray(LEVELS)[nibbles].reshape(*lead, scale.shape[-2], -1, outputs) * scale[..., None, :]
    return blocks.reshape(*lead, 2 * pairs, outputs)


def packed_product(
    x: Float[Array, "B T I"], packed: Params, dtype: str, mesh: jax.sharding.Mesh | None = None
) -> Float[Array, "B T O"]:
    """x W for a packed W, without a gradient for W; operands in `dtype`, sums in float32. W may be split over `mesh`.

    W is unpacked one tile at a time, in the forward pass and again in the backward pass.
    """
    shares = math.lcm(SHARES, *(mesh.shape[axis] for axis in ("fsdp", "tensor"))) if mesh else SHARES
    return cast(Array, _product(x, packed, dtype, shares))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _product(x: Array, packed: Params, dtype: str, shares: int) -> Array:
    return _forward(x, packed, dtype, shares)[0]


def _inputs(packed: Params) -> int:
    """Number of inputs of the kernel: one int8 code or two nf4 codes per byte."""
    return packed["codes"].shape[-2] * (1 if packed["codes"].dtype == jnp.int8 else 2)


def _tiles(packed: Params, shares: int) -> int:
    """Number of tiles of the kernel: the fewest of equal size with at most TILE weights each."""
    outputs = packed["codes"].shape[-1]
    inputs, share = _inputs(packed), outputs // math.gcd(shares, outputs)
    return next(n for n in range(1, share + 1) if share % n == 0 and (n == share or inputs * (outputs // n) <= TILE))


def _split(x: Array, count: int, shares: int) -> Array:
    """Split the outputs (last axis) into tiles on a new first axis; arrays shared by all outputs are repeated."""
    outputs = x.shape[-1]
    if outputs == 1:
        return jnp.broadcast_to(x, (count, *x.shape))
    parts = x.reshape(*x.shape[:-1], math.gcd(shares, outputs), count, -1)
    return jnp.moveaxis(parts, -2, 0).reshape(count, *x.shape[:-1], outputs // count)


def _join(tiles: Array, shares: int) -> Array:
    """Inverse of `_split`."""
    count, *lead, width = tiles.shape
    parts = tiles.reshape(count, *lead, math.gcd(shares, count * width), -1)
    return jnp.moveaxis(parts, 0, -2).reshape(*lead, count * width)


def _forward(x, packed, dtype, shares):
    def tile_product(tile: Params) -> Array:
        return product("bti,io->bto", x, unpack(tile), dtype)

    count = _tiles(packed, shares)
    tiles = {k: _split(v, count, shares) for k, v in packed.items()}
    return _join(jax.lax.map(tile_product, tiles), shares), packed


def _backward(dtype, shares, packed, cotangent):
    count = _tiles(packed, shares)
    tiles = {k: _split(v, count, shares) for k, v in packed.items()}

    def add(grad: Array, item: tuple[Params, Array]) -> tuple[Array, None]:
        tile, cotangent = item
        return grad + product("bto,io->bti", cotangent, unpack(tile), dtype), None

    def zero(leaf: Array) -> Array | np.ndarray:
        is_float = jnp.issubdtype(leaf.dtype, jnp.floating)
        return jnp.zeros_like(leaf) if is_float else np.zeros(leaf.shape, jax.dtypes.float0)

    zeros = jnp.zeros((*cotangent.shape[:-1], _inputs(packed)))
    grad, _ = jax.lax.scan(add, zeros, (tiles, _split(cotangent, count, shares)))
    return grad, jax.tree.map(zero, packed)


_product.defvjp(_forward, _backward)

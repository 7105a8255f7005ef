"""Kernels in few bits, for a model that is frozen: how they are packed, and a product that unpacks a tile at a time.

int8: a scale for each output (absolute maximum / 127). nf4: two 4-bit codes a byte, each a quantile of the normal
distribution, with a scale for each block of inputs of each output (https://arxiv.org/abs/2305.14314, section 3). The
scales may be in 8 bits themselves (the paper's double quantisation).
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
TILE = 2**20  # weights that are unpacked at a time: 4 MiB in float32
SHARES = 8  # a tile takes as many outputs from each eighth of them: from every device of a mesh that cuts them
# The paper's appendix E: quantiles of N(0, 1), each side on its own, so that 0 and both ends are exact
LEVELS = np.array(
    [
        -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635,
        -0.18477343022823334, -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634,
        0.33791524171829224, 0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
    ],
    np.float32,
)  # fmt: skip


def pack(kernel: Float[Array, "*lead I O"], bits: Bits, double: bool) -> Params:
    """The kernel as {"codes", "scale", ...}, from which `unpack` makes it again."""
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
    pairs = codes.reshape(*lead, inputs // 2, 2, outputs)  # neighbours, so that a mesh cuts codes where it cuts inputs
    packed = {"codes": pairs[..., 0, :] | (pairs[..., 1, :] << 4)}
    if not double:
        return packed | {"scale": scale}
    # QLoRA takes the mean away; the middle is the same number however a mesh cuts the scales
    ends = [f(scale, axis=(-2, -1), keepdims=True) for f in (jnp.min, jnp.max)]
    middle = 0.5 * (ends[0] + ends[1])
    step = jnp.maximum(jnp.max(jnp.abs(scale - middle), axis=-1, keepdims=True), 1e-30) / 127
    return packed | {"scale": jnp.round((scale - middle) / step).astype(jnp.int8), "step": step, "middle": middle}


def unpack(packed: Params) -> Float[Array, "*lead I O"]:
    """The kernel, float32, to the bits that are left of it."""
    codes, scale = packed["codes"], packed["scale"]
    if codes.dtype == jnp.int8:
        return codes.astype(jnp.float32) * scale
    if "step" in packed:
        scale = scale.astype(jnp.float32) * packed["step"] + packed["middle"]
    *lead, pairs, outputs = codes.shape
    whole = jnp.stack([codes & 15, codes >> 4], axis=-2)
    blocks = jnp.asarray(LEVELS)[whole].reshape(*lead, scale.shape[-2], -1, outputs) * scale[..., None, :]
    return blocks.reshape(*lead, 2 * pairs, outputs)


def packed_product(x: Float[Array, "B T I"], packed: Params, dtype: str) -> Float[Array, "B T O"]:
    """x W for a packed W that gets no gradient, operands in `dtype`, sums in float32; W is unpacked a tile at a time,
    in the forward pass and again in the backward."""
    return cast(Array, _product(x, packed, dtype))


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _product(x: Array, packed: Params, dtype: str) -> Array:
    return _forward(x, packed, dtype)[0]


def _tiles(packed: Params) -> int:
    """Into how many tiles the kernel is cut: the fewest of equal size that hold TILE weights at most."""
    rows, outputs = packed["codes"].shape[-2:]
    inputs, share = rows * (1 if packed["codes"].dtype == jnp.int8 else 2), outputs // math.gcd(SHARES, outputs)
    return next(n for n in range(1, share + 1) if share % n == 0 and (n == share or inputs * (outputs // n) <= TILE))


def _cut(x: Array, count: int) -> Array:
    """The outputs, on the last axis, as tiles on a new first one; what all outputs share is repeated."""
    outputs = x.shape[-1]
    if outputs == 1:
        return jnp.broadcast_to(x, (count, *x.shape))
    apart = x.reshape(*x.shape[:-1], math.gcd(SHARES, outputs), count, -1)
    return jnp.moveaxis(apart, -2, 0).reshape(count, *x.shape[:-1], outputs // count)


def _join(tiles: Array) -> Array:
    """The inverse of `_cut`."""
    count, *lead, width = tiles.shape
    apart = tiles.reshape(count, *lead, math.gcd(SHARES, count * width), -1)
    return jnp.moveaxis(apart, 0, -2).reshape(*lead, count * width)


def _forward(x, packed, dtype):
    def one(tile: Params) -> Array:
        return product("bti,io->bto", x, unpack(tile), dtype)

    count = _tiles(packed)
    return _join(jax.lax.map(one, {name: _cut(part, count) for name, part in packed.items()})), packed


def _backward(dtype, packed, cotangent):
    count = _tiles(packed)
    tiles = {name: _cut(part, count) for name, part in packed.items()}

    def one(total: Array, item: tuple[Params, Array]) -> tuple[Array, None]:
        tile, part = item
        return total + product("bto,io->bti", part, unpack(tile), dtype), None

    rows = packed["codes"].shape[-2] * (1 if packed["codes"].dtype == jnp.int8 else 2)
    total, _ = jax.lax.scan(one, jnp.zeros((*cotangent.shape[:-1], rows)), (tiles, _cut(cotangent, count)))
    nothing = jax.tree.map(
        lambda leaf: (
            jnp.zeros_like(leaf)
            if jnp.issubdtype(leaf.dtype, jnp.floating)
            else np.zeros(leaf.shape, jax.dtypes.float0)
        ),
        packed,
    )
    return total, nothing


_product.defvjp(_forward, _backward)

"""Rotary position embeddings (Su et al. 2021) and their long-context variants."""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrlhf.models.config import ModelConfig, Rope


class Rotation(NamedTuple):
    """Cosine and sine of every rotary angle, and the factor on queries (None: 1)."""

    cos: Float[Array, "B T 1 half"]
    sin: Float[Array, "B T 1 half"]
    query_scale: Float[Array, "B T 1 1"] | None


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Angle per position of each of the R / 2 planes (float32 [R/2]), and the factor on cos and sin.

    R is the part of head_dim that turns. Su et al. 2021, eq. 15, theta^(-2i/R). `linear` divides all frequencies by
    `factor` (Chen et al. 2023); `llama3` keeps wavelengths below original/high_freq_factor, divides those above
    original/low_freq_factor, and blends in between; `yarn` blends by the number of turns over the original length and
    scales attention (Peng et al. 2023, eq. 17-23, where the temperature appears as a factor on q and k); `longrope`
    divides each frequency by a factor of its own, of one list up to the original length and of another beyond it (Ding
    et al. 2024); `dynamic` raises theta with the length beyond the original (NTK-aware scaling: Peng et al. 2023,
    section 3.3). `rope.length` is the length that counts; without one, the original.
    """
    dims = int(head_dim * rope.partial_rotary_factor)
    frequencies = rope.theta ** (-np.arange(0, dims, 2) / dims)
    scale, length = 1.0, rope.length or rope.original_max_positions
    if rope.kind == "linear":
        frequencies = frequencies / rope.factor
    elif rope.kind == "llama3":
        turns = rope.original_max_positions * frequencies / (2 * math.pi)
        keep = np.clip((turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor), 0, 1)
        frequencies = frequencies * (keep + (1 - keep) / rope.factor)
    elif rope.kind == "yarn":
        keep = _yarn_keep(rope, dims)
        frequencies = frequencies * (keep + (1 - keep) / rope.factor)
        scale = _yarn_attention_factor(rope)
    elif rope.kind == "longrope":
        frequencies = frequencies / (rope.long_factor if length > rope.original_max_positions else rope.short_factor)
        scale = _longrope_attention_factor(rope)
    elif rope.kind == "dynamic":
        frequencies = frequencies * _ntk_stretch(rope, dims, np.array(float(length)))
    return frequencies.astype(np.float32), scale


def _ntk_stretch(rope: Rope, dims: int, length: np.ndarray | Array) -> np.ndarray | Array:
    """Factor on the frequencies for sequences of `length` (any shape; the planes are a new last axis).

    theta g^(R/(R-2)) for theta, with g = factor length / original - (factor - 1), at least 1, multiplies plane i by
    g^(-2i/(R-2)).
    """
    growth = (rope.factor * length / rope.original_max_positions - (rope.factor - 1)).clip(1.0)
    return growth[..., None] ** (-np.arange(0, dims, 2) / max(dims - 2, 1))


def _yarn_keep(rope: Rope, dims: int) -> np.ndarray:
    """Share of each frequency that YaRN keeps: 1 for planes that turn often, 0 for those that turn less than once."""

    def plane(turns: float) -> float:
        return dims * math.log(rope.original_max_positions / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = plane(rope.beta_fast), plane(rope.beta_slow)
    if rope.truncate:
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    return 1 - np.clip((np.arange(dims // 2) - low) / (high - low), 0, 1)


def _yarn_attention_factor(rope: Rope) -> float:
    def temperature(mscale: float) -> float:
        return 1.0 if rope.factor <= 1 else 0.1 * mscale * math.log(rope.factor) + 1.0

    if rope.attention_factor is not None:
        return rope.attention_factor
    if rope.mscale and rope.mscale_all_dim:
        return temperature(rope.mscale) / temperature(rope.mscale_all_dim)
    return temperature(1.0)


def _longrope_attention_factor(rope: Rope) -> float:
    if rope.attention_factor is not None:
        return rope.attention_factor
    return 1.0 if rope.factor <= 1 else math.sqrt(1 + math.log(rope.factor) / math.log(rope.original_max_positions))


def for_length(model: ModelConfig, length: int | None) -> ModelConfig:
    """The model for sequences of up to `length` tokens, all rotated alike; None: each row for its own length.

    `longrope` and `dynamic` frequencies depend on the length. With a fixed one, a token has the same key and value in
    the cache and in a pass over the whole sequence, and in every batch. Models that do not depend on the length are
    returned unchanged.
    """
    rope = model.rope
    if rope is None or not rope.depends_on_length:
        return model
    if length is not None:
        length = max(length, rope.original_max_positions)
        if rope.kind == "longrope" and length > rope.original_max_positions:
            length = model.max_positions  # all longer ones are the same: one program
    return dataclasses.replace(model, rope=dataclasses.replace(rope, length=length))


def rotation(model: ModelConfig, positions: Int[Array, "B T"]) -> Rotation | None:
    """Rotation by `model.rope` at these positions; None without rotary embeddings.

    Without `rope.length`, frequencies that depend on the length are those of each row's highest position.
    """
    rope = model.rope
    if rope is None:
        return None
    frequencies, scale = rope_frequencies(rope, model.head_dim)
    frequencies = frequencies[None, None, None, :]
    if rope.depends_on_length and rope.length is None:
        frequencies = _frequencies_of_rows(rope, model.head_dim, jnp.max(positions, axis=1) + 1)[:, None, None, :]
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies
    query_scale = None
    if rope.query_scale_beta:
        periods = positions[:, :, None, None] // rope.original_max_positions
        query_scale = 1 + rope.query_scale_beta * jnp.log1p(periods.astype(jnp.float32))
    return Rotation(jnp.cos(angles) * scale, jnp.sin(angles) * scale, query_scale)


def _frequencies_of_rows(rope: Rope, head_dim: int, lengths: Int[Array, " B"]) -> Float[Array, "B half"]:
    original = rope.original_max_positions
    short, _ = rope_frequencies(rope, head_dim)
    if rope.kind == "longrope":
        long, _ = rope_frequencies(dataclasses.replace(rope, length=original + 1), head_dim)
        return jnp.where((lengths > original)[:, None], long, short)
    return jnp.asarray(_ntk_stretch(rope, 2 * len(short), lengths.astype(jnp.float32)) * short)


def rotations(model: ModelConfig, positions: Int[Array, "B T"]) -> tuple[tuple[Rotation | None, ...], tuple[int, ...]]:
    """(the different rotations of the layers at these positions, [L] which of them each layer has)."""
    ropes = tuple(dict.fromkeys(model.layer_ropes))
    different = tuple(rotation(dataclasses.replace(model, rope=rope), positions) for rope in ropes)
    return different, tuple(ropes.index(rope) for rope in model.layer_ropes)


def select_rotation(different: tuple[Rotation | None, ...], number: Int[Array, ""] | None) -> Rotation | None:
    """The rotation of this number, a traced one; None becomes a rotation by 0. A single one needs no number."""
    if len(different) == 1:
        return different[0]
    assert number is not None
    some = next(turn for turn in different if turn is not None)
    turns = [turn or Rotation(jnp.ones_like(some.cos), jnp.zeros_like(some.sin), None) for turn in different]
    cos, sin = (jax.lax.select_n(number, *(getattr(turn, part) for turn in turns)) for part in ("cos", "sin"))
    scales = [turn.query_scale for turn in turns]
    if all(scale is None for scale in scales):
        return Rotation(cos, sin, None)
    ones = jnp.ones((*cos.shape[:2], 1, 1))
    return Rotation(cos, sin, jax.lax.select_n(number, *(ones if scale is None else scale for scale in scales)))


def rotate(x: Float[Array, "B T heads H"], by: Rotation | None) -> Float[Array, "B T heads H"]:
    """Rotate plane i, components i and i + R/2 of the first R, by its angle; the other components stay."""
    if by is None:
        return x
    width = 2 * by.cos.shape[-1]
    first, second = jnp.split(x[..., :width] if width < x.shape[-1] else x, 2, axis=-1)
    turned = [first * by.cos - second * by.sin, second * by.cos + first * by.sin]
    return jnp.concatenate([*turned, x[..., width:]] if width < x.shape[-1] else turned, axis=-1)


def rotate_queries(x: Float[Array, "B T heads H"], by: Rotation | None) -> Float[Array, "B T heads H"]:
    """`rotate`, times the factor on queries."""
    x = rotate(x, by)
    return x if by is None or by.query_scale is None else x * by.query_scale

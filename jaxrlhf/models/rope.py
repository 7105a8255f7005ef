"""Rotary position embeddings (Su et al. 2021) and their long-context variants."""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from jaxrlhf.models.config import ModelConfig, Rope

Rotation = tuple[Float[Array, "B T 1 half"], Float[Array, "B T 1 half"]]
"""Cosine and sine of every rotary angle."""


def rope_frequencies(rope: Rope, head_dim: int) -> tuple[np.ndarray, float]:
    """Angle per position of each of the head_dim / 2 planes (float32 [H/2]), and the factor on cos and sin.

    Su et al. 2021, eq. 15, theta^(-2i/H). `linear` divides all frequencies by `factor` (Chen et al. 2023); `llama3`
    keeps wavelengths below original/high_freq_factor, divides those above original/low_freq_factor, and blends in
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
    """Share of each frequency that YaRN keeps: 1 for planes that turn often, 0 for those that turn less than once."""

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


def rotation(model: ModelConfig, positions: Int[Array, "B T"]) -> Rotation | None:
    """Rotation of all layers at these positions; None for a model without rotary embeddings."""
    if model.rope is None:
        return None
    frequencies, scale = rope_frequencies(model.rope, model.head_dim)
    angles = positions[:, :, None, None].astype(jnp.float32) * frequencies[None, None, None, :]
    return jnp.cos(angles) * scale, jnp.sin(angles) * scale


def rotate(x: Float[Array, "B T heads H"], by: Rotation | None) -> Float[Array, "B T heads H"]:
    """Rotate plane i, components i and i + H/2, by its angle."""
    if by is None:
        return x
    cos, sin = by
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)

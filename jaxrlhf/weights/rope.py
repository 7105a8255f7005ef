"""Rotary embeddings in config.json: `rope_theta` beside `rope_scaling` (transformers 4), or `rope_parameters` (5)."""

from typing import Any

from jaxrlhf.errors import DataError
from jaxrlhf.models.config import Rope
from jaxrlhf.weights.fields import Fields

COMMON = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
KEYS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"},
    "yarn": {
        "factor",
        "original_max_position_embeddings",
        "beta_fast",
        "beta_slow",
        "attention_factor",
        "mscale",
        "mscale_all_dim",
        "truncate",
    },
}


def parse_rope(fields: Fields, max_positions: int) -> Rope:
    """Theta and scaling, wherever they stand. Raises DataError on a scaling that is not implemented, a key that its
    scaling does not have, and places that contradict each other."""
    older, newer = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if older and newer and {**newer, **older} != newer:
        raise DataError(f"{fields.where}: rope_scaling {older} contradicts rope_parameters {newer}; remove one of them")
    scaling = Fields(newer or older, f"{fields.where}, {'rope_parameters' if newer else 'rope_scaling'}")
    kind = scaling.values.get("rope_type") or scaling.values.get("type") or "default"
    if kind not in KEYS:
        raise DataError(
            f"{scaling.where}: rotary scaling {kind!r} is not supported; supported are {', '.join(KEYS)}. "
            "Sequences no longer than the original length may not need it: remove the scaling to try"
        )
    # a key that says nothing here would do nothing in transformers either, but it was put there to do something
    if unknown := sorted(key for key in scaling.values.keys() - COMMON - KEYS[kind] if scaling.values[key] is not None):
        raise DataError(f"{scaling.where}: rotary scaling {kind!r} has no option {', '.join(map(repr, unknown))}")
    for place in (fields, scaling):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            place.refuse("partial_rotary_factor", "1.0: rotating only a part of each head is not supported")
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0))
    if kind == "default":
        return Rope(theta=theta)
    if kind == "linear":
        return Rope(theta=theta, kind="linear", factor=scaling.number("factor"))
    original = _original_length(fields, scaling, max_positions)
    if kind == "llama3":
        low, high = scaling.number("low_freq_factor"), scaling.number("high_freq_factor")
        if high <= low:
            scaling.refuse("high_freq_factor", f"more than low_freq_factor ({low})")
        return Rope(
            theta=theta,
            kind="llama3",
            factor=scaling.number("factor"),
            original_max_positions=original,
            low_freq_factor=low,
            high_freq_factor=high,
        )
    if theta <= 1:
        raise DataError(f"{fields.where}: yarn needs rope_theta above 1, not {theta}")
    return Rope(
        theta=theta,
        kind="yarn",
        factor=scaling.number("factor", max_positions / original),
        original_max_positions=original,
        beta_fast=scaling.number("beta_fast", 32.0),
        beta_slow=scaling.number("beta_slow", 1.0),
        truncate=scaling.flag("truncate", True),
        attention_factor=_optional(scaling, "attention_factor"),
        mscale=_optional(scaling, "mscale"),
        mscale_all_dim=_optional(scaling, "mscale_all_dim"),
    )


def _optional(scaling: Fields, key: str) -> float | None:
    return scaling.number(key, least=0.0) if scaling.has(key) else None


def _original_length(fields: Fields, scaling: Fields, max_positions: int) -> int:
    key = "original_max_position_embeddings"
    outside = fields.count(key, max_positions)
    inside = scaling.count(key, outside)
    if fields.has(key) and inside != outside:
        raise DataError(f"{fields.where}: {key} is {outside} at the top and {inside} in the rotary scaling")
    return inside


def render_rope(rope: Rope) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling`: the older spelling, which every version of transformers reads."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    values = {
        "factor": rope.factor,
        "original_max_position_embeddings": rope.original_max_positions,
        "low_freq_factor": rope.low_freq_factor,
        "high_freq_factor": rope.high_freq_factor,
        "beta_fast": rope.beta_fast,
        "beta_slow": rope.beta_slow,
        "attention_factor": rope.attention_factor,
        "mscale": rope.mscale,
        "mscale_all_dim": rope.mscale_all_dim,
        "truncate": rope.truncate,
    }
    kept = {key: value for key, value in values.items() if key in KEYS[rope.kind] and value is not None}
    return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": rope.kind, **kept}}

"""Rotary embeddings in config.json: `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""

from typing import Any

from jaxrlhf.errors import DataError
from jaxrlhf.models.config import Rope
from jaxrlhf.weights.fields import Fields

_ORIGINAL = "original_max_position_embeddings"
_COMMON_OPTIONS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_OPTIONS = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
}


def parse_rope(fields: Fields, max_positions: int) -> Rope:
    """The rotary embeddings of a config.json.

    Raises DataError for a scaling that is not implemented, for an option that the scaling does not have, and if
    `rope_scaling` and `rope_parameters`, or the two places of the original length, contradict each other.
    """
    older, newer = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if older and newer and {**newer, **older} != newer:
        raise DataError(f"{fields.where}: rope_scaling {older} contradicts rope_parameters {newer}; remove one of them")
    scaling = Fields(newer or older, f"{fields.where}, {'rope_parameters' if newer else 'rope_scaling'}")
    kind = scaling.values.get("rope_type") or scaling.values.get("type") or "default"
    if kind not in _OPTIONS:
        raise DataError(
            f"{scaling.where}: rotary scaling {kind!r} is not supported; supported are {', '.join(_OPTIONS)}. "
            "Sequences no longer than the original length may not need it: remove the scaling to try"
        )
    # transformers ignores an unknown option; refuse it, because it was meant to have an effect
    allowed = _COMMON_OPTIONS.union(_OPTIONS[kind])
    if unknown := sorted(key for key in scaling.values if key not in allowed and scaling.has(key)):
        raise DataError(f"{scaling.where}: rotary scaling {kind!r} has no option {', '.join(map(repr, unknown))}")
    for place in (fields, scaling):
        if place.number("partial_rotary_factor", 1.0) != 1.0:
            place.refuse("partial_rotary_factor", "1.0: rotating only a part of each head is not supported")
    theta = scaling.number("rope_theta", fields.number("rope_theta", 10000.0))
    original = _original_length(fields, scaling, max_positions) if _ORIGINAL in _OPTIONS[kind] else 0
    values: dict[str, Any] = {}
    match kind:
        case "linear":
            values = {"factor": scaling.number("factor")}
        case "llama3":
            values = {key: scaling.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
            if values["high_freq_factor"] <= values["low_freq_factor"]:
                scaling.refuse("high_freq_factor", f"more than low_freq_factor ({values['low_freq_factor']})")
        case "yarn":
            if theta <= 1:
                raise DataError(f"{fields.where}: yarn needs rope_theta above 1, not {theta}")
            values = {"factor": scaling.number("factor", max_positions / original)}
            values["truncate"] = scaling.boolean("truncate", True)
            for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
                if scaling.has(key):
                    values[key] = scaling.number(key, least=None if key.startswith("beta") else 0.0)
    return Rope(theta=theta, kind=kind, original_max_positions=original, **values)


def _original_length(fields: Fields, scaling: Fields, max_positions: int) -> int:
    top_level = fields.integer(_ORIGINAL, max_positions)
    length = scaling.integer(_ORIGINAL, top_level)
    if fields.has(_ORIGINAL) and length != top_level:
        raise DataError(f"{fields.where}: {_ORIGINAL} is {top_level} at the top and {length} in the rotary scaling")
    return length


def render_rope(rope: Rope) -> dict[str, Any]:
    """`rope_theta` and `rope_scaling` of transformers 4, which every version reads."""
    if rope.kind == "default":
        return {"rope_theta": rope.theta, "rope_scaling": None}
    values = {
        key: rope.original_max_positions if key == _ORIGINAL else getattr(rope, key) for key in _OPTIONS[rope.kind]
    }
    scaling = {key: value for key, value in values.items() if value is not None}
    return {"rope_theta": rope.theta, "rope_scaling": {"rope_type": rope.kind, **scaling}}

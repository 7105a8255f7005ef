"""Rotary embeddings in config.json: `rope_theta` and `rope_scaling` (transformers 4) or `rope_parameters` (5)."""

import dataclasses
from dataclasses import dataclass, field
from typing import Any

from jaxrlhf.errors import DataError
from jaxrlhf.models.config import Kind, ModelConfig, Rope
from jaxrlhf.weights.fields import Fields

FULL, SLIDING = "full_attention", "sliding_attention"
"""Entries of `layer_types`, and keys of a `rope_parameters` that differs between them."""
_ORIGINAL = "original_max_position_embeddings"
_POSITIONS = "max_position_embeddings"
_QUERY_SCALE = "llama_4_scaling_beta"
_LOCAL = "rope_local_base_freq"
TOP_LEVEL = {
    *("rope_theta", "rotary_emb_base", _LOCAL, "rope_scaling", "rope_parameters", "partial_rotary_factor"),
    *("rotary_pct", _ORIGINAL),
}
"""The keys at the top level of config.json that may describe rotary embeddings."""
_COMMON_OPTIONS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_OPTIONS: dict[Kind, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "dynamic": ("factor",),
    "llama3": ("factor", _ORIGINAL, "low_freq_factor", "high_freq_factor"),
    "yarn": ("factor", _ORIGINAL, "beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim", "truncate"),
    "longrope": ("factor", _ORIGINAL, "short_factor", "long_factor", "attention_factor"),
}


@dataclass(frozen=True)
class RopeKeys:
    """Keys and defaults of the rotary embeddings in the config.json of a family."""

    theta: str = "rope_theta"
    theta_default: float = 10000.0
    partial: str | None = None  # share of each head that turns, at the top level; None: the whole head always turns
    partial_default: float = 1.0
    original_default: int | None = None  # of original_max_position_embeddings; None: max_position_embeddings
    query_scale: bool = False  # rope_parameters may have llama_4_scaling_beta
    kinds: dict[str, Kind] = field(default_factory=lambda: {kind: kind for kind in _OPTIONS})  # {spelling: kind}


def parse_rope(fields: Fields, values: dict[str, Any], keys: RopeKeys = RopeKeys()) -> dict[str, Any]:
    """`rope` and `max_positions` of a config.json, from it and the ModelConfig fields read before.

    The context of dynamic scaling is `factor` times the original one, which is max_position_embeddings. Raises
    DataError for a scaling that is not implemented, for an option that the scaling does not have, and if `rope_scaling`
    and `rope_parameters`, or the two places of a value, contradict each other.
    """
    older, newer = fields.mapping("rope_scaling"), fields.mapping("rope_parameters")
    if older and newer and {**newer, **older} != newer:
        raise DataError(f"{fields.where}: rope_scaling {older} contradicts rope_parameters {newer}; remove one of them")
    scaling = Fields(newer or older, f"{fields.where}, {'rope_parameters' if newer else 'rope_scaling'}")
    spelling = scaling.values.get("rope_type") or scaling.values.get("type") or "default"
    if not isinstance(spelling, str) or spelling not in keys.kinds:
        raise DataError(
            f"{scaling.where}: rotary scaling {spelling!r} is not supported; supported are {', '.join(keys.kinds)}. "
            "Sequences no longer than the original length may not need it: remove the scaling to try"
        )
    kind, max_positions = keys.kinds[spelling], values["max_positions"]
    # transformers ignores an unknown option; refuse it, because it was meant to have an effect
    allowed = _COMMON_OPTIONS.union(_OPTIONS[kind], {_ORIGINAL, _POSITIONS, _QUERY_SCALE} if keys.query_scale else ())
    if unknown := sorted(key for key in scaling.values if key not in allowed and scaling.has(key)):
        raise DataError(f"{scaling.where}: rotary scaling {kind!r} has no option {', '.join(map(repr, unknown))}")
    theta = scaling.number("rope_theta", fields.number(keys.theta, keys.theta_default))
    share = _partial_factor(fields, scaling, keys)
    turning = int(values["head_dim"] * share)
    if share != 1.0 and (turning % 2 or not turning):
        raise DataError(
            f"{fields.where}: rotary embeddings would turn {turning} of the {values['head_dim']} components of each "
            "head; expected an even number above 0"
        )
    beta = scaling.number(_QUERY_SCALE, 0.0, least=0.0) if keys.query_scale else 0.0
    original = 0
    if _ORIGINAL in _OPTIONS[kind] or beta:
        original = _original_length(fields, scaling, keys.original_default, max_positions)
    options: dict[str, Any] = {}
    match kind:
        case "linear":
            options = {"factor": scaling.number("factor")}
        case "dynamic":
            options, original = {"factor": scaling.number("factor", least=1.0)}, max_positions
            max_positions = int(options["factor"] * original)
        case "llama3":
            options = {key: scaling.number(key) for key in ("factor", "low_freq_factor", "high_freq_factor")}
            if options["high_freq_factor"] <= options["low_freq_factor"]:
                scaling.refuse("high_freq_factor", f"more than low_freq_factor ({options['low_freq_factor']})")
        case "yarn":
            if theta <= 1:
                raise DataError(f"{fields.where}: yarn needs rope_theta above 1, not {theta}")
            options = {"factor": scaling.number("factor", max_positions / original)}
            options["truncate"] = scaling.boolean("truncate", True)
            for key in ("beta_fast", "beta_slow", "attention_factor", "mscale", "mscale_all_dim"):
                if scaling.has(key):
                    options[key] = scaling.number(key, least=None if key.startswith("beta") else 0.0)
        case "longrope":
            options = {"factor": scaling.number("factor", max_positions / original)}
            for key in ("short_factor", "long_factor"):
                options[key] = scaling.numbers(key, turning // 2)
            if scaling.has("attention_factor"):
                options["attention_factor"] = scaling.number("attention_factor")
    rope = Rope(
        theta=theta,
        kind=kind,
        partial_rotary_factor=share,
        original_max_positions=original,
        query_scale_beta=beta,
        **options,
    )
    return {"rope": rope, "max_positions": max_positions}


def _partial_factor(fields: Fields, scaling: Fields, keys: RopeKeys) -> float:
    """The share of each head that turns."""
    if keys.partial is None:
        for place in (fields, scaling):
            if place.number("partial_rotary_factor", 1.0) != 1.0:
                place.refuse("partial_rotary_factor", "1.0: this family always turns the whole head")
        return 1.0
    share = scaling.number("partial_rotary_factor", fields.number(keys.partial, keys.partial_default))
    if share > 1:
        inner = scaling.has("partial_rotary_factor")
        (scaling if inner else fields).refuse("partial_rotary_factor" if inner else keys.partial, "at most 1.0")
    return share


def _original_length(fields: Fields, scaling: Fields, default: int | None, max_positions: int) -> int:
    top_level = fields.integer(_ORIGINAL, default or max_positions)
    length = scaling.integer(_ORIGINAL, top_level)
    if (default or fields.has(_ORIGINAL)) and length != top_level:
        raise DataError(f"{fields.where}: {_ORIGINAL} is {top_level} at the top and {length} in the rotary scaling")
    return length


def render_rope(model: ModelConfig, keys: RopeKeys = RopeKeys()) -> dict[str, Any]:
    """The top-level keys of `keys`, as transformers 4 writes them, which every version reads."""
    rope = model.rope
    assert rope is not None
    config: dict[str, Any] = {keys.theta: rope.theta, "rope_scaling": None}
    if keys.partial:
        config[keys.partial] = rope.partial_rotary_factor
    if keys.original_default:
        config[_ORIGINAL] = rope.original_max_positions or keys.original_default
    options = {
        key: rope.original_max_positions if key == _ORIGINAL else getattr(rope, key) for key in _OPTIONS[rope.kind]
    }
    if rope.kind == "longrope":  # transformers 4 computes the factor from the lengths, and allows only these options
        config[_ORIGINAL] = options.pop(_ORIGINAL)
        if options["factor"] == model.max_positions / rope.original_max_positions:
            del options["factor"]
        options |= {key: list(getattr(rope, key)) for key in ("short_factor", "long_factor")}
    if rope.kind == "dynamic":
        config[_POSITIONS] = rope.original_max_positions
    if rope.query_scale_beta:
        options |= {_ORIGINAL: rope.original_max_positions, _QUERY_SCALE: rope.query_scale_beta}
    if rope.kind != "default" or options:
        spelling = "type" if rope.kind == "longrope" else "rope_type"
        config["rope_scaling"] = {spelling: rope.kind, **{k: v for k, v in options.items() if v is not None}}
    return config


def parse_ropes(
    fields: Fields, values: dict[str, Any], sliding_layers: tuple[bool, ...], *, theta: float, local: float | None
) -> dict[str, Any]:
    """`rope` and `sliding_rope` of a config.json whose full and sliding layers have one each.

    transformers 4 has `rope_theta` and `rope_scaling` for full layers, and for sliding ones `rope_local_base_freq` or,
    with `local` None, `rope_theta`; transformers 5 a `rope_parameters` with an entry for each. `theta` and `local` are
    the defaults.
    """
    both = fields.mapping("rope_parameters")
    if both.keys() - {FULL, SLIDING}:
        fields.refuse("rope_parameters", f"an entry each for {FULL} and {SLIDING}")
    kinds: dict[str, Kind] = {"default": "default", "linear": "linear", "llama3": "llama3", "yarn": "yarn"}
    of_full = fields.values | {"rope_parameters": both.get(FULL)}
    of_sliding = fields.values | {"rope_parameters": both.get(SLIDING), "rope_scaling": None, _ORIGINAL: None}
    sliding_keys = RopeKeys("rope_theta" if local is None else _LOCAL, theta if local is None else local, kinds=kinds)
    rope = parse_rope(Fields(of_full, fields.where), values, RopeKeys(theta_default=theta, kinds=kinds))["rope"]
    sliding = parse_rope(Fields(of_sliding, f"{fields.where}, {SLIDING}"), values, sliding_keys)["rope"]
    return {"rope": rope, "sliding_rope": sliding if any(sliding_layers) and sliding != rope else None}


def render_ropes(model: ModelConfig, *, local: bool) -> dict[str, Any]:
    """The inverse of `parse_ropes`, with the keys of transformers 4, which cannot scale sliding layers, and 5."""
    config, both = render_rope(model), {}
    for kind, rope in ((FULL, model.rope), (SLIDING, model.sliding_rope or model.rope)):
        older = render_rope(dataclasses.replace(model, rope=rope))
        both[kind] = {"rope_type": "default", "rope_theta": older["rope_theta"], **(older["rope_scaling"] or {})}
    if local:
        config[_LOCAL] = both[SLIDING]["rope_theta"]
    return config | {"rope_parameters": both}

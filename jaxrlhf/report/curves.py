"""Curves of a run: which metrics share a chart, and fewer points of long runs."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from jaxrlhf.metrics.columns import Columns
from jaxrlhf.metrics.keys import EPOCHS, REWARDS, TIMES

POINTS = 300
"""Points of a curve: more than a chart is pixels wide."""
Chart = tuple[str, str, tuple[str, ...]]  # title, unit, metrics
GROUPS: dict[str, tuple[Chart, ...]] = {
    "Objective": (
        ("Score", "per response", ("objective/scores", "eval/scores", "eval/scores_greedy", "eval/heldout_scores")),
        ("RLHF reward", "score less the KL penalty", ("objective/rlhf_reward",)),
        ("Spread of the scores", "standard deviation", ("objective/scores_std",)),
        ("Win rate against the initial policy", "held-out prompts", ("eval/win_rate",)),
        ("Loss", "", ("loss", "eval/loss")),
        ("Accuracy", "share of pairs", ("accuracy", "eval/accuracy")),
        ("Margin", "score of chosen less rejected", ("margin", "eval/margin")),
        ("Absolute error", "", ("absolute_error", "eval/absolute_error")),
        ("Scores of responses", "", ("mean_reward", "min_reward", "max_reward", "eval/mean_reward")),
        ("Calibration error", "held-out rows", ("eval/ece",)),
        ("Area under the ROC curve", "held-out rows", ("eval/auc",)),
        ("Correlation of score and target", "held-out rows", ("eval/correlation",)),
        ("Accuracy of the implicit reward", "share of pairs", ("rewards/accuracies", "eval/rewards/accuracies")),
        ("Margin of the implicit reward", "", ("rewards/margins", "eval/rewards/margins")),
        ("Implicit reward", "", ("rewards/chosen", "rewards/rejected")),
        ("Log-probability", "nats per response", ("logps/chosen", "logps/rejected")),
        ("SFT term", "nats per token", ("nll_loss", "eval/nll_loss")),
    ),
    "Distance and diversity": (
        ("KL to the reference", "nats per response", ("objective/kl", "objective/kl_k3", "eval/kl")),
        ("KL baseline", "nats", ("kl", "eval/kl")),
        ("KL coefficient", "", ("objective/kl_coef",)),
        ("Entropy", "nats per token", ("objective/entropy_per_token", "entropy", "eval/entropy")),
        ("Groups without spread", "of the batch", ("groups/flat", "groups/count")),
    ),
    "Responses": (
        ("Length", "tokens", ("tokens/mean_length", "tokens/min_length", "tokens/max_length", "eval/mean_length")),
        ("Finished before the length limit", "share", ("tokens/finished", "eval/finished")),
        ("Score follows length", "correlation", ("objective/score_length_correlation",)),
        ("Identical responses", "share of the batch", ("tokens/identical",)),
    ),
    "Optimisation": (
        ("Policy loss", "", ("loss/policy_avg",)),
        (
            "Clipped tokens",
            "share",
            ("policy/clipfrac_avg", "policy/clipfrac_high_avg", "policy/clipfrac_low_avg"),
        ),
        ("Step size in KL", "nats per token", ("policy/approxkl_avg", "policy/kl_avg")),
        ("Probability ratio", "new over old policy", ("val/ratio",)),
        ("Value loss", "", ("loss/value_avg",)),
        ("Explained variance of the value", "", ("val/explained_variance",)),
        ("Gradient norm", "", ("grad_norm", "grad_norm_clipped", "policy/grad_norm", "policy/grad_norm_clipped")),
        ("Gradient norm of the critic", "", ("critic/grad_norm", "critic/grad_norm_clipped")),
        ("Learning rate", "", ("learning_rate", "critic/learning_rate")),
        ("KL loss", "", ("loss/kl_avg",)),
        ("Sampler against policy", "nats per token", ("val/sampler_logprob_gap", "val/sampler_logprob_gap_max")),
    ),
    "Speed": (
        ("Tokens per second", "generation", ("perf/response_tokens_per_second",)),
        ("Time of a phase", "seconds", ("perf/rollout_seconds", "perf/reward_seconds")),
        ("Time since the record before", "seconds", tuple(f"perf/time/{part}" for part in TIMES)),
    ),
}
"""Charts of every method, by subject; a chart without a logged metric is left out."""
HIDDEN: tuple[str, ...] = ("episode", "epoch", "skipped_updates")  # counted elsewhere on the page


def charts(records: Columns, before: Mapping[str, float]) -> list[dict[str, Any]]:
    """Groups of charts of a run: [{"title", "charts": [{"title", "unit", "series"}]}]. `before` are the metrics of the
    initial policy, which stand at step 0. Metrics in no chart of GROUPS have one of their own, in the last group."""
    logged = records.metrics
    groups: list[dict[str, Any]] = []
    used: set[str] = {*HIDDEN, *(key for key in logged if key.startswith(EPOCHS))}
    names = [key.removesuffix("/errors") for key in logged if key.startswith(REWARDS) and key.endswith("/errors")]
    components = [f"{name}/mean" for name in names if f"{name}/mean" in logged]
    for title, members in GROUPS.items():
        drawn = []
        for name, unit, keys in members:
            found = [key for key in keys if key in logged and key not in used]
            # Held-out values go with the training values that they are named after; some have a chart of their own.
            if found and (
                any(not key.startswith("eval/") for key in found) or all(key.startswith("eval/") for key in keys)
            ):
                drawn.append(_chart(name, unit, found, records, before))
                used.update(found)
        if title == "Objective" and len(components) > 1:
            drawn.append(_chart("Components of the score", "before their weights", components, records, before))
            used.update(components)
        if drawn:
            groups.append({"title": title, "charts": drawn})
    rest = [key for key in logged if key not in used and not key.startswith("alarm/")]
    if rest:
        groups.append(
            {"title": "Other metrics", "charts": [_chart(key, "", [key], records, before) for key in sorted(rest)]}
        )
    return groups


def _chart(title: str, unit: str, keys: Sequence[str], records: Columns, before: Mapping[str, float]) -> dict[str, Any]:
    return {"title": title, "unit": unit, "series": [series(key, records, before) for key in keys]}


def series(key: str, records: Columns, before: Mapping[str, float]) -> dict[str, Any]:
    """A curve: {"label", "x", "y", "points"}; y is None where the value is not finite. Values measured now and then,
    on held-out rows, are single points."""
    steps, values = _from_start(records, before, key)
    kept = thin(values)
    return {
        "label": key,
        "x": steps[kept].tolist(),
        "y": [rounded(value) for value in values[kept].tolist()],
        "points": key.startswith("eval/"),
    }


def _from_start(records: Columns, before: Mapping[str, float], *keys: str) -> list[np.ndarray]:
    """`records.arrays`, with step 0 if `before` has all `keys`."""
    arrays = records.arrays(*keys)
    if not all(isinstance(before.get(key), float | int) for key in keys):
        return arrays
    start = [0, *(before[key] for key in keys)]
    return [np.concatenate([[first], array]) for first, array in zip(start, arrays, strict=True)]


def thin(values: np.ndarray, limit: int = POINTS) -> list[int]:
    """The positions of at most `limit` values: the first, the last, and the lowest and highest of each stretch, so that
    no extreme is lost; of a stretch where nothing is finite its first, which breaks the curve."""
    if len(values) <= limit:
        return list(range(len(values)))
    stretches = (limit - 2) // 2
    kept = {0, len(values) - 1}
    for i in range(stretches):
        begin, end = (k * len(values) // stretches for k in (i, i + 1))
        places = begin + np.flatnonzero(np.isfinite(values[begin:end]))
        if places.size:
            kept |= {int(places[values[places].argmin()]), int(places[values[places].argmax()])}
        else:  # the curve is broken there
            kept.add(begin)
    return sorted(kept)


def is_finite(value: Any) -> bool:
    """Return True for a number that is not nan or infinite."""
    return isinstance(value, float | int) and math.isfinite(value)


def rounded(value: float, digits: int = 5) -> float | int | None:
    """The value with `digits` significant digits; None if it is not finite."""
    if isinstance(value, int):
        return value
    short = float(f"{value:.{digits}g}")
    return None if not math.isfinite(short) else int(short) if short.is_integer() and abs(short) < 1e9 else short


def tradeoffs(records: Columns, before: Mapping[str, float]) -> list[dict[str, Any]]:
    """Score against KL and score against length, a point per record, training and held-out prompts."""
    found = []
    for title, unit, other, held_out in (
        ("Score against KL", "KL to the reference, nats per response", "objective/kl", "eval/kl"),
        ("Score against length", "mean length, tokens", "tokens/mean_length", "eval/mean_length"),
    ):
        points: list[tuple[int, float, float, int]] = []
        for style, keys, start in ((0, (other, "objective/scores"), {}), (1, (held_out, "eval/scores"), before)):
            arrays = _from_start(records, start, *keys)
            stride = -(-len(arrays[0]) // POINTS) or 1
            some = (array[::-1][::stride][::-1].tolist() for array in arrays)  # the last one is always there
            points += [(*row, style) for row in zip(*some, strict=True)]
        points = [p for p in points if math.isfinite(p[1]) and math.isfinite(p[2])]
        if len(points) > 1:
            last = max(step for step, *_ in points) or 1
            found.append(
                {
                    "title": title,
                    "xLabel": unit,
                    "yLabel": "score",
                    "x": [rounded(p[1]) for p in points],
                    "y": [rounded(p[2]) for p in points],
                    "styles": [p[3] for p in points],
                    "order": [rounded(p[0] / last, 3) for p in points],
                    "names": [("held out, " if p[3] else "") + f"step {p[0]}" for p in points],
                }
            )
    return found

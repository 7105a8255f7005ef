"""How good a reward model is on rows it has not learnt from, beside what their length alone would say."""

from dataclasses import dataclass
from typing import Any

import numpy as np

BINS = 10
KEYS: dict[str, tuple[str, ...]] = {
    "pairwise": ("ece", "length_accuracy"),
    "ties": ("accuracy", "margin", "ece", "length_accuracy"),
    "ranking": ("ece", "length_accuracy"),
    "classification": ("ece", "auc", "length_accuracy"),
    "regression": ("correlation",),
}
"""By loss: what `evaluation` finds that is a metric of a run too, as eval/KEY. With ties accuracy and margin too, in
place of the sums over a batch, in which ties count: they stand beside the accuracy of length, over the same pairs."""


@dataclass(frozen=True)
class HeldOut:
    """Scores of N rows with up to G responses each, best first, and what was said of them, as in `types.Responses`."""

    scores: np.ndarray  # f32 [N, G]
    real: np.ndarray  # bool [N, G]
    target: np.ndarray  # f32 [N]
    lengths: np.ndarray  # int [N, G]   response tokens


def evaluation(rows: HeldOut, loss: str) -> dict[str, Any]:
    """What `rows` say of a model trained by `loss`: numbers, lists and text, ready for JSON.

    Every pair of a ranking counts as one; ties are counted and left out. Lengths are in response tokens.
    """
    scores = rows.scores.astype(np.float64)
    made: dict[str, Any] = {"loss": loss}
    if loss == "classification":
        made |= _labelled(scores[:, 0], rows.target > 0, rows.lengths[:, 0])
    elif loss == "regression":
        made |= _scored(scores[:, 0], rows.target.astype(np.float64), rows.lengths[:, 0])
    else:
        better, worse = np.triu_indices(scores.shape[1], 1)
        both = (rows.real[:, better] & rows.real[:, worse]).ravel()
        tied = np.repeat(rows.target > 0, len(better)) if loss == "ties" else np.zeros(both.shape, bool)
        chosen, rejected, long, short = (
            values[:, side].ravel()[both & ~tied] for values in (scores, rows.lengths) for side in (better, worse)
        )
        made |= {"ties": int(tied.sum()), **_pairs(chosen, rejected, long, short)}
    kept = scores[rows.real]
    made["scores"] = {
        "mean": float(kept.mean()),
        "std": float(kept.std()),
        "mean_of_best": float(scores[:, 0].mean()),
        "std_of_best": float(scores[:, 0].std()),
        "length_correlation": correlation(kept, rows.lengths[rows.real]),
    }
    return made | {"histogram": _histogram(rows, loss, scores)}


def calibration(confidence: np.ndarray, correct: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error (https://arxiv.org/abs/1706.04599, eq. 3): sum over bins of their share of verdicts
    times |accuracy - mean confidence|; and the bins that are not empty.

    `confidence` [N] is that in the verdict of two, so at least 0.5: the bins are `BINS` of equal width from there to 1.
    """
    at = np.clip(((confidence - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    bins, error = [], 0.0
    for number in range(BINS):
        inside = at == number
        if inside.any():
            mean, right = float(confidence[inside].mean()), float(correct[inside].mean())
            low = 0.5 + number / (2 * BINS)
            bins.append({"from": low, "to": low + 0.5 / BINS, "count": int(inside.sum()), "confidence": mean,
                         "accuracy": right})  # fmt: skip
            error += float(inside.mean()) * abs(right - mean)
    return error, bins


def auc(scores: np.ndarray, good: np.ndarray) -> float:
    """Share of all (good, bad) where the good one scores higher, a tie half (Mann-Whitney,
    https://doi.org/10.1214/aoms/1177730491); 0.5 where there are only good or only bad ones."""
    bad = np.sort(scores[~good])
    below, up_to = np.searchsorted(bad, scores[good], "left"), np.searchsorted(bad, scores[good], "right")
    total = len(bad) * int(good.sum())
    return float((below + up_to).sum() / (2 * total)) if total else 0.5


def correlation(a: np.ndarray, b: np.ndarray) -> float:
    """Pearson's; 0 where one of the two does not vary."""
    return float(np.corrcoef(a, b)[0, 1]) if len(a) > 1 and np.ptp(a) > 0 and np.ptp(b) > 0 else 0.0


def summary(made: dict[str, Any]) -> list[str]:
    """An evaluation in a few lines."""
    if made["loss"] == "regression":
        first = (
            f"held out: {made['responses']} responses, mean absolute error {made['absolute_error']:.3f} (of the mean "
            f"score {made['baseline_absolute_error']:.3f}), correlation {made['correlation']:.3f}"
        )
        return [first, _about_length(made)]
    lines = [f"held out: {made.get('pairs', made.get('responses'))} {'pairs' if 'pairs' in made else 'responses'}, "
             f"accuracy {made['accuracy']:.3f}, ECE {made['ece']:.3f}"]  # fmt: skip
    lines[0] += f", AUC {made['auc']:.3f}" if "auc" in made else f", margin {made['margin']:.3f}"
    by = "; ".join(f"{name} {part['accuracy']:.3f} of {part['count']}" for name, part in made["by_length"].items())
    lines.append(f"accuracy of length alone ({made['length_rule']}): {made['length_accuracy']:.3f}")
    return [*lines, f"accuracy by length: {by}", _about_length(made)]


def _about_length(made: dict[str, Any]) -> str:
    about = made["scores"]
    return (
        f"scores: mean {about['mean']:.3f}, std {about['std']:.3f}, correlation with length "
        f"{about['length_correlation']:.3f}"
    )


def _pairs(chosen: np.ndarray, rejected: np.ndarray, long: np.ndarray, short: np.ndarray) -> dict[str, Any]:
    difference, right = chosen - rejected, chosen > rejected
    error, bins = calibration(_sigmoid(np.abs(difference)), right)
    longer, shorter = float((long > short).mean()), float((long < short).mean())
    groups = {"chosen longer": long > short, "chosen shorter": long < short, "same length": long == short}
    return {
        "pairs": len(chosen),
        "accuracy": float(right.mean()),
        "margin": float(difference.mean()),
        "margin_std": float(difference.std()),
        "ece": error,
        "length_rule": "longer is better" if longer >= shorter else "shorter is better",
        "length_accuracy": max(longer, shorter),
        "by_length": _by(groups, right) | _by_tercile((long + short) / 2, right),
        "calibration": bins,
    }


def _labelled(scores: np.ndarray, good: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    right = np.where(good, scores, -scores) > 0
    error, bins = calibration(_sigmoid(np.abs(scores)), right)
    longer = auc(lengths.astype(np.float64), good)
    return {
        "responses": len(scores),
        "good": int(good.sum()),
        "accuracy": float(right.mean()),
        "majority_accuracy": float(max(good.mean(), 1 - good.mean())),
        "auc": auc(scores, good),
        "ece": error,
        "length_rule": f"{'longer' if longer >= 0.5 else 'shorter'} is better, of a good and a bad one",
        "length_accuracy": max(longer, 1 - longer),
        "by_length": _by_tercile(lengths, right),
        "calibration": bins,
    }


def _scored(scores: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    return {
        "responses": len(scores),
        "absolute_error": float(np.abs(scores - targets).mean()),
        "baseline_absolute_error": float(np.abs(targets.mean() - targets).mean()),
        "correlation": correlation(scores, targets),
        "target_length_correlation": correlation(targets, lengths),
    }


def _by(groups: dict[str, np.ndarray], right: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        name: {"count": int(inside.sum()), "accuracy": float(right[inside].mean())}
        for name, inside in groups.items()
        if inside.any()
    }


def _by_tercile(lengths: np.ndarray, right: np.ndarray) -> dict[str, dict[str, float]]:
    low, high = np.quantile(lengths, [1 / 3, 2 / 3])
    groups = {
        f"up to {low:.4g} tokens": lengths <= low,
        f"{low:.4g} to {high:.4g} tokens": (lengths > low) & (lengths <= high),
        f"over {high:.4g} tokens": lengths > high,
    }
    return _by(groups, right)


def _histogram(rows: HeldOut, loss: str, scores: np.ndarray) -> dict[str, list[float]]:
    kept = scores[rows.real]
    edges = np.histogram_bin_edges(kept, 20)
    if loss == "classification":
        good = rows.target > 0
        parts = {"good": scores[good, 0], "bad": scores[~good, 0]}
    elif loss == "regression":
        parts = {"responses": kept}
    else:
        parts = {"best": scores[:, 0], "others": scores[:, 1:][rows.real[:, 1:]]}
    counts = {name: np.histogram(values, edges)[0].tolist() for name, values in parts.items()}
    return {"edges": edges.tolist(), **counts}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))

"""Metrics of a reward model on held-out rows, compared with a baseline that knows only the response lengths."""

from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.errors import counted
from jaxrlhf.metrics.statistics import correlation

BINS = 10
KEYS: dict[str, tuple[str, ...]] = {
    "pairwise": ("ece", "length_accuracy"),
    "ties": ("accuracy", "margin", "ece", "length_accuracy"),
    "ranking": ("ece", "length_accuracy"),
    "classification": ("ece", "auc", "length_accuracy"),
    "regression": ("correlation",),
}
"""By loss: results of `evaluation` that are logged as metrics eval/KEY. With ties these include accuracy and margin,
because the batch-wise metrics count ties and `length_accuracy` does not."""


@dataclass(frozen=True)
class HeldOut:
    """Scores of N rows with up to G responses each, best first; padding and targets as in `types.Responses`."""

    scores: np.ndarray  # f32 [N, G]
    real: np.ndarray  # bool [N, G]
    target: np.ndarray  # f32 [N]
    lengths: np.ndarray  # int [N, G]   response tokens


def evaluation(rows: HeldOut, loss: str) -> dict[str, Any]:
    """Evaluate scores of a model trained with `loss`; the result is a JSON object.

    Every pair of a ranking counts as one pair; ties are counted and left out. Lengths are in response tokens.
    """
    scores = rows.scores.astype(np.float64)
    result: dict[str, Any] = {"loss": loss}
    if loss == "classification":
        result |= _classification(scores[:, 0], rows.target > 0, rows.lengths[:, 0])
    elif loss == "regression":
        result |= _regression(scores[:, 0], rows.target.astype(np.float64), rows.lengths[:, 0])
    else:
        better, worse = np.triu_indices(scores.shape[1], 1)
        real = (rows.real[:, better] & rows.real[:, worse]).ravel()
        tied = np.repeat(rows.target > 0, len(better)) if loss == "ties" else np.zeros(real.shape, bool)
        chosen, rejected, chosen_lengths, rejected_lengths = (
            values[:, side].ravel()[real & ~tied] for values in (scores, rows.lengths) for side in (better, worse)
        )
        result |= {"ties": int(tied.sum()), **_pairs(chosen, rejected, chosen_lengths, rejected_lengths)}
    real_scores = scores[rows.real]
    result["scores"] = {
        "mean": float(real_scores.mean()),
        "std": float(real_scores.std()),
        "mean_of_best": float(scores[:, 0].mean()),
        "std_of_best": float(scores[:, 0].std()),
        "length_correlation": correlation(real_scores, rows.lengths[rows.real]),
    }
    return result | {"histogram": _histogram(rows, loss, scores)}


def calibration(confidence: np.ndarray, correct: np.ndarray) -> tuple[float, list[dict[str, float]]]:
    """Expected calibration error (https://arxiv.org/abs/1706.04599, eq. 3), and the bins that are not empty.

    The error is the sum over bins of (share of rows) * |accuracy - mean confidence|. `confidence` [N] is the
    probability of the predicted one of two outcomes, at least 0.5: `BINS` bins of equal width cover [0.5, 1].
    """
    bin_of_row = np.clip(((confidence - 0.5) * 2 * BINS).astype(int), 0, BINS - 1)
    bins, error = [], 0.0
    for number in range(BINS):
        inside = bin_of_row == number
        if inside.any():
            mean, accuracy = float(confidence[inside].mean()), float(correct[inside].mean())
            low, count = 0.5 + number / (2 * BINS), int(inside.sum())
            span = {"from": low, "to": low + 0.5 / BINS}
            bins.append(span | {"count": count, "confidence": mean, "accuracy": accuracy})
            error += float(inside.mean()) * abs(accuracy - mean)
    return error, bins


def auc(scores: np.ndarray, good: np.ndarray) -> float:
    """Share of all (good, bad) pairs where the good one scores higher, a tie counts half; 0.5 if there are no pairs.

    This is the Mann-Whitney statistic (https://doi.org/10.1214/aoms/1177730491).
    """
    bad = np.sort(scores[~good])
    below, up_to = np.searchsorted(bad, scores[good], "left"), np.searchsorted(bad, scores[good], "right")
    total = len(bad) * int(good.sum())
    return float((below + up_to).sum() / (2 * total)) if total else 0.5


def summary(result: dict[str, Any]) -> list[str]:
    """Format an evaluation in a few lines for the console."""
    scores = result["scores"]
    score_line = (
        f"scores: mean {scores['mean']:.3f}, std {scores['std']:.3f}, correlation with length "
        f"{scores['length_correlation']:.3f}"
    )
    if result["loss"] == "regression":
        return [
            f"held out: {result['responses']} responses, mean absolute error {result['absolute_error']:.3f} (always "
            f"predicting the mean target: {result['baseline_absolute_error']:.3f}), correlation with the target "
            f"{result['correlation']:.3f}",
            score_line,
        ]
    if "pairs" in result:
        count, extra = counted(result["pairs"], "pair"), f"margin {result['margin']:.3f}"
    else:
        count, extra = f"{result['responses']} responses", f"AUC {result['auc']:.3f}"
    by_length = "; ".join(
        f"{name} {part['accuracy']:.3f} of {part['count']}" for name, part in result["by_length"].items()
    )
    return [
        f"held out: {count}, accuracy {result['accuracy']:.3f}, ECE {result['ece']:.3f}, {extra}",
        f"accuracy of length alone ({result['length_rule']}): {result['length_accuracy']:.3f}",
        f"accuracy by length: {by_length}",
        score_line,
    ]


def _pairs(
    chosen: np.ndarray, rejected: np.ndarray, chosen_lengths: np.ndarray, rejected_lengths: np.ndarray
) -> dict[str, Any]:
    margins, correct = chosen - rejected, chosen > rejected
    error, bins = calibration(_sigmoid(np.abs(margins)), correct)
    groups = {
        "chosen longer": chosen_lengths > rejected_lengths,
        "chosen shorter": chosen_lengths < rejected_lengths,
        "same length": chosen_lengths == rejected_lengths,
    }
    longer, shorter = float(groups["chosen longer"].mean()), float(groups["chosen shorter"].mean())
    return {
        "pairs": len(chosen),
        "accuracy": float(correct.mean()),
        "margin": float(margins.mean()),
        "margin_std": float(margins.std()),
        "ece": error,
        "length_rule": "longer is better" if longer >= shorter else "shorter is better",
        "length_accuracy": max(longer, shorter),
        "by_length": _accuracy_by(groups | _terciles((chosen_lengths + rejected_lengths) / 2), correct),
        "calibration": bins,
    }


def _classification(scores: np.ndarray, good: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    correct = np.where(good, scores, -scores) > 0
    error, bins = calibration(_sigmoid(np.abs(scores)), correct)
    longer = auc(lengths.astype(np.float64), good)
    return {
        "responses": len(scores),
        "good": int(good.sum()),
        "accuracy": float(correct.mean()),
        "majority_accuracy": float(max(good.mean(), 1 - good.mean())),
        "auc": auc(scores, good),
        "ece": error,
        "length_rule": f"{'longer' if longer >= 0.5 else 'shorter'} is better, of a good and a bad one",
        "length_accuracy": max(longer, 1 - longer),
        "by_length": _accuracy_by(_terciles(lengths), correct),
        "calibration": bins,
    }


def _regression(scores: np.ndarray, targets: np.ndarray, lengths: np.ndarray) -> dict[str, Any]:
    return {
        "responses": len(scores),
        "absolute_error": float(np.abs(scores - targets).mean()),
        "baseline_absolute_error": float(np.abs(targets.mean() - targets).mean()),
        "correlation": correlation(scores, targets),
        "target_length_correlation": correlation(targets, lengths),
    }


def _terciles(lengths: np.ndarray) -> dict[str, np.ndarray]:
    low, high = np.quantile(lengths, [1 / 3, 2 / 3])
    return {
        f"up to {low:.4g} tokens": lengths <= low,
        f"{low:.4g} to {high:.4g} tokens": (lengths > low) & (lengths <= high),
        f"over {high:.4g} tokens": lengths > high,
    }


def _accuracy_by(groups: dict[str, np.ndarray], correct: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        name: {"count": int(inside.sum()), "accuracy": float(correct[inside].mean())}
        for name, inside in groups.items()
        if inside.any()
    }


def _histogram(rows: HeldOut, loss: str, scores: np.ndarray) -> dict[str, list[float]]:
    """Counts of the scores in 20 bins, by kind of response."""
    if loss == "classification":
        good = rows.target > 0
        kinds = {"good": scores[good, 0], "bad": scores[~good, 0]}
    elif loss == "regression":
        kinds = {"responses": scores[rows.real]}
    else:
        kinds = {"best": scores[:, 0], "others": scores[:, 1:][rows.real[:, 1:]]}
    edges = np.histogram_bin_edges(scores[rows.real], 20)
    return {"edges": edges.tolist(), **{kind: np.histogram(x, edges)[0].tolist() for kind, x in kinds.items()}}


def _sigmoid(x: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-x))

"""Reward model metrics of known scores, against counts in Python."""

import itertools
import json

import numpy as np
import pytest

from jaxrlhf.evaluation.reward_metrics import KEYS, HeldOut, auc, calibration, evaluation, summary
from jaxrlhf.metrics.keys import METRICS

RNG = np.random.default_rng(0)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def pairs(scores, lengths, target=None):
    n, g = scores.shape
    target = np.zeros(n) if target is None else target
    return HeldOut(scores.astype(np.float32), np.ones((n, g), bool), target.astype(np.float32), lengths)


def test_calibration_error_by_counting_and_of_calibrated_outcomes():
    confidence, correct = RNG.uniform(0.5, 1, 200), RNG.random(200) < 0.7
    wanted = 0.0
    for k in range(10):
        inside = [i for i in range(200) if 0.5 + k / 20 <= confidence[i] < 0.5 + (k + 1) / 20]
        wanted += abs(sum(correct[i] - confidence[i] for i in inside)) / 200
    error, bins = calibration(confidence, correct)
    assert error == pytest.approx(wanted) and sum(b["count"] for b in bins) == 200
    honest = RNG.uniform(0.5, 1, 20000)
    assert calibration(honest, RNG.random(20000) < honest)[0] < 0.02, "outcomes as likely as was said"
    assert (
        calibration(np.ones(4), np.zeros(4, bool))[0] == 1 and calibration(np.full(4, 0.5), np.ones(4, bool))[0] == 0.5
    )


def test_auc_counts_every_good_and_bad_one():
    scores, good = RNG.integers(0, 6, 40).astype(float), RNG.random(40) < 0.4
    wins = [(a > b) + 0.5 * (a == b) for a, b in itertools.product(scores[good], scores[~good])]
    assert auc(scores, good) == pytest.approx(np.mean(wins))
    assert auc(scores, np.ones(40, bool)) == 0.5


def test_accuracy_by_length_and_the_length_baseline():
    scores, lengths = RNG.normal(size=(60, 2)), RNG.integers(1, 9, (60, 2))
    made = evaluation(pairs(scores, lengths), "pairwise")
    right = (scores[:, 0] > scores[:, 1]).tolist()
    assert made["accuracy"] == pytest.approx(sum(right) / 60)
    assert made["margin"] == pytest.approx(np.mean([a - b for a, b in scores]), abs=1e-6)
    longer = [a > b for a, b in lengths]
    shorter = [a < b for a, b in lengths]
    assert made["length_accuracy"] == pytest.approx(max(sum(longer), sum(shorter)) / 60)
    assert made["length_rule"] == ("longer is better" if sum(longer) >= sum(shorter) else "shorter is better")
    kept = [r for r, is_longer in zip(right, longer, strict=True) if is_longer]
    assert made["by_length"]["chosen longer"] == {"count": len(kept), "accuracy": pytest.approx(np.mean(kept))}
    assert sum(part["count"] for name, part in made["by_length"].items() if "tokens" in name) == 60
    by_length = evaluation(pairs(lengths.astype(float), lengths), "pairwise")
    assert by_length["scores"]["length_correlation"] == pytest.approx(1)
    assert by_length["by_length"]["chosen longer"]["accuracy"] == 1, "a model that scores length"
    assert by_length["by_length"]["chosen shorter"]["accuracy"] == 0
    assert sum(made["histogram"]["best"]) == sum(made["histogram"]["others"]) == 60


def test_ties_are_left_out_and_a_ranking_counts_all_its_pairs():
    scores, lengths = np.array([[1.0, 0.0], [0.0, 9.0]]), np.ones((2, 2), int)
    made = evaluation(pairs(scores, lengths, np.array([0, 1])), "ties")
    assert (made["pairs"], made["ties"], made["accuracy"], made["margin"]) == (1, 1, 1.0, 1.0)
    assert {"accuracy", "margin"} <= {*KEYS["ties"]}, "the sums over a batch take ties in"
    assert made["ece"] == pytest.approx(1 - sigmoid(1.0))
    scores = np.array([[3.0, 2.0, 1.0], [0.0, 1.0, 50.0]])
    rows = pairs(scores, np.ones((2, 3), int))
    rows.real[1, 2] = False
    made = evaluation(rows, "ranking")
    assert (made["pairs"], made["accuracy"]) == (4, 0.75)


@pytest.mark.parametrize("loss", KEYS)
def test_the_evaluation_is_json_and_its_metrics_are_defined(loss):
    scores = RNG.normal(size=(9, 1 if loss in ("classification", "regression") else 3))
    scores = scores[:, :2] if loss in ("pairwise", "ties") else scores
    target = np.arange(9) % 2 if loss != "regression" else np.arange(9)
    target = target if loss != "pairwise" else np.zeros(9)
    made = evaluation(pairs(scores, RNG.integers(1, 9, scores.shape), target), loss)
    assert json.loads(json.dumps(made, allow_nan=False)) == made
    assert all(f"eval/{key}" in METRICS and np.isfinite(made[key]) for key in KEYS[loss])
    assert all("nan" not in line for line in summary(made))
    if loss == "classification":
        assert made["accuracy"] == np.mean((scores[:, 0] > 0) == (target > 0))
    if loss == "regression":
        assert made["absolute_error"] == pytest.approx(np.abs(scores[:, 0] - target).mean(), rel=1e-6)
        assert made["correlation"] == pytest.approx(np.corrcoef(scores[:, 0], target)[0, 1], rel=1e-5)

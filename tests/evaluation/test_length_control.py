"""The length-controlled win rate against a general optimizer, simulated data and limits that are known."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from jaxrlhf.evaluation.length_control import PENALTY, length_controlled_win_rate


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rate(outcomes, differences):
    outcomes, differences = np.asarray(outcomes, float), np.asarray(differences, float)
    found, phi = length_controlled_win_rate(outcomes, differences, np.ones((1, len(outcomes))))
    return float(found[0]), float(phi[0])


def by_optimizer(outcomes, differences):
    y, d = np.asarray(outcomes, float), np.asarray(differences, float)
    x = np.tanh(d / d.std())

    def loss(parameters):
        p = np.clip(sigmoid(parameters[0] + parameters[1] * x), 1e-300, 1 - 1e-16)
        return -np.sum(y * np.log(p) + (1 - y) * np.log(1 - p)) + PENALTY / 2 * parameters[1] ** 2

    found = minimize(loss, [0.0, 0.0], method="Nelder-Mead", options={"xatol": 1e-10, "fatol": 1e-13, "maxiter": 9000})
    return sigmoid(found.x[0]), found.x[1]


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-300, 300)), min_size=4, max_size=30))
def test_it_is_the_optimum(rows):
    outcomes, differences = zip(*rows, strict=True)
    if np.std(differences) == 0 or np.mean(outcomes) in (0, 1):
        return
    assert rate(outcomes, differences)[0] == pytest.approx(by_optimizer(outcomes, differences)[0], abs=2e-4)


def test_simulated_preferences_give_the_rate_that_made_them():
    """A model that would win 40 % at equal length, and writes longer answers, which the judge likes."""
    rng = np.random.default_rng(0)
    d = rng.normal(60, 80, 40_000)
    truth, phi = 0.4, 1.5
    p = sigmoid(np.log(truth / (1 - truth)) + phi * np.tanh(d / d.std()))
    y = (rng.random(len(d)) < p).astype(float)
    assert y.mean() > 0.55, "the raw win rate hides it"
    found = rate(y, d)
    assert found[0] == pytest.approx(truth, abs=0.015) and found[1] == pytest.approx(phi, abs=0.08)


def test_resampled_prompts_are_repeated_prompts():
    rng = np.random.default_rng(3)
    y, d = rng.choice([0.0, 0.5, 1.0], 12), rng.normal(10, 30, 12)
    counts = rng.multinomial(12, np.full(12, 1 / 12), 5).astype(float)
    found, _ = length_controlled_win_rate(y, d, counts)
    for value, count in zip(found, counts.astype(int), strict=True):
        repeated = np.repeat(np.arange(12), count)
        assert value == pytest.approx(rate(y[repeated], d[repeated])[0], abs=1e-9)


def test_the_rival_has_the_complement():
    rng = np.random.default_rng(4)
    y, d = rng.choice([0.0, 0.5, 1.0], 50), rng.normal(10, 30, 50)
    assert rate(y, d)[0] == pytest.approx(1 - rate(1 - y, -d)[0], abs=1e-9)


@pytest.mark.parametrize("d", [[0, 0, 0, 0], [7, 7, 7, 7]])
def test_lengths_that_do_not_differ_leave_the_mean_outcome(d):
    assert rate([1, 1, 0.5, 0], d)[0] == pytest.approx(2.5 / 4)


def test_all_won_all_lost_all_tied_and_separated_by_length_are_finite():
    d = [5, -3, 8, 1]
    assert rate([1, 1, 1, 1], d) == (1.0, 0.0) and rate([0, 0, 0, 0], d) == (0.0, 0.0)
    assert rate([0.5] * 4, d) == pytest.approx((0.5, 0.0))
    found, phi = rate([1, 0, 1, 0, 1, 0], [9, -9, 7, -7, 8, -8])
    assert found == pytest.approx(0.5, abs=1e-6) and 0 < phi < 40, "longer always wins: nothing is left at equal length"

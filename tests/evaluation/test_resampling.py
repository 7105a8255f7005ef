"""Bootstrap intervals against the exact distribution over all resamples."""

import itertools

import numpy as np
import pytest

from jaxrlhf.evaluation import resampling
from jaxrlhf.evaluation.resampling import bootstrap_interval


def mean_of(values):
    return lambda counts: counts @ np.asarray(values, float) / len(values)


@pytest.mark.parametrize("values", [[0, 1, 5, 2.5], [0, 1, 1, 1], [3, 3, 3, 3], [-1, 0, 0.25, 8]])
def test_the_interval_is_that_of_all_resamples(values, monkeypatch):
    """All 4^4 resamples enumerated. Their distribution is discrete: the sampled quantile is an exact one of a level
    nearby."""
    monkeypatch.setattr(resampling, "RESAMPLES", 200_000)
    exact = [np.mean(drawn) for drawn in itertools.product(values, repeat=4)]
    found = bootstrap_interval(mean_of(values), 4)
    assert found is not None
    for level, bound in zip((0.025, 0.975), found, strict=True):
        assert np.quantile(exact, level - 0.002) - 1e-9 <= bound <= np.quantile(exact, level + 0.002) + 1e-9


def test_the_interval_is_the_same_each_time_and_in_any_number_of_parts(monkeypatch):
    values = np.random.default_rng(1).normal(size=300)
    first = bootstrap_interval(mean_of(values), 300)
    assert first == bootstrap_interval(mean_of(values), 300)
    monkeypatch.setattr(resampling, "_ALIVE", 7 * 300)
    assert bootstrap_interval(mean_of(values), 300) == pytest.approx(first)


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(200):
        low, high = bootstrap_interval(mean_of(rng.normal(1.0, 2.0, 40)), 40)
        covered.append(low <= 1.0 <= high)
    assert 0.88 < np.mean(covered) < 0.98


def test_one_prompt_has_no_interval():
    assert bootstrap_interval(mean_of([1.0]), 1) is None and bootstrap_interval(mean_of([1.0]), 0) is None

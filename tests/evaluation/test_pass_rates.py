"""pass@k against every subset of the completions."""

import itertools

import numpy as np
import pytest

from jaxrlhf.evaluation.pass_rates import numbers, pass_at_k


@pytest.mark.parametrize(("n", "c"), [(n, c) for n in range(1, 8) for c in range(n + 1)])
def test_it_is_the_share_of_subsets_with_a_pass(n, c):
    passes = [True] * c + [False] * (n - c)
    for k in range(1, n + 1):
        subsets = list(itertools.combinations(passes, k))
        assert pass_at_k(n, c, k) == pytest.approx(sum(map(any, subsets)) / len(subsets), abs=1e-15)


def test_it_is_unbiased():
    rng, p = np.random.default_rng(0), 0.3
    for k in (1, 4):
        found = [pass_at_k(10, c, k) for c in rng.binomial(10, p, 20_000)]
        assert np.mean(found) == pytest.approx(1 - (1 - p) ** k, abs=0.01)


def test_large_numbers_are_exact_and_more_than_there_are_is_refused():
    assert pass_at_k(1000, 1, 500) == pytest.approx(0.5)
    with pytest.raises(ValueError, match="pass@5 cannot be estimated from 4 completions"):
        pass_at_k(4, 2, 5)


def test_the_numbers_are_powers_of_two_and_all():
    assert [numbers(n) for n in (1, 2, 4, 6, 16)] == [[1], [1, 2], [1, 2, 4], [1, 2, 4, 6], [1, 2, 4, 8, 16]]

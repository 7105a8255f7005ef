import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import reward
from jaxrlhf.algorithms.reward import pairwise_loss


def test_pairwise_loss_is_minus_log_sigmoid():
    rng = np.random.default_rng(0)
    chosen, rejected = 3 * rng.normal(size=(2, 64)).astype(np.float32)
    chosen[:3], rejected[:3] = (60, -60, 1), (-60, 60, 1)  # sigmoid rounds to 1 and to 0; a tie
    margin = np.float64(chosen) - np.float64(rejected)
    loss, metrics = pairwise_loss(jnp.asarray(chosen), jnp.asarray(rejected), jnp.ones(64, bool), 64, 0.0)
    np.testing.assert_allclose(loss, np.mean(np.logaddexp(0, -margin)), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(margin > 0), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], margin.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_reward"], np.mean([chosen, rejected]), rtol=1e-4)


def test_gradient_is_finite_at_any_margin():
    margins = jnp.array([-1e4, -50.0, 0.0, 50.0, 1e4])
    gradient = jax.grad(lambda x: pairwise_loss(x, jnp.zeros(5), jnp.ones(5, bool), 1.0, 0.0)[0])(margins)
    np.testing.assert_allclose(gradient, [-1, -1, -0.5, 0, 0], atol=1e-6)


def test_micro_batches_add_up():
    chosen, rejected = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32))
    mask = jnp.ones(8, bool)
    whole = pairwise_loss(chosen, rejected, mask, 8, 0.0)
    parts = [pairwise_loss(chosen[i : i + 3], rejected[i : i + 3], mask[i : i + 3], 8, 0.0) for i in (0, 3, 6)]
    jax.tree.map(lambda w, *p: np.testing.assert_allclose(sum(p), w, rtol=1e-5), whole, *parts)


def test_what_is_no_pair_counts_for_nothing():
    chosen, rejected = np.random.default_rng(2).normal(size=(2, 6)).astype(np.float32)
    mask = np.array([[True, True, False], [True, False, False]])
    holes = [np.full((2, 3), np.nan, np.float32) for _ in range(2)]
    for hole, values in zip(holes, (chosen, rejected), strict=True):
        hole[mask] = values[:3]
    loss = jax.value_and_grad(
        lambda x: pairwise_loss(x, jnp.asarray(holes[1]), jnp.asarray(mask), 3, 0.0), has_aux=True
    )
    found, gradient = loss(jnp.asarray(holes[0]))
    wanted = pairwise_loss(jnp.asarray(chosen[:3]), jnp.asarray(rejected[:3]), jnp.ones(3, bool), 3, 0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
    assert (np.asarray(gradient) != 0).tolist() == mask.tolist()


REAL = np.array([True, False, True, True, True, False, True, True])
TIED = np.array([False, True, True, False, False, True, True, False])
MARGINS = np.where(REAL, np.linspace(0, 1, 8), np.nan)
OF_ROWS = {  # loss of scores [2, 8], and the same by its equation on one real row, in float64
    "pairwise": (
        lambda x, mask, n: reward.pairwise_loss(*x, mask, n, 0.2, jnp.asarray(MARGINS)),
        lambda c, r, i: -0.8 * np.log(sigmoid(c - r - MARGINS[i])) - 0.2 * np.log(sigmoid(r - c + MARGINS[i])),
    ),
    "centring": (lambda x, mask, n: (reward.centring_term(*x, mask, n), {}), lambda c, r, i: (c + r) ** 2),
    "ties": (
        lambda x, mask, n: reward.ties_loss(*x, jnp.asarray(TIED[: len(mask)]), mask, n, 0.4),
        lambda c, r, i: -np.log(rao_kupper(c, r)[1 if TIED[i] else 0]),
    ),
    "classification": (
        lambda x, mask, n: reward.classification_loss(x[0], jnp.asarray(TIED[: len(mask)]), mask, n),
        lambda c, r, i: -np.log(sigmoid(c) if TIED[i] else 1 - sigmoid(c)),
    ),
    "regression": (lambda x, mask, n: reward.regression_loss(*x, mask, n), lambda c, r, i: (c - r) ** 2),
    "ranking": (
        lambda x, mask, n: reward.ranking_loss(x.T, jnp.stack([mask, mask], 1), n),
        lambda c, r, i: -np.log(sigmoid(c - r)),
    ),
}


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def rao_kupper(c, r, nu=0.4):
    """Probabilities that the first is better, that they are equal, that the second is better."""
    theta, c, r = np.exp(nu), np.exp(c), np.exp(r)
    tie = c * r * (theta**2 - 1) / ((c + theta * r) * (theta * c + r))
    return c / (c + theta * r), tie, r / (r + theta * c)


def scores_case():
    return np.random.default_rng(3).normal(size=(2, 8)).astype(np.float32)


def mean_over_rows(row, scores):
    return np.mean([row(*np.float64(scores[:, i]), i) for i in np.flatnonzero(REAL)])


@pytest.mark.parametrize("name", OF_ROWS)
def test_loss_and_gradient_are_those_of_the_equation(name):
    """Rows outside the mask hold NaN."""
    loss, row = OF_ROWS[name]
    scores, mask = scores_case(), jnp.asarray(REAL)
    holes = jnp.asarray(np.where(REAL, scores, np.nan))
    (value, _), gradient = jax.value_and_grad(lambda x: loss(x, mask, 6), has_aux=True)(holes)
    np.testing.assert_allclose(value, mean_over_rows(row, scores), rtol=1e-5)
    expected = np.zeros((2, 8))
    for at in np.ndindex(2, 8):
        step = np.zeros((2, 8))
        step[at] = 1e-5
        expected[at] = (mean_over_rows(row, scores + step) - mean_over_rows(row, scores - step)) / 2e-5
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)


@pytest.mark.parametrize("name", OF_ROWS)
def test_the_first_row_and_the_others_add_up_to_all(name):
    loss, scores = OF_ROWS[name][0], jnp.asarray(scores_case())
    mask = jnp.asarray(REAL)
    parts = [loss(scores, mask & here, 6) for here in (jnp.arange(8) < 1, jnp.arange(8) >= 1)]
    jax.tree.map(lambda w, *p: np.testing.assert_allclose(sum(p), w, rtol=1e-5), loss(scores, mask, 6), *parts)


@pytest.mark.parametrize("name", OF_ROWS)
def test_finite_scores_give_finite_numbers(name):
    scores = jnp.array([[1e4, 0, -1e4, 5, -1e4, 0, 1e4, -1], [-1e4, 0, 1e4, 5, -1e4, 0, 1e4, 1]])
    for mask in (jnp.asarray(REAL), jnp.zeros(8, bool)):
        found = jax.value_and_grad(lambda x, m: OF_ROWS[name][0](x, m, 8), has_aux=True)(scores, mask)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found)), found


def test_probabilities_with_ties_sum_to_one():
    first, second = (x[:, None] for x in jnp.asarray(scores_case()))
    one = jnp.ones(1, bool)
    for a, b in zip(first, second, strict=True):
        outcomes = [(a, b, ~one), (a, b, one), (b, a, ~one)]
        np.testing.assert_allclose(sum(np.exp(-reward.ties_loss(*x, one, 1, 0.4)[0]) for x in outcomes), 1, rtol=1e-5)


def test_a_wide_band_makes_a_tie_certain_and_never_nan():
    scores, one = jnp.asarray(scores_case()), jnp.ones(8, bool)
    for nu in (20.0, 100.0):
        loss = jax.value_and_grad(lambda x, nu=nu: reward.ties_loss(*x, one, one, 8, nu)[0])(scores)
        np.testing.assert_allclose(loss[0], 0, atol=1e-4)
        np.testing.assert_allclose(loss[1], 0, atol=1e-4)


def test_without_ties_and_a_band_of_none_it_is_bradley_terry():
    scores, mask = jnp.asarray(scores_case()), jnp.asarray(REAL)
    ours, metrics = reward.ties_loss(*scores, jnp.zeros(8, bool), mask, 6, 0.0)
    wanted, theirs = pairwise_loss(*scores, mask, 6, 0.0)
    np.testing.assert_allclose(ours, wanted, rtol=1e-6)
    for key in theirs:
        np.testing.assert_allclose(metrics[key], theirs[key], rtol=1e-6)


def test_a_ranking_is_chosen_response_by_response():
    """Rankings of 4, 3, 2 and 1 responses; the last says nothing and does not count."""
    rng = np.random.default_rng(5)
    scores, lengths = rng.normal(size=(4, 4)), (4, 3, 2, 1)
    mask = np.arange(4) < np.array(lengths)[:, None]
    holes = jnp.asarray(np.where(mask, scores, np.nan).astype(np.float32))
    run = jax.value_and_grad(lambda x: reward.ranking_loss(x, jnp.asarray(mask), 3), has_aux=True)
    (loss, metrics), gradient = run(holes)
    losses, right = [], []
    for row, length in zip(scores, lengths[:3], strict=False):
        left, p = list(np.exp(row[:length])), 1.0
        while left:
            p *= left[0] / sum(left)
            left.pop(0)
        losses.append(-np.log(p))
        right.append(np.mean([row[i] > row[j] for i in range(length) for j in range(i + 1, length)]))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(right), rtol=1e-6)
    np.testing.assert_allclose(np.sum(gradient, axis=1), 0, atol=1e-6)  # only differences matter
    assert np.isfinite(gradient).all() and not np.any(gradient[~mask]) and not np.any(gradient[3])


def test_metrics_of_single_responses():
    scores, good = jnp.array([2.0, -1.0, 0.0, 3.0]), jnp.array([True, True, True, False])
    mask = jnp.array([True, True, True, False])
    metrics = reward.classification_loss(scores, good, mask, 3)[1]
    np.testing.assert_allclose(metrics["accuracy"], 1 / 3, rtol=1e-6)  # a score of 0 says neither
    np.testing.assert_allclose(metrics["mean_reward"], 1 / 3, rtol=1e-6)
    metrics = reward.regression_loss(scores, jnp.array([1.0, 1.0, 0.0, 9.0]), mask, 3)[1]
    np.testing.assert_allclose(metrics["absolute_error"], 1.0, rtol=1e-6)

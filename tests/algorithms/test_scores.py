"""Shaping of scores, against numpy in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.algorithms.scores import ScoreStats, no_stats, overlong_penalty, shaped
from jaxrlhf.config import Scores

BATCHES = st.lists(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=9), min_size=1, max_size=6)


@settings(max_examples=60, deadline=None)
@given(BATCHES)
def test_statistics_of_batches_are_those_of_all_scores_together(batches):
    stats = no_stats()
    for batch in batches:
        stats = stats.add(jnp.array(batch, jnp.float32))
    everything = np.concatenate([np.float64(batch) for batch in batches])
    assert stats.seen == len(everything)
    np.testing.assert_allclose(stats.mean, everything.mean(), rtol=1e-4, atol=1e-3)
    np.testing.assert_allclose(stats.squares, np.sum((everything - everything.mean()) ** 2), rtol=1e-3, atol=0.1)


def test_a_large_mean_does_not_drown_the_spread():
    """The textbook E[x^2] - E[x]^2 in float32 would give 0 or less here."""
    scores = np.float32(1e4) + np.random.default_rng(0).normal(size=(40, 16)).astype(np.float32)
    stats = no_stats()
    for batch in scores:
        stats = stats.add(jnp.asarray(batch))
    np.testing.assert_allclose(stats.squares / (scores.size - 1), np.float64(scores).var(ddof=1), rtol=1e-3)


def test_scores_that_are_not_finite_leave_the_statistics_alone():
    stats = no_stats().add(jnp.array([1.0, 3.0]))
    after = stats.add(jnp.array([jnp.nan, 5.0, jnp.inf]))
    assert after.seen == 3 and after.mean == 3


def run(scores, config, *, lengths=(3, 3, 3, 3), finished=(True,) * 4, stats=None, longest=6):
    mask = jnp.arange(longest) < jnp.array(lengths)[:, None]
    return shaped(
        jnp.array(scores, jnp.float32), mask, jnp.array(finished), stats or no_stats(), config=config, longest=longest
    )


def test_reference_normalisation_uses_the_statistics_as_they_are():
    stats = no_stats().add(jnp.array([1.0, 2.0, 3.0]))  # mean 2, deviation 1
    made, after = run([2.0, 3.0, 0.0, 2.5], Scores(normalise="reference"), stats=stats)
    np.testing.assert_allclose(made, [0, 1, -2, 0.5], atol=1e-6)
    jax.tree.map(np.testing.assert_array_equal, after, stats)


def test_running_normalisation_takes_the_new_scores_in_first():
    made, stats = run([0.0, 2.0, 4.0, 6.0], Scores(normalise="running"))
    assert isinstance(stats, ScoreStats) and stats.seen == 4
    np.testing.assert_allclose(made, (np.array([0, 2, 4, 6]) - 3) / np.std([0, 2, 4, 6], ddof=1), rtol=1e-6)


def test_scale_shift_then_clip():
    made, _ = run([-2.0, 0.0, 0.1, 5.0], Scores(scale=2.0, shift=0.5, clip=1.0))
    np.testing.assert_allclose(made, [-1, 0.5, 0.7, 1], rtol=1e-6)


def test_penalties_come_after_the_clip_so_that_they_always_count():
    made, _ = run([9.0] * 4, Scores(clip=1.0, missing_eos_penalty=3.0), finished=(True, False, True, False))
    np.testing.assert_allclose(made, [1, -2, 1, -2])


@pytest.mark.parametrize(("length", "cost"), [(0, 0), (60, 0), (80, 0), (85, -0.5), (90, -1), (100, -2)])
def test_overlong_penalty_counts_tokens_and_grows_linearly(length, cost):
    """DAPO's eq. 13, with L_max 100, a cache of 20 and a penalty of 2. Tunix counts characters here."""
    np.testing.assert_allclose(overlong_penalty(jnp.array([float(length)]), 100, 20, 2.0), [cost])
    made, _ = run([1.0] * 4, Scores(overlong_buffer=20, overlong_penalty=2.0), lengths=[length] * 4, longest=100)
    np.testing.assert_allclose(made, 1 + cost)

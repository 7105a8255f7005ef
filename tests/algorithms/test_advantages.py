import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.algorithms.advantages import gae, length_adaptive_lambda, reward_to_go, whiten


def ragged(seed, rows=7, columns=9):
    """Masks with every shape: random holes, an empty row, a full row, one lone token."""
    rng = np.random.default_rng(seed)
    mask = rng.random((rows, columns)) < 0.6
    mask[0], mask[1], mask[2] = False, True, False
    mask[2, 4] = True
    return rng, mask


def definition(rewards, values, mask, bootstrap, gamma, lam):
    """A_t = sum_{k >= 0} (gamma lam)^k delta_{t+k} over the real tokens of a row, in float64 and O(T^2)."""
    advantages = np.zeros(rewards.shape)
    for b, row in enumerate(mask):
        columns = np.flatnonzero(row)
        v = np.append(values[b, columns], bootstrap[b]).astype(np.float64)
        deltas = rewards[b, columns] + gamma * v[1:] - v[:-1]
        for i, column in enumerate(columns):
            advantages[b, column] = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[i:]))
    return advantages


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), gamma=st.floats(0.5, 1), lam=st.floats(0, 1), truncated=st.booleans())
def test_gae_is_the_definition(seed, gamma, lam, truncated):
    rng, mask = ragged(seed)
    rewards, values = rng.normal(size=(2, *mask.shape)).astype(np.float32)
    bootstrap = (rng.normal(size=len(mask)) if truncated else np.zeros(len(mask))).astype(np.float32)
    hidden = np.where(mask, 0, np.nan).astype(np.float32)  # what the mask hides must not be read
    inputs = (jnp.asarray(x) for x in (rewards + hidden, values + hidden, mask, bootstrap))
    advantages, returns = gae(*inputs, gamma, lam)
    expected = definition(rewards, values, mask, bootstrap, gamma, lam)
    np.testing.assert_allclose(advantages, expected, atol=2e-5)
    np.testing.assert_allclose(returns, np.where(mask, expected + values, 0), atol=2e-5)


def test_gae_with_lambda_one_is_the_discounted_sum_of_rewards():
    rng, mask = ragged(0)
    rewards, values = rng.normal(size=(2, *mask.shape)).astype(np.float32)
    _, returns = gae(*(jnp.asarray(x) for x in (rewards, values, mask)), jnp.zeros(len(mask)), 1.0, 1.0)
    to_go = np.cumsum((rewards * mask)[:, ::-1], axis=1)[:, ::-1]
    np.testing.assert_allclose(returns, np.where(mask, to_go, 0), atol=1e-5)


def test_lambda_may_follow_the_length_of_each_response():
    """arXiv 2504.05118: 1 - 1 / (alpha l), of the number of real tokens; at least 0."""
    rng, mask = ragged(3)
    rewards, values = rng.normal(size=(2, *mask.shape)).astype(np.float32)
    lam = length_adaptive_lambda(jnp.asarray(mask), 0.5)
    lengths = mask.sum(1)
    np.testing.assert_allclose(lam, [max(1 - 2 / n, 0) if n else 0 for n in lengths], rtol=1e-6)
    assert len(set(lengths)) > 3 and lam.max() > 0.7 and lam.min() == 0
    found, _ = gae(*(jnp.asarray(x) for x in (rewards, values, mask)), jnp.zeros(len(mask)), 0.9, lam)
    for i in range(len(mask)):
        row = slice(i, i + 1)
        expected = definition(rewards[row], values[row], mask[row], np.zeros(1), 0.9, float(lam[i]))
        np.testing.assert_allclose(found[row], expected, atol=1e-5)


def test_holes_are_as_if_they_were_not_there():
    rng = np.random.default_rng(1)
    rewards, values = rng.normal(size=(2, 1, 4)).astype(np.float32)
    bootstrap = jnp.array([0.7])
    dense, _ = gae(jnp.asarray(rewards), jnp.asarray(values), jnp.ones((1, 4), bool), bootstrap, 0.9, 0.8)
    mask = np.array([[True, False, True, True, False, False, True]])
    spread = np.full((2, *mask.shape), 99.0, np.float32)
    spread[:, mask] = np.stack([rewards, values])[:, 0]
    holes, _ = gae(*jnp.asarray(spread), jnp.asarray(mask), bootstrap, 0.9, 0.8)
    np.testing.assert_array_equal(np.asarray(holes)[mask], dense[0])


@pytest.mark.parametrize("shift_mean", [True, False])
def test_whiten_is_numpy(shift_mean):
    rng, mask = ragged(3)
    x = (5 + 3 * rng.normal(size=mask.shape)).astype(np.float32)
    real = x[mask].astype(np.float64)
    expected = (real - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8) + (0 if shift_mean else real.mean())
    whitened = np.asarray(whiten(jnp.where(mask, x, jnp.inf), jnp.asarray(mask), shift_mean))
    np.testing.assert_allclose(whitened[mask], expected, atol=1e-5)
    assert not whitened[~mask].any()


def test_whiten_survives_a_large_mean():
    """E[x^2] - E[x]^2 in float32 would lose every digit here."""
    x = 1e4 + np.random.default_rng(0).normal(size=(4, 64)).astype(np.float32)
    whitened = np.asarray(whiten(jnp.asarray(x), jnp.ones(x.shape, bool), True))
    assert abs(whitened.std(ddof=1) - 1) < 1e-3 and abs(whitened.mean()) < 1e-2


@pytest.mark.parametrize("real", [0, 1, 5])
def test_whiten_is_finite_without_variance(real):
    mask = jnp.arange(8) < real
    assert not np.asarray(whiten(jnp.full(8, 2.5), mask, True)).any()
    np.testing.assert_allclose(whiten(jnp.full(8, 2.5), mask, False), np.where(mask, 2.5, 0))
    gradient = jax.grad(lambda x: jnp.sum(whiten(x, mask, True) ** 2))(jnp.where(mask, 2.5, jnp.nan))
    assert np.isfinite(gradient).all()


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**16), st.sampled_from([1.0, 0.9, 0.5]))
def test_reward_to_go_is_the_discounted_sum_over_the_real_tokens_to_come(seed, gamma):
    rng = np.random.default_rng(seed)
    rewards, mask = rng.normal(size=(3, 6)).astype(np.float32), rng.random((3, 6)) < 0.7
    bootstrap = rng.normal(size=3).astype(np.float32)
    found = reward_to_go(jnp.asarray(rewards), jnp.asarray(mask), jnp.asarray(bootstrap), gamma)
    for row in range(3):
        real = np.flatnonzero(mask[row])
        for i, column in enumerate(real):
            later = sum(gamma**k * float(rewards[row, c]) for k, c in enumerate(real[i:]))
            expected = later + gamma ** (len(real) - i) * float(bootstrap[row])
            np.testing.assert_allclose(found[row, column], expected, atol=1e-5)
    assert not np.asarray(found)[~mask].any()

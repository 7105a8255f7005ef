"""Tokens selected over a rollout, against loops in NumPy; and the adaptive entropy bonus."""

import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms import token_selection
from jaxrlhf.algorithms.entropy import EntropyControl


def ragged(seed=0):
    rng = np.random.default_rng(seed)
    mask = np.arange(9) < rng.integers(0, 10, 12)[:, None]
    return (mask, *rng.normal(size=(3, *mask.shape)).astype(np.float32))


def test_the_share_of_tokens_with_the_highest_entropy():
    mask, entropy, *_ = ragged()
    found = np.asarray(token_selection.high_entropy(jnp.where(mask, entropy, jnp.nan), jnp.asarray(mask), 0.25))
    assert not found[~mask].any() and found.sum() == np.ceil(0.25 * mask.sum())
    assert entropy[found].min() > entropy[mask & ~found].max()
    np.testing.assert_array_equal(token_selection.high_entropy(jnp.asarray(entropy), jnp.asarray(mask), 1.0), mask)


def test_covariances_are_those_of_all_tokens():
    """Over micro-batches the means would be others: their parts do not add up to the whole."""
    mask, logprobs, advantages, _ = ragged()
    found = token_selection.covariances(jnp.where(mask, logprobs, jnp.nan), jnp.asarray(advantages), jnp.asarray(mask))
    real = np.float64(logprobs[mask]), np.float64(advantages[mask])
    np.testing.assert_allclose(
        np.asarray(found)[mask], (real[0] - real[0].mean()) * (real[1] - real[1].mean()), atol=1e-6
    )
    np.testing.assert_allclose(np.asarray(found)[mask].mean(), np.cov(*real, ddof=0)[0, 1], atol=1e-6)
    assert not np.asarray(found)[~mask].any()


def test_kl_cov_selects_the_highest_covariances_and_at_least_one_token():
    mask, covariance, *_ = ragged(1)
    for ratio, number in ((0.2, int(0.2 * mask.sum())), (1e-6, 1)):
        found = np.asarray(token_selection.kl_cov(jnp.asarray(covariance), jnp.asarray(mask), ratio))
        assert found.sum() == number and covariance[found].min() > covariance[mask & ~found].max()
        assert not found[~mask].any()


def test_clip_cov_selects_candidates_at_random():
    mask, covariance, noise, other = ragged(2)
    candidates = mask & (covariance > 0.2) & (covariance < 1.0)
    arrays = jnp.asarray(covariance), jnp.asarray(mask)
    found = np.asarray(token_selection.clip_cov(*arrays, jnp.asarray(noise), 0.1, 0.2, 1.0))
    assert found.sum() == int(0.1 * mask.sum()) < candidates.sum() and not found[~candidates].any()
    assert noise[found].max() < noise[candidates & ~found].min()
    assert np.any(found != np.asarray(token_selection.clip_cov(*arrays, jnp.asarray(other), 0.1, 0.2, 1.0)))
    every = token_selection.clip_cov(*arrays, jnp.asarray(noise), 0.9, 0.2, 1.0)
    np.testing.assert_array_equal(every, candidates)
    assert not np.any(token_selection.clip_cov(*arrays, jnp.asarray(noise), 0.1, 90.0, 91.0))


def test_padding_selects_nothing_and_changes_nothing():
    mask, covariance, noise, _ = ragged(3)
    padded = [jnp.pad(jnp.asarray(x), ((0, 0), (0, 4)), constant_values=np.inf) for x in (covariance, noise)]
    wide = jnp.pad(jnp.asarray(mask), ((0, 0), (0, 4)))
    plain = jnp.asarray(covariance), jnp.asarray(mask)
    for found, expected in (
        (token_selection.kl_cov(padded[0], wide, 0.2), token_selection.kl_cov(*plain, 0.2)),
        (
            token_selection.clip_cov(padded[0], wide, padded[1], 0.1, 0.2, 1.0),
            token_selection.clip_cov(*plain, jnp.asarray(noise), 0.1, 0.2, 1.0),
        ),
        (token_selection.high_entropy(padded[0], wide, 0.3), token_selection.high_entropy(*plain, 0.3)),
    ):
        np.testing.assert_array_equal(found, jnp.pad(expected, ((0, 0), (0, 4))))


def test_the_entropy_coefficient_follows_the_target():
    """The loop of TRL 1.8.0's GRPOTrainer, whose bonus of a step is decided by the entropy of the step before."""
    control, coef, last = EntropyControl(jnp.float32(0.01), jnp.float32(0)), 0.01, np.inf
    for entropy in (0.5, 0.19, 0.2, 0.1, 0.3, 0.4, 0.5, 0.1, 0.1, 0.1, 0.1, 0.1, 0.1):
        np.testing.assert_allclose(control.applied, coef if last <= 0.2 else 0.0, atol=1e-7)
        control = control.after(jnp.float32(entropy), 0.2, 0.005, 0.002, 0.03)
        coef = min(coef + 0.005, 0.03) if entropy <= 0.2 else max(coef - 0.005, 0.002)
        last = entropy
        np.testing.assert_allclose(control.coef, coef, atol=1e-7)
    assert control.coef == np.float32(0.03)
    same = control.after(jnp.float32(np.nan), 0.2, 0.005, 0.002, 0.03)
    assert same == control

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.kl import k1, k2, k3


def categorical(shift, size=12):
    """Log-probabilities of a policy and of a reference `shift` away from it."""
    rng = np.random.default_rng(0)
    logits = rng.normal(size=size)
    return jax.nn.log_softmax(jnp.asarray(logits + shift * rng.normal(size=size))), jax.nn.log_softmax(logits)


@pytest.mark.parametrize("shift", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("estimator", [k1, k3])
def test_the_unbiased_estimators_average_to_the_exact_kl(estimator, shift):
    policy, reference = categorical(shift)
    exact = np.sum(np.exp(np.float64(policy)) * (np.float64(policy) - np.float64(reference)))
    average = jnp.sum(jnp.exp(policy) * estimator(policy, reference))
    np.testing.assert_allclose(average, exact, atol=1e-6)


def test_k3_is_never_negative_and_keeps_its_digits():
    d = np.array([-3.0, -1e-3, -1e-5, 0.0, 1e-5, 1e-3, 3.0], np.float32)
    exact = np.expm1(-d.astype(np.float64)) + d
    estimate = np.asarray(k3(jnp.asarray(d), jnp.zeros(d.shape)))
    assert (estimate >= 0).all() and estimate[3] == 0
    np.testing.assert_allclose(estimate, exact, rtol=2e-3)


def exact_gradient(logits, reference):
    return jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * (jax.nn.log_softmax(x) - reference)))(logits)


@pytest.mark.parametrize("shift", [0.05, 0.5])
def test_k1_as_a_reward_and_k2_as_a_loss_have_the_gradient_of_the_kl(shift):
    policy, reference = categorical(shift)
    exact = exact_gradient(policy, reference)
    weights = jnp.exp(policy)  # the sampler: held fixed

    def as_reward(logits, estimator):
        reward = estimator(policy, reference)
        return jnp.sum(weights * reward * jax.nn.log_softmax(logits))

    def as_loss(logits, estimator):
        return jnp.sum(weights * estimator(jax.nn.log_softmax(logits), reference))

    np.testing.assert_allclose(jax.grad(as_reward)(policy, k1), exact, atol=1e-6)
    np.testing.assert_allclose(jax.grad(as_loss)(policy, k2), exact, atol=1e-6)
    # and the pairs the trainers must not offer
    assert np.linalg.norm(jax.grad(as_reward)(policy, k3)) < 0.5 * np.linalg.norm(exact)
    assert np.linalg.norm(jax.grad(as_loss)(policy, k1)) < 1e-6

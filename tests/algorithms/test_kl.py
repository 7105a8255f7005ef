import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.kl import adaptive_kl_coef, k1, k2, k3, kl_loss


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
    # and the pairs that PPOConfig refuses
    for estimator in (k2, k3):
        assert np.linalg.norm(jax.grad(as_reward)(policy, estimator)) < shift * np.linalg.norm(exact)
    assert np.linalg.norm(jax.grad(as_loss)(policy, k1)) < 1e-6


def expected_loss(logits, old, reference, estimator):
    """`kl_loss` of one token, averaged over every token that pi_old could have drawn."""

    def of_token(*logprobs):
        one = (jnp.reshape(x, (1, 1)) for x in logprobs)
        return kl_loss(*one, jnp.ones((1, 1), bool), 1, estimator)[0]

    return jnp.sum(jnp.exp(old) * jax.vmap(of_token)(jax.nn.log_softmax(logits), old, reference))


@pytest.mark.parametrize("shift", [0.05, 0.5])
@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_the_loss_has_the_gradient_of_the_kl_on_policy(shift, estimator):
    policy, reference = categorical(shift)
    gradient = jax.grad(expected_loss)(policy, policy, reference, estimator)
    np.testing.assert_allclose(gradient, exact_gradient(policy, reference), atol=1e-6)


@pytest.mark.parametrize("shift", [0.05, 0.5])
@pytest.mark.parametrize("staleness", [0.1, 1.0])
def test_importance_weights_make_k3_exact_off_policy_and_without_them_it_is_wrong(shift, staleness):
    policy, reference = categorical(shift)
    old = jax.nn.log_softmax(policy + staleness * np.random.default_rng(2).normal(size=policy.size))
    exact = exact_gradient(policy, reference)
    value, gradient = jax.value_and_grad(expected_loss)(policy, old, reference, "k3")
    np.testing.assert_allclose(gradient, exact, atol=1e-6)
    np.testing.assert_allclose(value, jnp.sum(jnp.exp(policy) * (policy - reference)), atol=1e-6)
    bare = jax.grad(lambda x: jnp.sum(jnp.exp(old) * k3(jax.nn.log_softmax(x), reference)))(policy)
    assert np.linalg.norm(bare - exact) > 0.03 * np.linalg.norm(exact)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_kl_loss_is_the_loop_over_tokens_and_adds_up_over_micro_batches(estimator):
    rng = np.random.default_rng(0)
    new, old, reference = rng.normal(size=(3, 4, 5)).astype(np.float32)
    mask = rng.random((4, 5)) < 0.6
    bad = np.where(mask, 0, np.nan).astype(np.float32)

    @jax.jit
    def run(new, old, reference, mask):
        return jax.value_and_grad(lambda x: kl_loss(x, old, reference, mask, 7, estimator)[0])(new)

    loss, gradient = run(new + bad, old - bad, reference + bad, mask)
    total = 0.0
    for i in zip(*np.nonzero(mask), strict=True):
        d = float(new[i]) - float(reference[i])
        total += d**2 / 2 if estimator == "k2" else np.exp(float(new[i]) - float(old[i])) * (np.exp(-d) - 1 + d)
    np.testing.assert_allclose(loss, total / 7, rtol=1e-5)
    assert np.isfinite(gradient).all() and not np.asarray(gradient)[~mask].any()
    parts = [run(new[rows], old[rows], reference[rows], mask[rows])[0] for rows in (slice(0, 1), slice(1, 4))]
    np.testing.assert_allclose(sum(parts), loss, rtol=1e-5)


@pytest.mark.parametrize(("nats", "factor"), [(6.0, 1.0), (6.6, 1 + 0.1 * 64 / 10000), (60.0, 1 + 0.2 * 64 / 10000),
                                              (0.0, 1 - 0.2 * 64 / 10000), (np.nan, 1.0)])  # fmt: skip
def test_the_adaptive_coefficient_is_that_of_the_paper(nats, factor):
    """target 6, horizon 10000, error cut to 0.2 either way (lm-human-preferences, AdaptiveKLController)."""
    found = adaptive_kl_coef(jnp.float32(0.15), jnp.float32(nats), 6.0, 10000.0, 64)
    np.testing.assert_allclose(found, 0.15 * factor, rtol=1e-6)


def test_without_a_target_the_coefficient_stays():
    assert adaptive_kl_coef(jnp.float32(0.15), jnp.float32(99), None, 10000.0, 64) == jnp.float32(0.15)


@pytest.mark.parametrize("far", [-12.0, -3.0, 3.0, 12.0])
def test_k3_in_the_loss_is_not_clamped_and_pulls_however_far_the_policy_is(far):
    """verl clamps the estimate at 10, where its gradient ends: beyond a log-ratio of -2.6. On policy it is d."""
    old, reference, mask = jnp.zeros((1, 1)), jnp.full((1, 1), -far), jnp.ones((1, 1), bool)
    gradient = jax.grad(lambda new: kl_loss(new, old, reference, mask, 1, "k3")[0])(old)
    np.testing.assert_allclose(gradient, far, rtol=5e-3)

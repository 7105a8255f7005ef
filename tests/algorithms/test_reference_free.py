import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.reference_free import orpo_loss, simpo_loss

BETA, GAMMA, SMOOTHING = 0.7, 0.4, 0.2
REAL = np.array([True, True, False, True, True, True])


def log_sigmoid(x):
    return -np.log(1 + np.exp(-x))


def simpo(c, r):
    margin = BETA * (c - r) - GAMMA
    return np.mean(-(1 - SMOOTHING) * log_sigmoid(margin) - SMOOTHING * log_sigmoid(-margin))


def orpo(c, r):
    odds = np.exp(c) / (1 - np.exp(c)), np.exp(r) / (1 - np.exp(r))
    return -BETA * np.mean(log_sigmoid(np.log(odds[0] / odds[1])))


CASES = {"simpo": (simpo_loss, (BETA, GAMMA, SMOOTHING), simpo), "orpo": (orpo_loss, (BETA,), orpo)}


def case():
    rng = np.random.default_rng(0)
    tokens = rng.integers(1, 9, (2, 6)).astype(np.int32)
    return -(tokens * rng.uniform(0.05, 4, (2, 6))).astype(np.float32), tokens


def run(name, logprobs, tokens, mask, count):
    """((loss, metrics), gradient by the log-probs)."""
    loss, coefs, _ = CASES[name]
    tokens, mask = jnp.asarray(tokens), jnp.asarray(mask)
    return jax.value_and_grad(lambda p: loss(*p, *tokens, mask, count, *coefs), has_aux=True)(jnp.asarray(logprobs))


@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_equation(name):
    p, tokens = case()
    holes = np.where(REAL, p, np.nan).astype(np.float32)
    (loss, metrics), gradient = run(name, holes, tokens, REAL, 5)
    kept, lengths = np.float64(p[:, REAL]), tokens[:, REAL]
    equation = CASES[name][2]
    np.testing.assert_allclose(loss, equation(*(kept / lengths)), rtol=1e-5)
    expected = np.zeros((2, 6))
    for at, place in zip(np.ndindex(2, 5), zip(*np.nonzero(np.broadcast_to(REAL, (2, 6))), strict=True), strict=True):
        step = np.zeros((2, 5))
        step[at] = 1e-5
        expected[place] = (equation(*((kept + step) / lengths)) - equation(*((kept - step) / lengths))) / 2e-5
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-7)
    rewards = BETA * kept / lengths
    np.testing.assert_allclose(metrics["rewards/margins"], np.mean(rewards[0] - rewards[1]), rtol=1e-5)
    np.testing.assert_allclose(metrics["rewards/accuracies"], np.mean(rewards[0] > rewards[1]), rtol=1e-6)
    np.testing.assert_allclose(metrics["logps/rejected"], kept[1].mean(), rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_micro_batches_add_up(name):
    p, tokens = case()
    parts = [run(name, p[:, i : i + 3], tokens[:, i : i + 3], REAL[i : i + 3], 5) for i in (0, 3)]
    whole = run(name, p, tokens, REAL, 5)
    jax.tree.map(lambda w, *x: np.testing.assert_allclose(sum(x), w, rtol=1e-5), whole[0], parts[0][0], parts[1][0])
    np.testing.assert_allclose(np.concatenate([parts[0][1], parts[1][1]], axis=1), whole[1], rtol=1e-5)


@pytest.mark.parametrize("name", CASES)
def test_finite_log_probs_give_finite_numbers(name):
    """Certain, all but certain, empty, equal and hopeless responses."""
    p = np.array([[0, -1e-9, 0, -7, -1e5, -1e-3], [-1e-9, -1e5, 0, -7, 0, -1e5]], np.float32)
    tokens = np.array([[3, 1, 0, 2, 1, 1], [1, 1, 0, 2, 0, 1]], np.int32)
    for mask in (np.ones(6, bool), np.zeros(6, bool)):
        found = run(name, p, tokens, mask, 6)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found)), found
    assert not any(np.any(x) for x in jax.tree.leaves(found))

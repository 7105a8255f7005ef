import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.reward import pairwise_loss


def test_pairwise_loss_is_minus_log_sigmoid():
    rng = np.random.default_rng(0)
    chosen, rejected = 3 * rng.normal(size=(2, 64)).astype(np.float32)
    chosen[:3], rejected[:3] = (60, -60, 1), (-60, 60, 1)  # sigmoid rounds to 1 and to 0; a tie
    margin = np.float64(chosen) - np.float64(rejected)
    loss, metrics = pairwise_loss(jnp.asarray(chosen), jnp.asarray(rejected), 64)
    np.testing.assert_allclose(loss, np.mean(np.logaddexp(0, -margin)), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(margin > 0), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], margin.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_reward"], np.mean([chosen, rejected]), rtol=1e-4)


def test_gradient_is_finite_at_any_margin():
    margins = jnp.array([-1e4, -50.0, 0.0, 50.0, 1e4])
    gradient = jax.grad(lambda x: pairwise_loss(x, jnp.zeros(5), 1.0)[0])(margins)
    np.testing.assert_allclose(gradient, [-1, -1, -0.5, 0, 0], atol=1e-6)


def test_micro_batches_add_up():
    chosen, rejected = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32))
    whole = pairwise_loss(chosen, rejected, 8)
    parts = [pairwise_loss(chosen[i : i + 3], rejected[i : i + 3], 8) for i in (0, 3, 6)]
    jax.tree.map(lambda w, *p: np.testing.assert_allclose(sum(p), w, rtol=1e-5), whole, *parts)

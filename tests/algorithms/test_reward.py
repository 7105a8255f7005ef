import jax
import jax.numpy as jnp
import numpy as np

from jaxrlhf.algorithms.reward import pairwise_loss


def test_pairwise_loss_is_minus_log_sigmoid():
    rng = np.random.default_rng(0)
    chosen, rejected = 3 * rng.normal(size=(2, 64)).astype(np.float32)
    chosen[:3], rejected[:3] = (60, -60, 1), (-60, 60, 1)  # sigmoid rounds to 1 and to 0; a tie
    margin = np.float64(chosen) - np.float64(rejected)
    loss, metrics = pairwise_loss(jnp.asarray(chosen), jnp.asarray(rejected), jnp.ones(64, bool), 64)
    np.testing.assert_allclose(loss, np.mean(np.logaddexp(0, -margin)), rtol=1e-6)
    np.testing.assert_allclose(metrics["accuracy"], np.mean(margin > 0), rtol=1e-6)
    np.testing.assert_allclose(metrics["margin"], margin.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["mean_reward"], np.mean([chosen, rejected]), rtol=1e-4)


def test_gradient_is_finite_at_any_margin():
    margins = jnp.array([-1e4, -50.0, 0.0, 50.0, 1e4])
    gradient = jax.grad(lambda x: pairwise_loss(x, jnp.zeros(5), jnp.ones(5, bool), 1.0)[0])(margins)
    np.testing.assert_allclose(gradient, [-1, -1, -0.5, 0, 0], atol=1e-6)


def test_micro_batches_add_up():
    chosen, rejected = jnp.asarray(np.random.default_rng(1).normal(size=(2, 8)).astype(np.float32))
    mask = jnp.ones(8, bool)
    whole = pairwise_loss(chosen, rejected, mask, 8)
    parts = [pairwise_loss(chosen[i : i + 3], rejected[i : i + 3], mask[i : i + 3], 8) for i in (0, 3, 6)]
    jax.tree.map(lambda w, *p: np.testing.assert_allclose(sum(p), w, rtol=1e-5), whole, *parts)


def test_what_is_no_pair_counts_for_nothing():
    chosen, rejected = np.random.default_rng(2).normal(size=(2, 6)).astype(np.float32)
    mask = np.array([[True, True, False], [True, False, False]])
    holes = [np.full((2, 3), np.nan, np.float32) for _ in range(2)]
    for hole, values in zip(holes, (chosen, rejected), strict=True):
        hole[mask] = values[:3]
    loss = jax.value_and_grad(lambda x: pairwise_loss(x, jnp.asarray(holes[1]), jnp.asarray(mask), 3), has_aux=True)
    found, gradient = loss(jnp.asarray(holes[0]))
    wanted = pairwise_loss(jnp.asarray(chosen[:3]), jnp.asarray(rejected[:3]), jnp.ones(3, bool), 3)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6), found, wanted)
    assert (np.asarray(gradient) != 0).tolist() == mask.tolist()

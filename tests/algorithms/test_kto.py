import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import kto

BETA, WEIGHTS = 0.3, (1.5, 0.7)
REAL = np.array([True, True, False, True, True, True, False, True])
GOOD = np.array([True, False, True, True, False, False, False, True])


def case():
    logprobs = -5 * np.random.default_rng(0).gamma(2, size=8)
    return np.stack([logprobs, logprobs + 2 * np.random.default_rng(1).normal(size=8)]).astype(np.float32)


def equation(logprobs, ref_logprobs, good, kl):
    values = []
    for policy, reference, is_good in zip(logprobs, ref_logprobs, good, strict=True):
        z = BETA * (policy - reference - kl) * (1 if is_good else -1)
        weight = WEIGHTS[0] if is_good else WEIGHTS[1]
        values.append(weight - weight / (1 + np.exp(-z)))
    return np.mean(values)


@jax.jit
def run(logprobs, ref_logprobs, good, mask, count, kl):
    """((loss, metrics), gradient)."""
    loss = lambda p: kto.kto_loss(p, ref_logprobs, good, mask, count, kl, BETA, *WEIGHTS)  # noqa: E731
    return jax.value_and_grad(loss, has_aux=True)(logprobs)


@pytest.mark.parametrize("kl", [0.0, 0.8])
def test_loss_and_gradient_are_those_of_the_equation(kl):
    p = case()
    holes = np.where(REAL, p, np.nan).astype(np.float32)
    (loss, metrics), gradient = run(*holes, GOOD, REAL, REAL.sum(), kl)
    (policy, reference), good = np.float64(p[:, REAL]), GOOD[REAL]
    np.testing.assert_allclose(loss, equation(policy, reference, good, kl), rtol=1e-5)
    steps = 1e-5 * np.eye(len(policy))
    slopes = [equation(policy + s, reference, good, kl) - equation(policy - s, reference, good, kl) for s in steps]
    np.testing.assert_allclose(gradient[REAL], np.array(slopes) / 2e-5, rtol=1e-4, atol=1e-7)
    assert not np.any(gradient[~REAL])
    final, rewards = kto.finalize_metrics(metrics), BETA * (policy - reference)
    wanted = {
        "loss": loss,
        "rewards/chosen": rewards[good].mean(),
        "rewards/rejected": rewards[~good].mean(),
        "rewards/margins": rewards[good].mean() - rewards[~good].mean(),
        "logps/chosen": policy[good].mean(),
        "logps/rejected": policy[~good].mean(),
        "share/chosen": good.mean(),
        "share/rejected": 1 - good.mean(),
    }
    assert final.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(final[key], value, rtol=1e-5, err_msg=key)


def test_micro_batches_add_up():
    p, count = case(), REAL.sum()
    parts = [run(*p[:, i : i + 4], GOOD[i : i + 4], REAL[i : i + 4], count, 0.8) for i in (0, 4)]
    whole = run(*p, GOOD, REAL, count, 0.8)
    jax.tree.map(lambda w, *x: np.testing.assert_allclose(sum(x), w, rtol=1e-5), whole[0], parts[0][0], parts[1][0])
    np.testing.assert_allclose(np.concatenate([parts[0][1], parts[1][1]]), whole[1], rtol=1e-5)


def test_the_baseline_is_the_mean_kl_and_never_negative():
    logprobs, ref_logprobs = jnp.array([1.0, 4.0, jnp.nan]), jnp.array([2.0, 1.0, 0.0])
    mask = jnp.array([True, True, False])
    assert kto.kl_baseline(logprobs, ref_logprobs, mask) == 1.0
    assert kto.kl_baseline(ref_logprobs, logprobs, mask) == 0.0
    assert kto.kl_baseline(logprobs, ref_logprobs, jnp.zeros(3, bool)) == 0.0
    assert not np.any(jax.grad(kto.kl_baseline)(logprobs, ref_logprobs, mask))


def test_finite_log_probs_give_finite_numbers():
    """Far from the reference either way, the reference itself, one kind alone, none at all."""
    policy = np.array([-1e5, 0, -1e5, 0, -3, 0, -1, -2], np.float32)
    reference = np.array([0, -1e5, 0, -1e5, -3, 0, -2, -1], np.float32)
    for good, mask in ((GOOD, True), (GOOD | True, True), (GOOD & False, True), (GOOD, False)):
        (loss, metrics), gradient = run(policy, reference, good, np.full(8, mask), 8, 0.5)
        assert all(np.isfinite(x).all() for x in (loss, gradient, *kto.finalize_metrics(metrics).values()))

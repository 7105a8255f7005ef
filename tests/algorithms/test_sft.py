import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms.sft import dft_loss, sft_loss


def case():
    rng = np.random.default_rng(0)
    logprobs, entropy = -np.abs(rng.normal(size=(2, 4, 6))).astype(np.float32)
    mask = np.arange(6) < np.array([[1], [6], [0], [3]])
    return logprobs, -entropy, mask


def test_every_token_weighs_the_same():
    logprobs, entropy, mask = case()
    loss, metrics = sft_loss(*(jnp.asarray(x) for x in (logprobs, entropy, mask)), mask.sum().item())
    np.testing.assert_allclose(loss, -logprobs[mask].astype(np.float64).mean(), rtol=1e-6)
    np.testing.assert_allclose(metrics["entropy"], entropy[mask].mean(), rtol=1e-5)
    row_means = [-logprobs[b, mask[b]].mean() for b in (0, 1, 3)]
    assert abs(loss - np.mean(row_means)) > 1e-3  # a mean of means is another number


def test_dft_is_cross_entropy_weighted_by_the_probability():
    """arXiv 2508.05629; the weight has no gradient: that of p log p would have another sign below 1 / e."""
    logprobs, entropy, mask = case()
    run = jax.value_and_grad(lambda x: dft_loss(x, jnp.asarray(entropy), jnp.asarray(mask), 10)[0])
    loss, gradient = run(jnp.asarray(logprobs))
    p = np.exp(np.float64(logprobs))
    np.testing.assert_allclose(loss, -(p * logprobs)[mask].sum() / 10, rtol=1e-6)
    np.testing.assert_allclose(gradient, np.where(mask, -p / 10, 0), rtol=1e-5)
    assert p[mask].min() < 1 / np.e


@pytest.mark.parametrize(("of", "weight"), [(sft_loss, lambda x: 0 * x + 1), (dft_loss, np.exp)])
def test_masked_tokens_have_no_gradient_and_micro_batches_add_up(of, weight):
    logprobs, entropy, mask = case()
    poisoned = jnp.asarray(np.where(mask, logprobs, -np.inf).astype(np.float32))
    run = jax.value_and_grad(lambda x, e, m: of(x, e, m, 10), has_aux=True)
    (loss, metrics), gradient = run(poisoned, jnp.asarray(np.where(mask, entropy, np.nan)), jnp.asarray(mask))
    np.testing.assert_allclose(gradient, np.where(mask, -0.1 * weight(logprobs), 0), rtol=1e-6)
    rows = zip(poisoned, jnp.asarray(entropy), jnp.asarray(mask), strict=True)
    parts = [of(*(x[None] for x in row), 10) for row in rows]
    np.testing.assert_allclose(sum(p[0] for p in parts), loss, rtol=1e-6)
    np.testing.assert_allclose(sum(p[1]["entropy"] for p in parts), metrics["entropy"], rtol=1e-6)

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import models
from jaxrlhf.models import heads

init_head = jax.jit(heads.init_head, static_argnums=0)  # the decoder is not what these tests are about


@pytest.fixture
def hidden():
    return jnp.asarray(np.random.default_rng(0).normal(size=(2, 5, 16)), jnp.float32)


def mlp_by_hand(params, hidden, labels=1):
    x = np.asarray(hidden)
    for i in range(3):
        layer = params["score"][f"dense_{i}"]
        x = x @ np.asarray(layer["kernel"]) + np.asarray(layer["bias"])
        x = np.maximum(x, 0) if i < 2 else x
    assert x.shape[-1] == labels
    return x


def test_logits_of_tied_and_untied_heads(make, big_weights, hidden):
    tied = make(tie_embeddings=True)
    params = big_weights(tied)
    np.testing.assert_allclose(
        models.lm_logits(params, tied, hidden), hidden @ params["embed"]["embedding"].T, atol=1e-5
    )
    untied = make(tie_embeddings=False)
    params = big_weights(untied)
    np.testing.assert_allclose(
        models.lm_logits(params, untied, hidden), hidden @ params["lm_head"]["kernel"], atol=1e-5
    )
    one = models.lm_logits(params, untied, hidden[0, 0])
    np.testing.assert_allclose(one, models.lm_logits(params, untied, hidden)[0, 0], atol=1e-6)


def test_two_labels_give_the_probability_of_the_second(make, big_weights, hidden):
    model = make(head="linear", num_labels=2)
    params = big_weights(model)
    logits = np.asarray(hidden @ params["score"]["kernel"])
    np.testing.assert_allclose(models.label_logits(params, model, hidden), logits, atol=1e-5)
    expected = 1 / (1 + np.exp(logits[..., 0] - logits[..., 1]))
    np.testing.assert_allclose(models.scalar_head(params, model, hidden), expected, atol=1e-5)


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_a_second_label_makes_a_probability_of_a_score_and_keeps_its_log_odds(make, key, hidden, head):
    one = make(head=head)
    params = init_head(one, key)
    two, wider = heads.with_two_labels(one, params)
    score = np.float64(models.scalar_head(params, one, hidden))
    np.testing.assert_allclose(models.scalar_head(wider, two, hidden), 1 / (1 + np.exp(-score)), rtol=1e-5)
    for model, has in ((one, params), (two, wider)):
        np.testing.assert_allclose(models.log_odds(has, model, hidden), score, rtol=1e-5)
    drawn = jax.eval_shape(lambda: heads.init_head(two, key))
    assert jax.tree.map(jnp.shape, wider["score"]) == jax.tree.map(jnp.shape, drawn["score"])


def test_mlp_head_is_512_256_1(make, key, hidden):
    model = make(head="mlp")
    params = init_head(model, key)
    assert [params["score"][f"dense_{i}"]["kernel"].shape for i in range(3)] == [(16, 512), (512, 256), (256, 1)]
    params["score"] = jax.tree.map(lambda leaf: leaf + 0.1, params["score"])  # biases that matter
    np.testing.assert_allclose(
        models.scalar_head(params, model, hidden), mlp_by_hand(params, hidden)[..., 0], rtol=1e-4
    )


def test_fresh_scores_have_unit_scale(make, key):
    model = make(head="linear", hidden_size=512)
    params = init_head(model, key)
    assert jnp.std(params["score"]["kernel"]) == pytest.approx(513**-0.5, rel=0.1)
    hidden = jnp.asarray(np.random.default_rng(0).normal(size=(400, 512)), jnp.float32)
    assert 0.7 < jnp.std(models.scalar_head(params, model, hidden)) < 1.3


def test_dropout_only_with_a_key_and_right_on_average(make, key, hidden):
    model = make(head="mlp")
    params = init_head(model, key)
    exact = models.scalar_head(params, model, hidden)
    assert jnp.array_equal(exact, models.scalar_head(params, model, hidden))
    dropped = models.scalar_head(params, model, hidden, key)
    assert jnp.array_equal(dropped, models.scalar_head(params, model, hidden, key))
    assert not jnp.array_equal(dropped, models.scalar_head(params, model, hidden, jax.random.key(1)))
    assert not jnp.any(dropped == exact)
    # with the second layer passed through, inverted dropout keeps the mean; the spread says a tenth was dropped
    score = params["score"]
    score["dense_0"] = {"kernel": jnp.zeros((16, 512)), "bias": jnp.ones(512)}
    score["dense_1"] = {"kernel": jnp.eye(512, 256), "bias": jnp.zeros(256)}
    score["dense_2"] = {"kernel": jnp.ones((256, 1)), "bias": jnp.zeros(1)}
    many = models.scalar_head(params, model, jnp.zeros((2000, 16)), key) / 256
    variance = 1 / 0.9**2 - 1  # of one unit: two layers of inverted dropout
    assert many.mean() == pytest.approx(1, abs=5e-3)
    assert many.std() == pytest.approx((variance / 256) ** 0.5, rel=0.1)


def test_scores_are_float32_whatever_is_stored(make, key, hidden):
    for head in ("linear", "mlp"):
        model = make(head=head, dtype="bfloat16")
        params = jax.tree.map(lambda leaf: leaf.astype("bfloat16"), init_head(model, key))
        wide = jax.tree.map(lambda leaf: leaf.astype(jnp.float32), params)
        found = models.scalar_head(params, model, hidden)
        assert found.dtype == jnp.float32
        np.testing.assert_allclose(found, models.scalar_head(wide, model, hidden), rtol=1e-6, atol=1e-6)

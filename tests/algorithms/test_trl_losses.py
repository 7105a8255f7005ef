"""The preference losses on what TRL computed with them (tests/support/recorded.py).

Where TRL differs, the test asserts both numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import recorded

from jaxrlhf.algorithms import dpo, kto, reward
from jaxrlhf.algorithms.reference_free import orpo_loss, simpo_loss

close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)
CASE = recorded.load("losses")
MASK = jnp.ones(CASE["chosen"].shape, bool)
COUNT = MASK.size
BETA = CASE.about["beta"]
POLICY = jnp.stack([CASE["chosen"], CASE["rejected"]])
REFERENCE = jnp.stack([CASE["ref_chosen"], CASE["ref_rejected"]])
TOKENS = jnp.stack([CASE["chosen_tokens"], CASE["rejected_tokens"]])
REVERSE = dpo.Divergence("reverse_kl", 0.0)
SAME = (
    *("sigmoid", "hinge", "ipo", "nca_pair", "sppo_hard", "aot", "aot_unpaired", "apo_zero", "apo_down", "discopop"),
    *("sigmoid_norm", "robust-smooth", "exo_pair-smooth", "aot-smooth"),
    *("sigmoid-forward_kl", "sigmoid-js_divergence", "sigmoid-alpha"),
)


@functools.partial(jax.jit, static_argnames=("name", "divergence"))
def preference(policy, reference, label_smoothing, *, name, divergence=REVERSE):
    """((loss, metrics), gradient by policy [2, B])."""
    coefs = dpo.Coefs(BETA, label_smoothing, CASE.about["discopop_tau"])

    def loss(policy):
        logprobs = dpo.Logprobs(*policy, *reference, *TOKENS)
        return dpo.preference_loss(logprobs, MASK, COUNT, dpo.LOSSES[name], divergence, coefs)

    return jax.value_and_grad(loss, has_aux=True)(policy)


def agrees(name, found, final=lambda metrics: metrics):
    """Loss, gradient and every metric that TRL logs."""
    (loss, metrics), gradient = found
    close(loss, CASE[f"loss/{name}"])
    close(gradient, CASE[f"gradient/{name}"])
    metrics = final(metrics)
    for key, value in CASE.group(f"metric/{name}/").items():
        close(metrics[key], value, err_msg=key)


@pytest.mark.parametrize("name", SAME)
def test_preference_losses(name):
    settings = CASE.about["cases"][name]
    alpha = 1 - settings.get("f_alpha_divergence_coef", 0.5)
    divergence = dpo.Divergence(settings.get("f_divergence_type", "reverse_kl"), alpha)
    smoothing = settings.get("label_smoothing", 0.0)
    agrees(name, preference(POLICY, REFERENCE, smoothing, name=name.split("-")[0], divergence=divergence))
    assert len(CASE.group(f"metric/{name}/")) == 6


@pytest.mark.parametrize("name", ["cpo", "cpo-smooth"])
def test_cpo_is_dpo_without_a_reference(name):
    smoothing = CASE.about["cases"][name].get("label_smoothing", 0.0)
    agrees(name, preference(POLICY, 0 * REFERENCE, smoothing, name="sigmoid"))


def test_label_smoothing_is_not_left_out_of_the_sigmoid_loss():
    """TRL 1.8.0 takes `label_smoothing` for robust, exo_pair and aot, and ignores it for sigmoid."""
    smooth = preference(POLICY, REFERENCE, 0.2, name="sigmoid")[0][0]
    close(CASE["loss/sigmoid-smooth"], CASE["loss/sigmoid"])
    margin = BETA * np.float64((POLICY - REFERENCE)[0] - (POLICY - REFERENCE)[1])
    close(smooth, np.mean(0.8 * np.logaddexp(0, -margin) + 0.2 * np.logaddexp(0, margin)))
    assert abs(smooth - CASE["loss/sigmoid"]) > 0.01


def test_alpha_is_that_of_the_paper():
    """(1 - u^-alpha) / alpha; TRL 1.8.0 has (u^(alpha - 1) - 1) / (alpha - 1), the paper's 1 - alpha."""
    given = CASE.about["cases"]["sigmoid-alpha"]["f_alpha_divergence_coef"]
    log_ratio = np.float64(POLICY - REFERENCE)
    scores = {alpha: (1 - np.exp(-alpha * log_ratio)) / alpha for alpha in (given, 1 - given)}
    losses = {alpha: np.mean(np.logaddexp(0, -BETA * (s[0] - s[1]))) for alpha, s in scores.items()}
    close(losses[1 - given], CASE["loss/sigmoid-alpha"])
    ours = preference(POLICY, REFERENCE, 0.0, name="sigmoid", divergence=dpo.Divergence("alpha_divergence", given))
    close(ours[0][0], losses[given])
    assert abs(losses[given] - losses[1 - given]) > 0.1


def test_a_pair_far_on_the_wrong_side_does_not_make_discopop_nan():
    """TRL 1.8.0 has 0 * exp(300)."""
    far = POLICY.at[0].add(-1000.0)
    (loss, _), gradient = preference(far, REFERENCE, 0.0, name="discopop")
    margin = BETA * np.float64((far - REFERENCE)[0] - (far - REFERENCE)[1])
    close(loss, -np.mean(margin))
    close(gradient[0], -BETA / COUNT)
    assert np.isnan(CASE["loss/discopop-far"])


def test_the_sft_term():
    tokens = TOKENS[0].sum().item()
    close(dpo.sft_term(POLICY[0], MASK, tokens), CASE["loss/sft"])


@pytest.mark.parametrize("name", ["simpo", "orpo"])
def test_losses_without_a_reference(name):
    def loss(policy):
        if name == "orpo":
            return orpo_loss(*policy, *TOKENS, MASK, COUNT, BETA)
        return simpo_loss(*policy, *TOKENS, MASK, COUNT, BETA, CASE.about["simpo_gamma"], 0.0)

    agrees(name, jax.value_and_grad(loss, has_aux=True)(POLICY))


@pytest.mark.parametrize("name", ["kto", "apo_zero_unpaired"])
def test_kto(name):
    settings, half = CASE.about["cases"][name], COUNT // 2
    kl = kto.kl_baseline(jnp.asarray(CASE["kl_logprobs"]), jnp.asarray(CASE["ref_kl_logprobs"]), MASK)
    assert kl > 0.1
    close(kl, CASE["metric/kto/kl"])
    weights = settings["desirable_weight"], settings["undesirable_weight"]
    rows = jnp.arange(COUNT)

    def loss(policy):
        unpaired = jnp.where(rows < half, policy, policy[::-1])[0]
        reference = jnp.where(rows < half, REFERENCE, REFERENCE[::-1])[0]
        baseline = kl if name == "kto" else 0.0
        return kto.kto_loss(unpaired, reference, rows < half, MASK, COUNT, baseline, BETA, *weights)

    found = jax.value_and_grad(loss, has_aux=True)(POLICY)
    logged_beside = {"kl": kl if name == "kto" else 0.0}
    agrees(name, found, lambda metrics: kto.finalize_metrics(metrics) | logged_beside)


@pytest.mark.parametrize(("name", "coefficient"), [("reward", 0.0), ("reward-centred", 0.1)])
def test_reward_models(name, coefficient):
    def loss(scores):
        value, metrics = reward.pairwise_loss(*scores, MASK, COUNT, 0.0, jnp.asarray(CASE["margins"]))
        return value + coefficient * reward.centring_term(*scores, MASK, COUNT), metrics

    agrees(name, jax.value_and_grad(loss, has_aux=True)(jnp.asarray(CASE["scores"])))

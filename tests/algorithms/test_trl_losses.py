"""The preference losses on what TRL computed with them (tests/support/recorded.py).

Where TRL differs, the test asserts both numbers.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import recorded

from jaxrlhf import config
from jaxrlhf.algorithms import dpo, kto, reward
from jaxrlhf.algorithms.reference_free import orpo_loss, simpo_loss
from jaxrlhf.algorithms.sft import dft_loss
from jaxrlhf.training.dpo.update import PairLogprobs, objective

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
    *("sigmoid_norm", "bco_pair", "robust-smooth", "exo_pair-smooth", "aot-smooth"),
    *("sigmoid-forward_kl", "sigmoid-js_divergence", "sigmoid-alpha"),
)


@functools.partial(jax.jit, static_argnames=("name", "divergence"))
def preference(policy, reference, label_smoothing, *, name, divergence=REVERSE, baseline=0.0, weights=None):
    """((loss, metrics), gradient by policy [2, B])."""
    coefs = dpo.Coefs(BETA, label_smoothing, CASE.about["discopop_tau"], baseline)

    def loss(policy):
        logprobs = dpo.Logprobs(*policy, *reference, *TOKENS)
        return dpo.preference_loss(logprobs, MASK, COUNT, dpo.LOSSES[name], divergence, coefs, weights)

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


def token_logprobs():
    """log p of every token but the first [2 B, T - 1], 0 outside the mask, and log sum_v p_v^2, float64."""
    logits = np.float64(CASE["logits"])[:, :-1]
    logprobs = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    mask = CASE["mask"][:, 1:]
    taken = np.take_along_axis(logprobs, CASE["tokens"][:, 1:, None].astype(int), axis=-1)[..., 0]
    return np.where(mask, taken, 0), np.where(mask, np.log(np.exp(2 * logprobs).sum(-1)), 0), mask


def test_bco_is_shifted_by_the_running_mean_of_rewards():
    """TRL's BCOTrainer takes the mean over responses, half of that over pairs."""
    (loss, _), gradient = preference(
        POLICY, REFERENCE, 0.0, name="bco_pair", baseline=CASE.about["cases"]["bco"]["baseline"]
    )
    close(loss / 2, CASE["loss/bco"])
    close(gradient / 2, CASE["gradient/bco"])
    assert abs(loss - CASE["loss/bco_pair"]) > 1e-3
    running = dpo.RunningMean(jnp.float32(0), jnp.float32(0))
    for part, mean in zip(np.split(CASE["kl_logprobs"], [3, 6]), CASE["running_means"], strict=True):
        running = running.add(jnp.float32(part.mean()), len(part))
        close(running.mean, mean)
    assert running.add(jnp.float32(np.nan), 3) == running and running.seen == COUNT


def test_wpo_weights_a_pair_by_the_probability_of_its_responses():
    """Relative to sum p^2, the probability of a token that the policy draws (https://arxiv.org/abs/2406.11827)."""
    taken, collision, mask = token_logprobs()
    weights = np.exp((taken - collision).sum(1) / mask.sum(1)).reshape(2, -1).prod(0)
    assert weights.max() > 3 * weights.min()
    agrees("sigmoid-wpo", preference(POLICY, REFERENCE, 0.0, name="sigmoid", weights=jnp.asarray(weights, jnp.float32)))


def test_ld_dpo_weights_the_tokens_beyond_the_shorter_response():
    taken, _, mask = token_logprobs()
    number, sizes = mask.cumsum(1), mask.sum(1)
    weights = np.where(number > np.tile(np.minimum(*np.split(sizes, 2)), 2)[:, None], 0.4, 1.0)
    policy = jnp.asarray((weights * taken).sum(1).reshape(2, -1), jnp.float32)
    (loss, metrics), gradient = preference(policy, REFERENCE, 0.0, name="sigmoid")
    close(loss, CASE["loss/sigmoid-ld"])
    close(metrics["logps/chosen"], CASE["metric/sigmoid-ld/logps/chosen"])
    by_token = np.asarray(gradient).reshape(-1, 1) * weights * mask
    close(by_token, CASE["token-gradient/sigmoid-ld"] * mask)
    assert (weights[mask] == 0.4).any()


def test_losses_add_up_with_their_weights():
    settings = CASE.about["cases"]["sigmoid-several"]
    assert settings == {"loss_types": ["sigmoid", "bco_pair", "sft"], "loss_weights": [0.8, 0.2, 1.0]}
    (sigmoid, _), slope = preference(POLICY, REFERENCE, 0.0, name="sigmoid")
    (bco, _), other = preference(POLICY, REFERENCE, 0.0, name="bco_pair")
    close(0.8 * sigmoid + 0.2 * bco + CASE["loss/sft"], CASE["loss/sigmoid-several"])
    close(0.8 * slope + 0.2 * other, CASE["gradient/sigmoid-several"])
    scored = PairLogprobs(POLICY.T, TOKENS.T, MASK)
    made = config.DPO(loss=("sigmoid", "bco_pair", "sft"), loss_weights=(0.8, 0.2, 1.0), beta=BETA)
    value, metrics = objective(scored, REFERENCE.T, COUNT, TOKENS[0].sum(), BETA, 0.0, made)
    close(value, CASE["loss/sigmoid-several"])
    close(metrics["nll_loss"], CASE["loss/sft"])


def test_dft_weights_each_token_by_its_probability():
    mask = jnp.asarray(CASE["mask"][:, 1:])
    targets = jnp.asarray(CASE["tokens"][:, 1:, None], int)

    def loss(logits):
        logprobs = jnp.take_along_axis(jax.nn.log_softmax(logits)[:, :-1], targets, axis=-1)[..., 0]
        return dft_loss(logprobs, 0 * logprobs, mask, mask.sum())[0]

    value, gradient = jax.value_and_grad(loss)(jnp.asarray(CASE["logits"]))
    close(value, CASE["loss/dft"])
    close(gradient, CASE["gradient/dft-logits"])


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

"""Every loss against its paper's equation in float64, and its gradient against finite differences of that."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import dpo

B, BETA, SMOOTHING, TAU = 8, 0.3, 0.2, 0.05
BASELINE = 0.4
COEFS = dpo.Coefs(BETA, SMOOTHING, TAU, BASELINE)
REVERSE = dpo.Divergence("reverse_kl", 0.0)
REAL = np.array([True, False, True, True, True, False, True, True])
SPLIT = sorted(dpo.LOSSES.keys() - {"aot", "aot_unpaired"})  # those that are sums over pairs


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def log_sigmoid(x):
    return np.log(sigmoid(x))


def smoothed(m):
    return -(1 - SMOOTHING) * log_sigmoid(m) - SMOOTHING * log_sigmoid(-m)


def exo(m):
    q, p = np.array([sigmoid(m), 1 - sigmoid(m)]), np.array([[1 - SMOOTHING], [SMOOTHING]])
    return np.sum(q * np.log(q / p), axis=0)


EQUATIONS = {  # of c, r, whole and per token, and of the log-probs themselves
    "sigmoid": lambda c, r, **_: smoothed(BETA * (c - r)),
    "sigmoid_norm": lambda c_token, r_token, **_: smoothed(BETA * (c_token - r_token)),
    "robust": lambda c, r, **_: (
        -((1 - SMOOTHING) * log_sigmoid(BETA * (c - r)) - SMOOTHING * log_sigmoid(BETA * (r - c))) / (1 - 2 * SMOOTHING)
    ),
    "hinge": lambda c, r, **_: np.maximum(0, 1 - BETA * (c - r)),
    "ipo": lambda c_token, r_token, **_: (c_token - r_token - 1 / (2 * BETA)) ** 2,
    "exo_pair": lambda c, r, **_: exo(BETA * (c - r)),
    "nca_pair": lambda c, r, **_: -log_sigmoid(BETA * c) - (log_sigmoid(-BETA * c) + log_sigmoid(-BETA * r)) / 2,
    "sppo_hard": lambda c, r, **_: (c - (1 - 1 / 2) / BETA) ** 2 + (r - (0 - 1 / 2) / BETA) ** 2,
    "apo_zero": lambda c, r, **_: (1 - sigmoid(BETA * c)) + sigmoid(BETA * r),
    "apo_down": lambda c, r, **_: sigmoid(BETA * c) + (1 - sigmoid(BETA * (c - r))),
    "discopop": lambda c, r, **_: (
        -(1 - sigmoid(BETA * (c - r) / TAU)) * log_sigmoid(BETA * (c - r))
        + sigmoid(BETA * (c - r) / TAU) * np.exp(-BETA * (c - r))
    ),
    "bco_pair": lambda c, r, **_: -log_sigmoid(BETA * c - BASELINE) - log_sigmoid(BASELINE - BETA * r),
    "aot": lambda p, **_: smoothed(BETA * (np.sort(p[0] - p[1]) - np.sort(p[2] - p[3]))),
    "aot_unpaired": lambda c, r, **_: smoothed(BETA * (np.sort(c) - np.sort(r))),
}


def equation(name, p, tokens):
    """The mean over the rows of p [4, B], float64."""
    c, r = p[0] - p[2], p[1] - p[3]
    return np.mean(EQUATIONS[name](c=c, r=r, c_token=c / tokens[0], r_token=r / tokens[1], p=p))


def case(seed=0):
    """log-probs [4, B] (chosen, rejected, and of the reference), and lengths [2, B]."""
    rng = np.random.default_rng(seed)
    policy = -3 * rng.gamma(2, size=(2, B))
    logprobs = np.concatenate([policy, policy + 2 * rng.normal(size=(2, B))]).astype(np.float32)
    return logprobs, rng.integers(1, 9, (2, B)).astype(np.int32)


@functools.partial(jax.jit, static_argnames=("name", "divergence"))
def run(policy, reference, tokens, mask, count, *, name, divergence=REVERSE):
    """((loss, metrics), gradient by policy [2, B])."""

    def loss(policy):
        logprobs = dpo.Logprobs(*policy, *reference, *tokens)
        return dpo.preference_loss(logprobs, mask, count, dpo.LOSSES[name], divergence, COEFS)

    return jax.value_and_grad(loss, has_aux=True)(policy)


def test_every_loss_has_an_equation():
    assert EQUATIONS.keys() == dpo.LOSSES.keys()


@pytest.mark.parametrize("name", dpo.LOSSES)
def test_loss_and_gradient_are_those_of_the_equation(name):
    """Rows outside the mask hold NaN: they must reach nothing."""
    p, tokens = case()
    kept = np.float64(p[:, REAL])
    holes = np.where(REAL, p, np.nan).astype(np.float32)
    (loss, metrics), gradient = run(holes[:2], holes[2:], tokens, REAL, REAL.sum(), name=name)
    np.testing.assert_allclose(loss, equation(name, kept, tokens[:, REAL]), rtol=2e-5)

    def difference(side, row, step=1e-5):
        values = []
        for sign in (1, -1):
            moved = kept.copy()
            moved[side, row] += sign * step
            values.append(equation(name, moved, tokens[:, REAL]))
        return (values[0] - values[1]) / (2 * step)

    expected = np.zeros((2, B))
    expected[:, REAL] = [[difference(side, row) for row in range(kept.shape[1])] for side in range(2)]
    np.testing.assert_allclose(gradient, expected, rtol=1e-4, atol=1e-6)
    assert np.any(gradient)
    rewards = BETA * (kept[:2] - kept[2:])
    wanted = {
        "loss": loss,
        "rewards/chosen": rewards[0].mean(),
        "rewards/rejected": rewards[1].mean(),
        "rewards/accuracies": np.mean(rewards[0] > rewards[1]),
        "rewards/margins": np.mean(rewards[0] - rewards[1]),
        "logps/chosen": kept[0].mean(),
        "logps/rejected": kept[1].mean(),
    }
    assert metrics.keys() == wanted.keys()
    for key, value in wanted.items():
        np.testing.assert_allclose(metrics[key], value, rtol=1e-5, atol=1e-6, err_msg=key)


def halves(p, tokens, name):
    mask = np.ones(B // 2, bool)
    parts = [run(p[:2, i : i + 4], p[2:, i : i + 4], tokens[:, i : i + 4], mask, B, name=name) for i in (0, B // 2)]
    values = jax.tree.map(lambda a, b: a + b, parts[0][0], parts[1][0])
    return values, np.concatenate([parts[0][1], parts[1][1]], axis=1)


@pytest.mark.parametrize("name", SPLIT)
def test_micro_batches_add_up(name):
    p, tokens = case(1)
    whole = run(p[:2], p[2:], tokens, np.ones(B, bool), B, name=name)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), halves(p, tokens, name), whole)


def test_aot_ranks_the_whole_batch():
    """So micro-batches have another loss, and unpaired, it does not matter which response stands beside which."""
    p, tokens = case(1)
    mask = np.ones(B, bool)
    for name in ("aot", "aot_unpaired"):
        whole = run(p[:2], p[2:], tokens, mask, B, name=name)[0][0]
        assert abs(float(halves(p, tokens, name)[0][0]) - float(whole)) > 1e-3
    mixed = p.copy()
    mixed[[1, 3]] = np.roll(p[[1, 3]], 3, axis=1)
    losses = [run(x[:2], x[2:], tokens, mask, B, name="aot_unpaired")[0][0] for x in (p, mixed)]
    np.testing.assert_allclose(*losses, rtol=1e-6)


def test_robust_is_right_on_average_over_wrong_labels():
    margins, zeros = jnp.linspace(-5, 5, 7), jnp.zeros(7)
    average = (1 - SMOOTHING) * dpo.robust(margins, zeros, COEFS) + SMOOTHING * dpo.robust(zeros, margins, COEFS)
    np.testing.assert_allclose(average, dpo.sigmoid(margins, zeros, COEFS._replace(label_smoothing=0.0)), rtol=1e-5)


def test_exo_is_least_at_the_probability_of_a_right_label():
    margin = np.log((1 - SMOOTHING) / SMOOTHING) / BETA
    cost = lambda x: dpo.exo(jnp.asarray([x]), jnp.zeros(1), COEFS)[0]  # noqa: E731
    np.testing.assert_allclose(cost(margin), 0, atol=1e-6)
    np.testing.assert_allclose(jax.grad(cost)(margin), 0, atol=1e-6)


F = {
    "reverse_kl": lambda u: u * np.log(u),
    "forward_kl": lambda u: -np.log(u),
    "js_divergence": lambda u: u * np.log(u) - (u + 1) * np.log((u + 1) / 2),
    "alpha_divergence": lambda u, a=0.3: (u ** (1 - a) - (1 - a) * u - a) / (a * (a - 1)),
}


@pytest.mark.parametrize("name", F)
def test_a_divergence_scores_by_the_derivative_of_its_f(name):
    log_ratio, f, step = np.linspace(-4, 4, 9), F[name], 1e-6
    u = np.exp(log_ratio)
    slope = lambda u: (f(u * (1 + step)) - f(u * (1 - step))) / (2 * step * u)  # noqa: E731
    found = dpo.divergence_scores(jnp.asarray(log_ratio, jnp.float32), dpo.Divergence(name, 0.3))
    np.testing.assert_allclose(found, slope(u) - slope(np.ones(1)), rtol=1e-4, atol=1e-5)


def test_alpha_runs_from_the_reverse_to_the_forward_kl():
    log_ratio = jnp.linspace(-3, 3, 7)
    for alpha, name in ((0.0, "reverse_kl"), (1e-6, "reverse_kl"), (1.0, "forward_kl")):
        ours = dpo.divergence_scores(log_ratio, dpo.Divergence("alpha_divergence", alpha))
        np.testing.assert_allclose(ours, dpo.divergence_scores(log_ratio, dpo.Divergence(name, 0.0)), rtol=1e-5)


CURVED = ("forward_kl", "js_divergence", "alpha_divergence")


@pytest.mark.parametrize(
    ("name", "divergence"),
    [
        *((name, "reverse_kl") for name in dpo.LOSSES),
        *((name, kind) for name in ("sigmoid", "sppo_hard") for kind in CURVED),
    ],
)
def test_finite_log_probs_give_finite_numbers(name, divergence):
    """Far apart in either direction, equal, empty; the reference itself; and no pair at all."""
    far, equal, empty = 1e4, -7.0, 0.0
    policy = np.array([[-far, 0, -far, equal, empty, -1, -2, -3], [0, -far, -far, equal, empty, -2, -1, -3]])
    reference = np.array([[0, -far, 0, equal, empty, -1, -2, -2], [-far, 0, 0, equal, empty, -2, -1, -3]])
    tokens = np.where(policy == 0, 0, 5).astype(np.int32)
    policy, reference = policy.astype(np.float32), reference.astype(np.float32)
    for mask in (np.ones(B, bool), np.zeros(B, bool)):
        found = run(policy, reference, tokens, mask, B, name=name, divergence=dpo.Divergence(divergence, 0.5))
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found)), found
    assert not any(np.any(x) for x in jax.tree.leaves(found))


def test_the_sft_term_is_per_token_of_the_batch():
    p, tokens = case()
    chosen, mask = jnp.asarray(np.where(REAL, p[0], np.nan)), jnp.asarray(REAL)
    expected = -np.float64(p[0])[REAL].sum() / tokens[0][REAL].sum()
    np.testing.assert_allclose(dpo.sft_term(chosen, mask, tokens[0][REAL].sum().item()), expected, rtol=1e-6)

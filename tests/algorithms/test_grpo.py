"""Losses against the equations of the papers, written as loops in float64, and against what TRL computed."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import recorded

from jaxrlhf.algorithms import groups, grpo, masked, token_selection
from jaxrlhf.algorithms.kl import k3, kl_loss
from jaxrlhf.algorithms.ppo import Clip, policy_loss

LONGEST = 9
CLIP = Clip(0.2, 0.28, None, 20.0)
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)


class Case(NamedTuple):
    """Arrays [B, R] of a batch; the advantage is the same for all tokens of a row."""

    new: np.ndarray
    old: np.ndarray
    advantages: np.ndarray
    mask: np.ndarray
    weights: np.ndarray


def batch(seed, dtype):
    """Ragged with holes, the fourth row empty, the fifth of one token."""
    rng = np.random.default_rng(seed)
    mask = rng.random((6, 5)) < 0.7
    mask[3:5] = False
    mask[4, 2] = True
    old = rng.normal(size=mask.shape) - 2
    new = old + 0.4 * rng.normal(size=mask.shape)
    advantages = np.tile(rng.normal(size=(6, 1)), 5)
    floats = (x.astype(dtype) for x in (new, old, advantages))
    return Case(*floats, mask, rng.random(mask.shape).astype(dtype))


def clipped(ratio, advantage):
    return min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)


def by_token(new, case, importance):
    """w_t l_t of each real token, by row: the objective is -l_t."""
    rows = []
    for i in range(len(case.mask)):
        at = np.flatnonzero(case.mask[i])
        ratios, advantages = np.exp(new[i, at] - case.old[i, at]), case.advantages[i, at]
        rows.append(case.weights[i, at] * [-importance(r, a) for r, a in zip(ratios, advantages, strict=True)])
    return rows


def grpo_by_hand(new, case):
    """arXiv 2402.03300, eq. 3 without the KL."""
    rows = by_token(new, case, clipped)
    return sum(row.mean() for row in rows if len(row)) / len(rows)


def dr_grpo_by_hand(new, case):
    """arXiv 2503.20783: lengths give way to a constant."""
    rows = by_token(new, case, clipped)
    return sum(row.sum() for row in rows) / (len(rows) * LONGEST)


def dapo_by_hand(new, case):
    """arXiv 2503.14476, eq. 8."""
    return np.concatenate(by_token(new, case, clipped)).mean()


def gspo_by_hand(new, case):
    """arXiv 2507.18071, eq. 5 and 7; a sampler's weight is one per sequence, as its ratio is."""
    losses = []
    for i in range(len(case.mask)):
        at = np.flatnonzero(case.mask[i])
        if len(at):
            ratio = np.prod(np.exp(new[i, at] - case.old[i, at])) ** (1 / len(at))
            losses.append(-clipped(ratio, case.advantages[i, at[0]]) * case.weights[i, at[0]])
    return sum(losses) / len(case.mask)


def luspo_by_hand(new, case):
    """arXiv 2602.05261: GSPO's loss of a sequence times its length."""
    losses = []
    for i in range(len(case.mask)):
        at = np.flatnonzero(case.mask[i])
        ratio = np.exp(np.mean(new[i, at] - case.old[i, at])) if len(at) else 1.0
        losses.append(-clipped(ratio, case.advantages[i, 0]) * len(at) * (case.weights[i, at[0]] if len(at) else 0))
    return sum(losses) / len(case.mask)


def gmpo_by_hand(new, case):
    """arXiv 2507.20673: the product of the clipped ratios to the power 1 / length, times the advantage; the minimum of
    both sides is of |A|, so that the ratio of a negative advantage is only bounded from below."""
    losses = []
    for i in range(len(case.mask)):
        at = np.flatnonzero(case.mask[i])
        if len(at):
            ratios, advantage = np.exp(new[i, at] - case.old[i, at]), case.advantages[i, at[0]]
            sides = np.minimum(ratios, 1.28) if advantage > 0 else np.maximum(ratios, 0.8)
            losses.append(-(np.prod(sides) ** (1 / len(at))) * advantage * case.weights[i, at[0]])
    return sum(losses) / len(case.mask)


TEMPERATURES = 1.0, 1.4


def sapo_by_hand(new, case):
    """arXiv 2511.20347: the gate 4 / tau sigmoid(tau (rho - 1)) in place of the ratio."""

    def gated(ratio, advantage):
        tau = TEMPERATURES[0] if advantage > 0 else TEMPERATURES[1]
        return 4 / tau / (1 + np.exp(-tau * (ratio - 1))) * advantage

    rows = by_token(new, case, gated)
    return sum(row.mean() for row in rows if len(row)) / len(rows)


PENALTY = 0.7


def kl_cov_by_hand(new, case):
    """arXiv 2505.22617: every third token has the penalty here; nothing is clipped."""
    total = 0.0
    for i, t in np.argwhere(case.mask):
        log_ratio = new[i, t] - case.old[i, t]
        penalty = PENALTY * abs(log_ratio) if t % 3 == 0 else 0.0
        total -= case.weights[i, t] * (np.exp(log_ratio) * case.advantages[i, t] - penalty)
    return total / case.mask.sum()


def cispo_by_hand(new, case):
    """arXiv 2506.13585, eq. 4 and 5; weights are of `case.new`, whatever `new` is: they have no gradient."""
    at = case.mask
    importance = np.clip(np.exp(case.new - case.old), 0.8, 1.28)
    return -np.mean((case.weights * importance * case.advantages * new)[at])


def reinforce_by_hand(new, case):
    at = case.mask
    return -np.mean((case.weights * case.advantages * new)[at])


def reinforce(new, _old, advantages, mask, count, _clip, weights):
    return grpo.reinforce_loss(new, advantages, mask, count, weights)


def kl_cov(*ratio):
    selected = jnp.broadcast_to(jnp.arange(ratio[3].shape[1]) % 3 == 0, ratio[3].shape)
    return grpo.kl_cov_loss(*ratio, selected, PENALTY)


METHODS = {
    "grpo": (policy_loss, "sequence", grpo_by_hand),
    "dr_grpo": (policy_loss, "constant", dr_grpo_by_hand),
    "dapo": (policy_loss, "token", dapo_by_hand),
    "gspo": (grpo.gspo_loss, "sequence", gspo_by_hand),
    "luspo": (grpo.gspo_loss, "sum", luspo_by_hand),
    "gmpo": (grpo.gmpo_loss, "sequence", gmpo_by_hand),
    "sapo": (functools.partial(grpo.sapo_loss, temperatures=TEMPERATURES), "sequence", sapo_by_hand),
    "kl_cov": (kl_cov, "token", kl_cov_by_hand),
    "cispo": (grpo.cispo_loss, "token", cispo_by_hand),
    "reinforce": (reinforce, "token", reinforce_by_hand),
}
methods = pytest.mark.parametrize("name", METHODS)


def run(name, case, rows=slice(None), columns=0, bad=0.0):
    """((loss, metrics), gradient) of some rows of a batch, with so many more columns of padding that hold `bad`."""
    loss, normalise, _ = METHODS[name]
    count, sequences = int(case.mask.sum()), len(case.mask)
    mask = jnp.asarray(np.pad(case.mask, ((0, 0), (0, columns)))[rows])
    padded = (np.pad(x, ((0, 0), (0, columns)))[rows] for x in (case.new, case.old, case.advantages, case.weights))
    new, old, advantages, weights = (jnp.where(mask, x, bad) for x in padded)

    def of(new):
        how = ("constant", 1) if normalise == "sum" else (normalise, LONGEST)
        normaliser = grpo.token_weights(mask, count, sequences, *how)
        return loss(new, old, advantages, mask, count, CLIP, normaliser * weights)

    return jax.value_and_grad(of, has_aux=True)(new)


@methods
def test_loss_and_gradient_are_those_of_the_paper(name):
    """The gradient by central differences of the paper's equation."""
    case, (*_, by_hand) = batch(0, np.float64), METHODS[name]
    if name in ("gspo", "luspo", "gmpo"):
        case = case._replace(weights=np.tile(case.weights[:, :1], 5))
    with jax.enable_x64(True):
        (loss, metrics), gradient = jax.tree.map(np.asarray, run(name, case))
    np.testing.assert_allclose(loss, by_hand(case.new, case), rtol=1e-12)
    differences = np.zeros(case.new.shape)
    for at in np.ndindex(case.new.shape):
        step = np.zeros(case.new.shape)
        step[at] = 1e-6
        differences[at] = (by_hand(case.new + step, case) - by_hand(case.new - step, case)) / 2e-6
    np.testing.assert_allclose(gradient, differences, rtol=1e-6, atol=1e-8)
    assert np.abs(differences).max() > 0.01 and metrics["loss/policy_avg"] == loss
    if name not in ("reinforce", "sapo", "kl_cov"):
        assert 0.1 < metrics["policy/clipfrac_avg"] < 0.8  # the case is not trivial


@methods
def test_micro_batches_add_up_to_the_batch(name):
    case = batch(1, np.float32)
    parts = [run(name, case, rows=slice(*ends)) for ends in ((0, 3), (3, 6))]
    (loss, metrics), gradient = run(name, case)
    assert case.mask[:3].sum() > 2 * case.mask[3:].sum()
    jax.tree.map(close, jax.tree.map(lambda *x: sum(x), *(about for about, _ in parts)), (loss, metrics))
    close(np.concatenate([gradient for _, gradient in parts]), gradient)


@methods
@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_padding_changes_nothing_whatever_it_holds(name, bad):
    case = batch(2, np.float32)
    (loss, metrics), gradient = run(name, case)
    (dirty, dirty_metrics), dirty_gradient = run(name, case, columns=3, bad=bad)
    jax.tree.map(close, (dirty, dirty_metrics), (loss, metrics))
    close(dirty_gradient, np.pad(gradient, ((0, 0), (0, 3))))


def test_a_sequence_is_clipped_whole_and_the_metrics_are_about_tokens():
    """The tokens of both rows move apart by 1; only in the first do they move together."""
    new, old = jnp.array([[1.0, 1.0], [1.0, -1.0]]), jnp.zeros((2, 2))
    mask, one = jnp.ones((2, 2), bool), jnp.ones((2, 2))
    loss, metrics = grpo.gspo_loss(new, old, one, mask, 4, CLIP, one)
    close(loss, -(1.28 + 1) / 2)
    assert metrics["policy/clipfrac_avg"] == metrics["policy/clipfrac_high_avg"] == 0.5
    close(metrics["policy/approxkl_avg"], 0.5)
    close(metrics["val/ratio"], (3 * np.e + 1 / np.e) / 4)


def test_tokens_of_a_sequence_may_have_advantages_of_their_own():
    """The gradient of eq. 13, where nothing is clipped."""
    rng = np.random.default_rng(3)
    new, advantages = 0.05 * rng.normal(size=(2, 3, 4)).astype(np.float32)
    ones = jnp.ones((3, 4))
    run = jax.grad(lambda x: grpo.gspo_loss(x, 0 * ones, jnp.asarray(advantages), ones > 0, 12, CLIP, ones)[0])
    close(run(jnp.asarray(new)), -np.exp(new.mean(1, keepdims=True)) * advantages / 12)


def test_no_token_is_without_a_gradient_in_cispo():
    """Not even at a ratio that overflows; of a lower bound there is none at low = 1."""
    new = jnp.array([[200.0, -200.0, 0.1]])
    ones = jnp.ones((1, 3))
    run = jax.grad(lambda x: grpo.cispo_loss(x, 0 * ones, ones, ones > 0, 3, Clip(1.0, 2.0, None, 20.0), ones)[0])
    close(run(new), -np.array([[3, 0, np.exp(0.1)]]) / 3)
    bounded = jax.grad(lambda x: grpo.cispo_loss(x, 0 * ones, ones, ones > 0, 3, CLIP, ones)[0])
    close(bounded(new), -np.array([[1.28, 0.8, np.exp(0.1)]]) / 3)


def test_ratios_that_overflow_have_no_gradient():
    new = jnp.array([[200.0, -200.0, 0.1]])
    ones = jnp.ones((1, 3))
    wide = Clip(1.0, 1e30, None, 20.0)
    for loss in (METHODS["sapo"][0], METHODS["kl_cov"][0], grpo.gmpo_loss):
        gradient = jax.grad(lambda x: loss(x, 0 * ones, -ones, ones > 0, 3, wide, ones)[0])(new)  # noqa: B023
        assert np.isfinite(gradient).all() and not gradient[0, :2].any() and gradient[0, 2], loss


def test_sapo_begins_with_the_gradient_of_the_ratio():
    """At rho = 1 its slope is 1 for every temperature, and it falls to both sides."""
    ones = jnp.ones((1, 3))
    for sign in (1.0, -1.0):
        run = jax.grad(
            lambda x: grpo.sapo_loss(x, 0 * ones, sign * ones, ones > 0, 3, CLIP, ones, (0.5, 3.0))[0]  # noqa: B023
        )
        at_one = run(jnp.zeros((1, 3)))
        close(at_one, -sign / 3)
        ratio = jnp.array([[0.5, 1.0, 2.0]])
        slopes = np.abs(run(jnp.log(ratio)) / ratio)[0]
        assert slopes[1] == slopes.max() and slopes[0] < slopes[1] > slopes[2]


def test_the_expected_gradient_of_rloo_is_that_of_the_score():
    """Over every pair of answers of one token that can be drawn, against the exact sum.

    With the mean of the group as baseline, which has the answer itself in it, it is half of that: (n - 1) / n.
    """
    rng = np.random.default_rng(0)
    logits, scores = jnp.asarray(rng.normal(size=(2, 5)).astype(np.float32))
    pairs = jnp.stack(jnp.meshgrid(jnp.arange(5), jnp.arange(5)), axis=-1).reshape(-1, 2)
    same, mask = jnp.zeros(2, int), jnp.ones((2, 1), bool)
    drawn = jnp.prod(jax.nn.softmax(logits)[pairs], axis=1)

    def expected(logits, baseline):
        def of_pair(pair):
            logprobs = jax.nn.log_softmax(logits)[pair][:, None]
            advantages = baseline(scores[pair], same)[:, None]
            weights = grpo.token_weights(mask, 2, 2, "constant", 1)
            return grpo.reinforce_loss(logprobs, advantages, mask, 2, weights)[0]

        return jnp.sum(drawn * jax.vmap(of_pair)(pairs))

    exact = jax.grad(lambda x: jnp.sum(jax.nn.softmax(x) * scores))(logits)
    assert np.abs(exact).max() > 0.1
    close(jax.grad(expected)(logits, groups.rloo), -exact, atol=1e-6)
    close(jax.grad(expected)(logits, functools.partial(groups.grpo, scale=False)), -exact / 2, atol=1e-6)


# our loss, how it is normalised, the clip range; of CISPO, TRL's epsilon_high is the bound itself (1.25), 1 + high here
OF_TRL = {
    "grpo": (policy_loss, "sequence", Clip(0.2, 0.2, None, 20.0)),
    "dr_grpo": (policy_loss, "constant", Clip(0.2, 0.2, None, 20.0)),
    "dapo": (policy_loss, "token", Clip(0.2, 0.28, None, 20.0)),
    "dapo-delta": (policy_loss, "token", Clip(0.2, 0.28, 1.5, 20.0)),
    "gspo": (grpo.gspo_loss, "sequence", Clip(0.1, 0.15, None, 20.0)),
    "cispo": (grpo.cispo_loss, "token", Clip(1.0, 0.25, None, 20.0)),
    "bnpo": (policy_loss, "token", Clip(0.2, 0.2, None, 20.0)),
    "luspo": (grpo.gspo_loss, "sum", Clip(0.1, 0.15, None, 20.0)),
    "gmpo": (grpo.gmpo_loss, "sequence", Clip(1 - np.exp(-0.3), np.exp(0.2) - 1, None, 20.0)),  # TRL's are logarithms
    "sapo": (functools.partial(grpo.sapo_loss, temperatures=(1.0, 1.05)), "sequence", CLIP),
    "top-entropy": (policy_loss, "token", Clip(0.2, 0.2, None, 20.0)),
    "entropy-bonus": (policy_loss, "token", Clip(0.2, 0.2, None, 20.0)),
}


def of_trl(name):
    case = recorded.load("groups")
    mask, new, old, ref = (jnp.asarray(case[x]) for x in ("mask", "logprobs", "old_logprobs", "ref_logprobs"))
    advantages = jnp.asarray(case["advantages/rloo" if name == "rloo" else "advantages/grpo"])
    return case, mask, new, old, ref, jnp.broadcast_to(advantages[:, None], mask.shape)


@pytest.mark.parametrize("name", [*OF_TRL, "grpo-kl"])
def test_loss_and_gradient_are_those_of_trl(name):
    case, mask, new, old, ref, advantages = of_trl(name)
    loss, normalise, clip = OF_TRL[name.removesuffix("-kl")]
    count, entropies = mask.sum(), jnp.asarray(case["entropies"])
    how = ("constant", 1) if normalise == "sum" else (normalise, mask.shape[1])
    weights = grpo.token_weights(mask, count, len(mask), *how)
    if name == "top-entropy":
        weights *= token_selection.high_entropy(entropies, mask, 0.3)

    def of(new):
        policy, metrics = loss(new, old, advantages, mask, count, clip, weights)
        if name == "entropy-bonus":
            policy -= 0.5 * masked.total(entropies, mask) / count
        if name == "grpo-kl":
            policy += 0.3 * kl_loss(new, old, ref, mask, count, "k3", weights)[0]
        return policy, metrics

    (found, metrics), gradient = jax.value_and_grad(of, has_aux=True)(new)
    close(found, case[f"loss/{name}"])
    close(gradient, case[f"gradient/{name}"])
    assert name == "sapo" or 0.05 < metrics["policy/clipfrac_avg"] < 0.8
    assert not np.asarray(mask).all()


def test_k3_in_the_loss_carries_importance_weights():
    """TRL leaves them out unless use_bias_correction_kl is set, and the gradient is then not that of the KL (kl.py)."""
    case, mask, new, old, ref, _ = of_trl("grpo-kl")
    weights = grpo.token_weights(mask, mask.sum(), len(mask), "sequence", mask.shape[1])

    def plain(new):
        return 0.3 * jnp.sum(jnp.where(mask, weights * k3(new, ref), 0)) / mask.sum()

    def ours(new):
        return 0.3 * kl_loss(new, old, ref, mask, mask.sum(), "k3", weights)[0]

    for name, of, value in (("grpo-k3", plain, 0.028650), ("grpo-kl", ours, 0.029830)):
        close(of(new), value, rtol=1e-4)
        close(of(new), case[f"loss/{name}"] - case["loss/grpo"], atol=1e-6)
        close(jax.grad(of)(new), case[f"gradient/{name}"] - case["gradient/grpo"], atol=1e-6)
    assert np.abs(case["gradient/grpo-kl"] - case["gradient/grpo-k3"]).max() > 0.005


def test_rloo_of_trl_is_the_clipped_surrogate_on_whole_sequences():
    """The ratio of TRL's is that of the products, so each step after the first clips more the longer a response is."""
    case, mask, new, old, _, advantages = of_trl("rloo")
    rows = jnp.ones((len(mask), 1), bool)

    def of(new):
        summed = (jnp.sum(jnp.where(mask, x, 0), axis=1, keepdims=True) for x in (new, old))
        return policy_loss(*summed, advantages[:, :1], rows, len(mask), Clip(0.2, 0.2, None, 20.0))[0]

    found, gradient = jax.value_and_grad(of)(new)
    close(found, case["loss/rloo"])
    close(gradient, case["gradient/rloo"])

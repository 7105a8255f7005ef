import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf.algorithms import ppo
from jaxrlhf.algorithms.advantages import gae

SHAPE = (6, 5)
CLIP = ppo.Clip(0.2, 0.2, None, 20.0)


def arrays(seed, number):
    return np.random.default_rng(seed).normal(size=(number, *SHAPE)).astype(np.float32)


@pytest.fixture
def mask():
    return jnp.asarray(np.random.default_rng(7).random(SHAPE) < 0.7)


def poison(x, mask, value):
    return jnp.asarray(np.where(mask, x, value).astype(np.float32))


def test_the_score_lands_on_the_last_real_token():
    mask = jnp.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 1]], bool)
    old, reference = np.random.default_rng(0).normal(size=(2, *mask.shape)).astype(np.float32)
    scores = jnp.array([0.7, -1.6, 0.25, 9.0, 3.0])
    bad = np.where(mask, 0, np.inf).astype(np.float32)
    rewards = np.asarray(ppo.token_rewards(scores, jnp.asarray(old + bad), jnp.asarray(reference - bad), mask, 0.05))
    expected = np.where(mask, -0.05 * (old - reference), 0)
    for row, column in ((0, 2), (1, 2), (2, 0), (4, 3)):
        expected[row, column] += scores[row]
    np.testing.assert_allclose(rewards, expected, rtol=1e-6)
    assert rewards.dtype == np.float32


def clipped_loss_by_hand(new, old, advantages, mask, cliprange):
    losses, clipped = [], 0
    for index in zip(*np.nonzero(mask), strict=True):
        ratio = np.exp(np.float64(new[index]) - np.float64(old[index]))
        free = -advantages[index] * ratio
        bound = -advantages[index] * min(max(ratio, 1 - cliprange), 1 + cliprange)
        losses.append(max(free, bound))
        clipped += bound > free
    return np.mean(losses), clipped / len(losses)


def test_policy_loss_is_the_loop_over_tokens(mask):
    new, old, advantages = arrays(0, 3)
    count = jnp.asarray(mask.sum())
    loss, metrics = ppo.policy_loss(jnp.asarray(new), jnp.asarray(old), jnp.asarray(advantages), mask, count, CLIP)
    expected, clipfrac = clipped_loss_by_hand(new, old, advantages, mask, 0.2)
    assert clipfrac > 0.2  # the case is not trivial
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"], clipfrac, rtol=1e-6)
    d = np.float64(new - old)[mask]
    np.testing.assert_allclose(metrics["policy/approxkl_avg"], 0.5 * np.mean(d**2), rtol=1e-5)
    final = ppo.finalize_metrics(metrics)
    np.testing.assert_allclose(final["val/ratio"], np.exp(d).mean(), rtol=1e-5)
    np.testing.assert_allclose(final["val/ratio_var"], np.exp(d).var(), rtol=1e-4)


def test_no_gradient_flows_where_the_clip_holds(mask):
    new, old, advantages = arrays(1, 3)
    gradient = jax.grad(lambda x: ppo.policy_loss(x, jnp.asarray(old), jnp.asarray(advantages), mask, 1.0, CLIP)[0])
    g = np.asarray(gradient(jnp.asarray(new)))
    ratio = np.exp(new - old)
    held = ~mask | ((advantages > 0) & (ratio > 1.2)) | ((advantages < 0) & (ratio < 0.8))
    assert held.any() and (~held).any()
    assert not g[held].any()
    np.testing.assert_allclose(g[~held], (-advantages * ratio)[~held], rtol=1e-5)


def test_at_ratio_one_the_gradient_is_the_policy_gradient(mask):
    new, advantages = jnp.asarray(arrays(2, 2))
    count = mask.sum()
    clipped = jax.grad(lambda x: ppo.policy_loss(x, new, advantages, mask, int(count), CLIP)[0])(new)
    np.testing.assert_allclose(clipped, np.where(mask, -advantages / count, 0), rtol=1e-6)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_the_mask_hides_reaches_neither_loss_nor_gradient(mask, bad):
    new, old, advantages, returns = arrays(3, 4)

    def loss(new, old, advantages, returns):
        policy, metrics = ppo.policy_loss(new, old, advantages, mask, 10.0, CLIP)
        value, more = ppo.value_loss(new, old, returns, mask, 10.0, 0.2)
        return policy + value, metrics | more

    inputs = new, old, advantages, returns
    run = jax.value_and_grad(loss, argnums=(0, 1, 2, 3), has_aux=True)
    clean = run(*(poison(x, mask, 0) for x in inputs))
    dirty = run(*(poison(x, mask, bad) for x in inputs))
    jax.tree.map(np.testing.assert_array_equal, clean, dirty)


def test_an_overflowing_ratio_that_is_clipped_stays_harmless():
    new, old = jnp.array([[200.0, 0.1]]), jnp.zeros((1, 2))
    run = jax.value_and_grad(lambda x: ppo.policy_loss(x, old, jnp.ones((1, 2)), jnp.ones((1, 2), bool), 2.0, CLIP)[0])
    loss, gradient = run(new)
    np.testing.assert_allclose(loss, -(1.2 + np.exp(0.1)) / 2, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, -np.exp(0.1) / 2]], rtol=1e-6)


def test_value_loss_is_the_loop_over_tokens(mask):
    values, old, returns = arrays(4, 3)
    loss, metrics = ppo.value_loss(
        jnp.asarray(values), jnp.asarray(old), jnp.asarray(returns), mask, mask.sum().item(), 0.2
    )
    losses, clipped = [], 0
    for i in zip(*np.nonzero(mask), strict=True):
        near = min(max(values[i], old[i] - 0.2), old[i] + 0.2)
        losses.append(0.5 * max((values[i] - returns[i]) ** 2, (near - returns[i]) ** 2))
        clipped += (near - returns[i]) ** 2 > (values[i] - returns[i]) ** 2
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)
    np.testing.assert_allclose(metrics["val/clipfrac_avg"], clipped / len(losses), rtol=1e-6)
    assert clipped


def test_micro_batches_add_up_to_the_batch(mask):
    new, old, advantages, returns = (jnp.asarray(x) for x in arrays(5, 4))
    count = jnp.asarray(mask.sum())

    def loss(new, rows):
        at = functools.partial(jnp.take, indices=jnp.asarray(rows), axis=0)
        policy, metrics = ppo.policy_loss(at(new), at(old), at(advantages), at(mask), count, CLIP)
        value, more = ppo.value_loss(at(new), at(old), at(returns), at(mask), count, 0.2)
        return policy + 0.1 * value, metrics | more

    run = jax.jit(jax.value_and_grad(loss, has_aux=True), static_argnames="rows")
    parts = [run(new, rows=rows) for rows in ((0,), (1, 2), (3, 4, 5))]
    total = jax.tree.map(lambda *x: sum(x), *parts)
    close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-7)
    jax.tree.map(close, total, run(new, rows=tuple(range(6))))


@pytest.mark.parametrize("kl_in", ["reward", "loss"])
def test_rollout_metrics_by_hand(mask, kl_in):
    old, reference = arrays(6, 2)
    scores = np.arange(6, dtype=np.float32)
    finished = scores > 3
    bad = np.where(mask, 0, np.nan).astype(np.float32)
    inputs = (jnp.asarray(x) for x in (scores, old + bad, reference + bad, mask, finished))
    metrics = ppo.rollout_metrics(*inputs, 0.5, kl_in)
    rows, lengths = list(zip(old, reference, np.asarray(mask), strict=True)), np.asarray(mask).sum(1)
    kl = np.mean([(o - r)[m].sum() for o, r, m in rows])
    expected = {
        "objective/kl": kl,
        "objective/scores": 2.5,
        "objective/scores_std": np.std(scores),
        "objective/non_score_reward": -0.5 * kl if kl_in == "reward" else 0,
        "objective/rlhf_reward": 2.5 - 0.5 * kl,
        "val/num_eos_tokens": 2,
        "objective/kl_k3": np.mean([np.sum((np.exp(r - o) - 1 + o - r)[m]) for o, r, m in rows]),
        "objective/score_length_correlation": np.corrcoef(scores, lengths)[0, 1],
        "tokens/mean_length": lengths.mean(),
        "tokens/min_length": lengths.min(),
        "tokens/max_length": lengths.max(),
        "tokens/finished": 1 / 3,
    }
    assert metrics.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-5, err_msg=name)


def test_the_mean_score_is_per_response_and_not_per_token(mask):
    """EasyDeL divides the sum by the number of tokens, so that longer responses look worse."""
    scores, (old, reference) = jnp.arange(6, dtype=jnp.float32), jnp.asarray(arrays(6, 2))
    metrics = ppo.rollout_metrics(scores, old, reference, jnp.asarray(mask), scores > 3, 0.5, "reward")
    assert mask.sum() > 6 and metrics["objective/scores"] == 2.5


def test_rewards_sum_to_the_objective(mask):
    """Token rewards of a row add up to score - kl_coef KL: what rlhf_reward averages."""
    old, reference = (jnp.asarray(x) for x in arrays(8, 2))
    mask = mask.at[:, 0].set(True)
    scores = jnp.arange(6.0)
    rewards = ppo.token_rewards(scores, old, reference, mask, 0.3)
    metrics = ppo.rollout_metrics(scores, old, reference, mask, jnp.ones(6, bool), 0.3, "reward")
    np.testing.assert_allclose(rewards.sum(1).mean(), metrics["objective/rlhf_reward"], rtol=1e-5)


def surrogate_by_hand(new, old, advantages, mask, low, high, dual, clamp):
    """Loss of each real token in float64, and how often each bound holds."""
    losses, held = [], {"above": 0, "below": 0, "dual": 0}
    for i in zip(*np.nonzero(mask), strict=True):
        a, d = float(advantages[i]), float(np.clip(np.float64(new[i]) - np.float64(old[i]), -clamp, clamp))
        ratio = np.exp(d)
        loss = max(-a * ratio, -a * min(max(ratio, 1 - low), 1 + high))
        held["above"] += a > 0 and ratio > 1 + high
        held["below"] += a < 0 and ratio < 1 - low
        if a < 0 and dual is not None:
            held["dual"] += ratio > dual
            loss = min(loss, -a * dual)
        losses.append(loss)
    return np.array(losses), held


@pytest.mark.parametrize("dual", [None, 2.0])
def test_clip_higher_and_dual_clip_are_the_loop_over_tokens(mask, dual):
    new, old, advantages = 2 * arrays(8, 3)
    clip = ppo.Clip(0.2, 0.5, dual, 20.0)
    loss, metrics = ppo.policy_loss(*map(jnp.asarray, (new, old, advantages)), mask, mask.sum(), clip)
    losses, held = surrogate_by_hand(new, old, advantages, mask, *clip)
    np.testing.assert_allclose(loss, losses.mean(), rtol=1e-5)
    names = {"above": "policy/clipfrac_high_avg", "below": "policy/clipfrac_low_avg"}
    names |= {"dual": "policy/dual_clipfrac_avg"} if dual else {}
    for which, key in names.items():
        assert held[which]
        np.testing.assert_allclose(metrics[key], held[which] / len(losses), rtol=1e-6)
    both = held["above"] + held["below"]
    np.testing.assert_allclose(metrics["policy/clipfrac_avg"], both / len(losses), rtol=1e-6)
    d = np.float64(new - old)[np.asarray(mask)]
    np.testing.assert_allclose(metrics["policy/kl_avg"], np.mean(np.exp(d) - 1 - d), rtol=1e-4)


def test_the_loss_stands_still_beyond_the_dual_clip():
    gradient = jax.grad(
        lambda x: ppo.policy_loss(
            x, jnp.zeros((1, 3)), -jnp.ones((1, 3)), jnp.ones((1, 3), bool), 1.0, ppo.Clip(0.2, 0.2, 3.0, 20.0)
        )[0]
    )(jnp.log(jnp.array([[2.9, 3.1, 1e30]])))
    np.testing.assert_allclose(gradient, [[2.9, 0, 0]], rtol=1e-5)


def test_a_log_ratio_beyond_the_clamp_keeps_loss_and_gradient_finite():
    """Without the clamp, exp(200) is inf: the whole update would be lost."""
    new = jnp.array([[200.0, -300.0, 0.1]])
    run = jax.value_and_grad(lambda x: ppo.policy_loss(x, 0 * new, -jnp.ones((1, 3)), new < 1e9, 3.0, CLIP)[0])
    loss, gradient = run(new)
    np.testing.assert_allclose(loss, (np.exp(20.0) + 0.8 + np.exp(0.1)) / 3, rtol=1e-6)
    np.testing.assert_allclose(gradient, [[0, 0, np.exp(0.1) / 3]], rtol=1e-6)


def test_sampler_weights_scale_the_loss_of_their_tokens(mask):
    new, old, advantages, weights = arrays(9, 4)
    weights = np.abs(weights)
    poisoned = poison(weights, mask, np.nan)
    given = [jnp.asarray(x) for x in (new, old, advantages)]
    loss, _ = ppo.policy_loss(*given, mask, mask.sum(), CLIP, poisoned)
    losses, _ = surrogate_by_hand(new, old, advantages, mask, *CLIP)
    np.testing.assert_allclose(loss, np.mean(losses * weights[np.asarray(mask)]), rtol=1e-5)


def test_without_a_clip_range_the_value_loss_is_the_plain_squared_error(mask):
    values, old, returns = arrays(4, 3)
    loss, metrics = ppo.value_loss(*map(jnp.asarray, (values, old, returns)), mask, mask.sum(), None)
    np.testing.assert_allclose(loss, 0.5 * np.mean(np.float64(values - returns)[np.asarray(mask)] ** 2), rtol=1e-5)
    assert metrics["val/clipfrac_avg"] == 0


def test_token_scores_are_added_where_they_stand(mask):
    old, reference, process = arrays(10, 3)
    scores = jnp.arange(6.0)
    given = scores, jnp.asarray(old), jnp.asarray(reference), mask, 0.1
    plain = ppo.token_rewards(*given)
    both = ppo.token_rewards(*given, poison(process, mask, np.nan))
    np.testing.assert_allclose(both - plain, np.where(mask, process, 0), atol=1e-6)


def test_the_expected_gradient_is_that_of_score_minus_kl():
    """Over every response that can be drawn, of one token (the stop token 0) or two, against the exact categorical sum.

    The KL in the reward thus has its whole gradient, what a token does to the KL of the next included.
    """
    vocabulary, kl_coef = 5, 0.3
    rng = np.random.default_rng(0)
    first, second = (x.ravel() for x in np.indices((vocabulary, vocabulary)))
    drawn = (first > 0) | (second == 0)  # after a stop there is nothing to draw
    first, second = first[drawn], second[drawn]
    mask = jnp.stack([jnp.ones(len(first), bool), jnp.asarray(first > 0)], axis=1)
    scores = jnp.asarray(rng.normal(size=len(first)))
    values = jnp.asarray(np.stack([np.full(len(first), 0.7), rng.normal(size=vocabulary)[first]], axis=1))

    def logprobs(logits):
        one, two = (jax.nn.log_softmax(x) for x in logits)
        return jnp.where(mask, jnp.stack([one[first], two[first, second]], axis=1), 0)

    policy, other = ([jnp.asarray(rng.normal(size=(vocabulary,) * n)) for n in (1, 2)] for _ in range(2))
    old, reference = logprobs(policy), logprobs(other)

    def objective(logits):
        now = logprobs(logits)
        kl = jnp.sum(now - reference, axis=1)
        return jnp.sum(jnp.exp(jnp.sum(now, axis=1)) * (scores - kl_coef * kl))

    rewards = ppo.token_rewards(scores, old, reference, mask, kl_coef)
    advantages, _ = gae(rewards, values, mask, jnp.zeros(len(first)), 1.0, 1.0)

    def loss(logits):
        rows = (x[:, None] for x in (logprobs(logits), old, advantages, mask))
        of_row = jax.vmap(lambda *row: ppo.policy_loss(*row, 1, CLIP)[0])(*rows)
        return jnp.sum(jnp.exp(jnp.sum(old, axis=1)) * of_row)

    exact, ours = jax.grad(objective)(policy), jax.grad(loss)(policy)
    for a, b in zip(ours, exact, strict=True):
        assert np.abs(b).max() > 0.05
        np.testing.assert_allclose(a, -b, atol=1e-6)

import functools
import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec
from support import recorded

from jaxrlhf.algorithms import groups, ppo

GROUP = np.array([7, -3, 7, 50_000, 7, -3, 9, 9, 9, 9, 2, 2], np.int32)  # 50,000 is alone
SCORES = np.array([1.0, 0.2, -2.0, 4.0, 0.5, 0.7, 0.1, 0.1, 0.1, 0.1, -1.0, 3.0], np.float32)  # those of 9 are equal
close = functools.partial(np.testing.assert_allclose, rtol=1e-5, atol=1e-6)


def by_hand(of_group):
    """`of_group` of the scores of each group, in float64, where its rows are."""
    found = np.zeros(len(SCORES))
    for name in np.unique(GROUP):
        rows = np.flatnonzero(np.equal(GROUP, name))
        found[rows] = of_group(np.float64(SCORES[rows]))
    return found


def standardised(x):
    return (x - x.mean()) / (x.std(ddof=1) + 1e-4) if len(x) > 1 else 0


def leave_one_out(x):
    return [x[i] - np.delete(x, i).mean() for i in range(len(x))] if len(x) > 1 else 0


def of_subsets(x, k):
    """arXiv 2508.10751 over every subset: the mean of the maxima with a response in it, less that of all, over their
    deviation."""
    if len(x) <= k:
        return 0
    subsets = list(itertools.combinations(range(len(x)), k))
    maxima = np.array([x[list(subset)].max() for subset in subsets])
    mine = [np.mean([m for m, s in zip(maxima, subsets, strict=True) if i in s]) for i in range(len(x))]
    return (mine - maxima.mean()) / (maxima.std() + 1e-4)


METHODS = {
    "grpo": (functools.partial(groups.grpo, scale=True), by_hand(standardised)),
    "dr_grpo": (functools.partial(groups.grpo, scale=False), by_hand(lambda x: x - x.mean())),
    "rloo": (groups.rloo, by_hand(leave_one_out)),
    "gpg": (groups.gpg, 12 / 7 * by_hand(lambda x: x - x.mean())),  # 5 of 12 rows are in zero-variance groups
}
methods = pytest.mark.parametrize("name", METHODS)


@methods
def test_advantages_are_the_loop_over_groups(name):
    advantages, expected = METHODS[name]
    found = advantages(jnp.asarray(SCORES), jnp.asarray(GROUP))
    assert np.abs(expected).max() > 1
    close(found, expected)


@methods
def test_a_group_without_variance_has_advantages_of_exactly_nothing(name):
    """Nor does a group of one. Three times 0.1 over 3 is not 0.1 in float32: from the mean, 1e-8 would be left."""
    advantages, _ = METHODS[name]
    found = np.asarray(advantages(jnp.asarray(SCORES), jnp.asarray(GROUP)))
    np.testing.assert_array_equal(found == 0, np.isin(GROUP, [9, 50_000]))
    np.testing.assert_array_equal(groups.zero_variance(jnp.asarray(SCORES), jnp.asarray(GROUP)), found == 0)
    alone = advantages(jnp.array([0.3, 0.7]), jnp.array([0, 1]))
    np.testing.assert_array_equal(alone, np.zeros(2))


@methods
def test_neither_the_order_of_rows_nor_their_devices_nor_the_names_of_groups_matter(name):
    advantages, expected = METHODS[name]
    order = np.random.default_rng(0).permutation(len(GROUP))
    close(advantages(jnp.asarray(SCORES[order]), jnp.asarray(GROUP[order])), expected[order])
    mesh = Mesh(np.array(jax.devices()[:4]), ("data",), axis_types=(AxisType.Auto,))
    over = NamedSharding(mesh, PartitionSpec("data"))
    spread = [jax.device_put(x[order], over) for x in (SCORES, -GROUP)]  # 3 rows on each device
    close(jax.jit(advantages)(*spread), expected[order])


@methods
def test_large_scores_lose_no_digits(name):
    advantages, _ = METHODS[name]
    scores = jnp.array([1.0, 0.0, 0.0, 1.0])
    same = jnp.zeros(4, int)
    close(advantages(scores + 2.0**20, same), advantages(scores, same))


def test_what_is_not_a_number_stays_in_its_group():
    scores = jnp.asarray(np.where(GROUP == 2, np.nan, SCORES))
    found = np.isnan(groups.rloo(scores, jnp.asarray(GROUP)))
    np.testing.assert_array_equal(found, GROUP == 2)
    assert not np.asarray(groups.zero_variance(scores, jnp.asarray(GROUP)))[GROUP == 2].any()


def test_groups_are_counted():
    metrics = groups.group_metrics(jnp.asarray(SCORES), jnp.asarray(GROUP))
    assert {name: float(x) for name, x in metrics.items()} == {"groups/count": 5, "groups/flat": 2, "groups/single": 1}


def test_gpg_is_finite_where_every_group_is_flat():
    np.testing.assert_array_equal(groups.gpg(jnp.full(4, 0.1), jnp.array([0, 0, 1, 2])), np.zeros(4))


@pytest.mark.parametrize("k", [1, 2, 3, 5])
def test_pass_at_k_is_the_mean_over_subsets(k):
    """Groups of 7, 4 and 1 with ties, in any order; the last has one score, and its advantages are exactly 0."""
    rng = np.random.default_rng(k)
    group = rng.permutation(np.repeat([5, 3, 8, 1], [7, 4, 1, 6]))
    scores = np.where(group == 1, 0.1, np.round(2 * rng.normal(size=18)) / 2).astype(np.float32)
    expected = np.zeros(18)
    for name in (5, 3):
        rows = np.flatnonzero(group == name)
        expected[rows] = of_subsets(np.float64(scores[rows]), k)
    found = groups.pass_at_k(jnp.asarray(scores), jnp.asarray(group), k)
    assert np.abs(expected).max() > 0.5 and len(np.unique(scores[group == 5])) < 7
    close(found, expected, atol=5e-6)
    np.testing.assert_array_equal(np.asarray(found)[np.isin(group, [1, 8])], 0)
    close(groups.pass_at_k(jnp.asarray(scores + 1024), jnp.asarray(group), k), expected, atol=5e-6)


def test_pass_at_k_is_the_analytical_form_for_right_and_wrong_answers():
    """arXiv 2508.10751, for N responses of which n are wrong: mean 1 - C(n, k) / C(N, k), deviation sqrt(m (1 - m)),
    advantages (1 - m) / s of a right answer and (1 - m - C(n - 1, k - 1) / C(N - 1, k - 1)) / s of a wrong one."""
    for number, wrong, k in ((8, 5, 4), (8, 7, 2), (16, 12, 8)):
        scores = jnp.arange(number) >= wrong
        found = groups.pass_at_k(scores.astype(jnp.float32), jnp.zeros(number, int), k)
        mean = 1 - math.comb(wrong, k) / math.comb(number, k)
        deviation = math.sqrt(mean * (1 - mean)) + 1e-4
        at_wrong = 1 - mean - math.comb(wrong - 1, k - 1) / math.comb(number - 1, k - 1)
        close(found, np.where(scores, 1 - mean, at_wrong) / deviation, rtol=2e-5)
    few_wrong = groups.pass_at_k(jnp.array([1.0, 1, 1, 0]), jnp.zeros(4, int), 2)
    np.testing.assert_array_equal(few_wrong, 0)  # every two of them hold a right one: nothing is left to improve


def test_large_groups_of_pass_at_k_lose_few_digits():
    scores = np.random.default_rng(0).normal(size=64).astype(np.float32)
    shares = [[math.comb(j, 15) / math.comb(64, 16) for j in range(64)]]
    maxima = np.sort(scores.astype(np.float64))
    mean = np.dot(shares[0], maxima)
    deviation = np.sqrt(np.dot(shares[0], (maxima - mean) ** 2)) + 1e-4
    with_i = [
        sum(maxima[j] * math.comb(j - 1, 14) for j in range(i + 1, 64)) + maxima[i] * math.comb(i, 15)
        for i in range(64)
    ]
    expected = (np.array(with_i) / math.comb(63, 15) - mean) / deviation
    found = np.asarray(groups.pass_at_k(jnp.asarray(scores), jnp.zeros(64, int), 16))
    close(found[np.argsort(scores)], expected, rtol=1e-5, atol=5e-6)


OTHER = np.array([0.0, 1.0, 1.0, 2.0, 0.0, -1.0, 0.5, 0.5, 3.0, 0.5, 2.0, 2.0], np.float32)


def decoupled_by_hand(columns, weights):
    """arXiv 2601.05242: GRPO's advantages of each component, summed with weights and normalised over the batch."""
    total = np.zeros(len(GROUP))
    for column, weight in zip(columns, weights, strict=True):
        for name in np.unique(GROUP):
            rows = np.flatnonzero(np.equal(GROUP, name) & ~np.isnan(column))
            total[rows] += weight * standardised(np.float64(column[rows])) if len(rows) else 0
    scored = ~np.isnan(columns).all(0)
    centred = np.where(scored, total - total[scored].mean(), 0)
    return centred / (total[scored].std(ddof=1) + 1e-4)


def test_gdpo_normalises_each_component_and_then_the_batch():
    some = np.where(np.arange(12) == 4, np.nan, OTHER)
    without = np.where(np.isin(np.arange(12), [4, 9]), np.nan, [SCORES, some])  # rows 4 and 9 have no score at all
    for columns in ([SCORES, OTHER], [SCORES, some], without):
        expected = decoupled_by_hand(np.array(columns), (1.0, 0.4))
        apart = np.where(np.isnan(columns).all(0), -1 - np.arange(12), GROUP)
        found = groups.gdpo(jnp.asarray(np.array(columns, np.float32).T), jnp.array([1.0, 0.4]), jnp.asarray(apart))
        close(found, expected, atol=2e-6)
        order = np.random.default_rng(0).permutation(12)
        shuffled = groups.gdpo(
            jnp.asarray(np.array(columns, np.float32).T[order]), jnp.array([1.0, 0.4]), jnp.asarray(apart[order])
        )
        close(shuffled, expected[order], atol=2e-6)


def test_gdpo_tells_apart_what_a_sum_makes_equal():
    """Scores (1, 0) and (0, 1) have one sum, and GRPO no advantage; (2, 0) of rare twos is worth more than (0, 1)."""
    first, second = jnp.array([2.0, 0, 0, 0]), jnp.array([0.0, 2, 2, 0])
    same = jnp.zeros(4, int)
    summed = groups.grpo(first + second, same, scale=True)
    apart = groups.gdpo(jnp.stack([first, second], axis=1), jnp.ones(2), same)
    close(summed[0], summed[1])
    close(apart[0] / apart[1], (1.5 - 0.75**0.5) / (0.75**0.5 - 0.5), rtol=1e-3)
    flat = groups.group_metrics(jnp.array([2.0, 2, 2, 2]), same, jnp.array([[2.0, 0], [0, 2], [0, 2], [jnp.nan, 2]]))
    assert flat["groups/flat"] == 0
    flat = groups.group_metrics(jnp.array([2.0, 2, 2, 2]), same, jnp.array([[2.0, 0], [2, 0], [2, 0], [jnp.nan, 0]]))
    assert flat["groups/flat"] == 1


def test_remax_takes_the_greedy_score_away():
    np.testing.assert_array_equal(groups.remax(jnp.array([1.0, 2.0]), jnp.array([3.0, 0.5])), [-2, 1.5])


def ragged():
    rng = np.random.default_rng(0)
    mask = np.arange(5) < rng.integers(1, 6, len(SCORES))[:, None]
    old, reference = rng.normal(size=(2, *mask.shape)).astype(np.float32)
    return mask, old, reference


def whitened(x, mask):
    return np.where(mask, (x - x[mask].mean()) / x[mask].std(ddof=1), 0)


def test_reinforce_pp_is_score_less_kl_to_come_over_the_deviation_of_all_tokens():
    mask, old, reference = ragged()
    rewards = ppo.token_rewards(*map(jnp.asarray, (SCORES, old, reference, mask)), 0.3)
    found = groups.reinforce_pp(poison(rewards, mask), jnp.asarray(mask), 1.0)
    kl = np.where(mask, np.float64(old) - np.float64(reference), 0)
    close(found, whitened(SCORES[:, None] - 0.3 * np.cumsum(kl[:, ::-1], axis=1)[:, ::-1], mask))


def test_reinforce_pp_baseline_whitens_what_the_group_mean_leaves():
    mask, *_ = ragged()
    found = groups.reinforce_pp_baseline(*map(jnp.asarray, (SCORES, GROUP, mask)))
    close(found, whitened(np.tile(by_hand(lambda x: x - x.mean())[:, None], 5), mask))
    alike = groups.reinforce_pp_baseline(jnp.full(12, 0.1), jnp.asarray(GROUP), jnp.asarray(mask))
    np.testing.assert_array_equal(alike, np.zeros(mask.shape))


def poison(x, mask):
    return jnp.where(mask, x, jnp.nan)


def test_advantages_are_those_of_trl():
    case = recorded.load("groups")
    scores, group = jnp.asarray(case["scores"]), jnp.arange(len(case["scores"])) // case.about["group"]
    for name in ("grpo", "dr_grpo", "rloo"):
        close(METHODS[name][0](scores, group), case[f"advantages/{name}"], err_msg=name)
    decoupled = groups.gdpo(jnp.asarray(case["components"]), jnp.array(case.about["weights"]), group)
    close(decoupled, case["advantages/gdpo"])
    assert np.isnan(case["components"]).sum() == 1
    # 1e-4 is added to the deviation, which is in no paper: little at 0.577, of scores 1, 0, 0, 1, more at 0.004
    for rows, paper, trl in ((0, 0.866025, 0.865875), (8, -0.5, -0.487520)):
        of_group = case["scores"][rows : rows + 4].astype(np.float64)
        close((of_group[0] - of_group.mean()) / of_group.std(ddof=1), paper, rtol=1e-4)
        close(case["advantages/grpo"][rows], trl)

"""Group-relative updates on one small rollout, against numpy; the trainer around them is in test_grpo_trainer.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ppo_case import PAD, B, R, case, close

from jaxrlhf import sharding
from jaxrlhf.config import GRPO, Mesh, Optim, Reference
from jaxrlhf.config.grpo import RECIPES
from jaxrlhf.training import setup
from jaxrlhf.training.grpo import update as grpo_update
from jaxrlhf.training.on_policy.rollout import leave_out_unscored
from jaxrlhf.training.on_policy.update import sequence_logprobs
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.state import State

G = 4
SCORES = jnp.asarray([1.0, 0.0, 0.5, -1.0, 2.0, 2.5, 0.0, 0.25])
GREEDY = jnp.asarray([0.25, 0.5]).repeat(G)
OPTIMIZERS = (("policy", make_optimizer(Optim(eps=1e-3), 1e-2, 100)),)  # one for all: programs are shared; see ppo_case
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def problem():
    made = case()
    made.rollout = dataclasses.replace(made.rollout, index=jnp.arange(B) // G)
    return made


def run(problem, grpo, scores=SCORES, *, rollout=None, key=KEY, mesh=None, rejected=()):
    """(the policy after the update, what was compared, metrics)."""
    mesh = mesh or problem.spec.mesh
    roles = grpo_update.GRPOSpec(
        policy=problem.spec.policy,
        optimizers=OPTIMIZERS,
        temperature=0.7,
        mesh=mesh,
        reference=Reference(),
        grpo=grpo,
        response_length=R,
        rejected=rejected,
    )
    policy, reference = problem.policy, problem.frozen["reference"]
    rollout = rollout or problem.rollout
    if mesh.size > 1:
        policy, reference = (jax.device_put(tree, sharding.shardings(tree, mesh)) for tree in (policy, reference))
        rollout, scores = sharding.put_rows((rollout, scores), mesh)
    params = {"policy": setup.cast_copy(policy, "float32", mesh)}
    state = State(params, dict(OPTIMIZERS), mesh, grpo.kl_weight).value
    frozen = {"policy": {}} | ({"reference": reference} if grpo.has_reference else {})
    greedy = GREEDY if grpo.recipe.advantage == "greedy" else None
    compared, before = grpo_update.annotate(state, frozen, rollout, scores, greedy, spec=roles)
    state, after = grpo_update.update(state, {"policy": {}}, compared, key, spec=roles)
    return state.params["policy"], compared, before | after


def settings(method, **options):
    return GRPO(method=method, batch_size=B, num_generations=G, **options)


def oracle(method, problem, kl):
    """(advantages [B, R], loss before the KL) of one step, for which pi = pi_old; `kl` is k1 [B, R]."""
    mask = np.asarray(problem.rollout.response_mask)
    logprobs = np.float64(problem.rollout.logprobs) * mask
    scores, lengths = np.float64(SCORES), mask.sum(1)
    if method == "rloo":
        scores = scores - 0.05 * kl.sum(1)
    group = scores.reshape(-1, G)
    centred = (group - group.mean(1, keepdims=True)).reshape(-1)
    scaled = centred / (group.std(1, ddof=1).repeat(G) + 1e-4)

    def white(x):
        real = x[mask]
        return (x - real.mean()) / np.sqrt(real.var(ddof=1) + 1e-8) * mask

    rewards = -0.01 * kl
    rewards[np.arange(B), lengths - 1] += scores
    advantages = {
        "dr_grpo": centred,
        "rloo": centred * G / (G - 1),
        "gpg": centred,
        "remax": scores - np.float64(GREEDY),
        "reinforce_pp": white(np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]),
        "reinforce_pp_baseline": white(centred[:, None] * np.ones(mask.shape)),
    }.get(method, scaled)
    advantages = (advantages if advantages.ndim == 2 else advantages[:, None]) * mask
    terms = advantages * (logprobs if method in ("rloo", "remax", "gpg", "cispo") else 1)
    loss = {
        "grpo": np.mean(terms.sum(1) / lengths),
        "gspo": np.mean(terms.sum(1) / lengths),
        "dr_grpo": terms.sum() / (B * R),
        "rloo": terms.sum() / B,
        "remax": terms.sum() / B,
    }.get(method, terms.sum() / mask.sum())
    return advantages, -loss


@pytest.mark.parametrize("method", [name for name in RECIPES if name != "online_dpo"])
def test_every_method_matches_its_equations(problem, method):
    grpo = settings(method)
    params, compared, metrics = run(problem, grpo)
    mask = np.asarray(problem.rollout.response_mask)
    kl = np.zeros(mask.shape)
    if grpo.has_reference:
        kl = np.float64(problem.rollout.logprobs - compared.ref_logprobs) * mask
        np.testing.assert_allclose(metrics["objective/kl"], kl.sum(1).mean(), rtol=1e-4)
    assert ("loss/kl_avg" in metrics) == (grpo.has_reference and grpo.recipe.kl_in == "loss")
    advantages, loss = oracle(method, problem, kl)
    np.testing.assert_allclose(compared.advantages, advantages, rtol=2e-4, atol=1e-5)
    np.testing.assert_allclose(metrics["loss/policy_avg"], loss, rtol=2e-4, atol=1e-5)
    assert all(np.isfinite(value) for value in metrics.values()) and metrics["skipped_updates"] == 0
    assert metrics["val/first_log_ratio_max"] == 0 or compared.old_logprobs is not None
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (params, problem.policy)), strict=True)]
    assert any(moved) and metrics.get("groups/count", 0) == (2 if grpo.recipe.needs_group else 0)


def test_gamma_discounts_the_score_for_earlier_tokens(problem):
    mask = np.asarray(problem.rollout.response_mask)
    none = settings("reinforce_pp", gamma=0.5, kl_coef=0.0)
    made = grpo_update.group_advantages(SCORES, problem.rollout, None, None, None, jnp.float32(0), none)
    left = mask.sum(1, keepdims=True) - 1 - np.arange(R)
    worth = np.float64(SCORES)[:, None] * 0.5**left
    close(made, np.where(mask, (worth - worth[mask].mean()) / worth[mask].std(ddof=1), 0), rtol=1e-5, atol=1e-5)


def test_unscored_responses_are_neither_baselines_nor_trained_on(problem):
    """As in TRL's 1.8.0: its rows are nan to the means and deviations of their groups, and their advantages 0."""
    silent = np.isin(np.arange(B), [1, 4, 5, 6, 7])
    apart = dataclasses.replace(problem.rollout, index=jnp.where(silent, -1 - jnp.arange(B), problem.rollout.index))
    known = np.float64(SCORES)[[0, 2, 3]]
    expected = np.zeros(B)
    for method, worth in (
        ("grpo", (known - known.mean()) / (known.std(ddof=1) + 1e-4)),
        ("rloo", [known[i] - np.delete(known, i).mean() for i in range(3)]),
        ("remax", known - 0.25),
    ):
        made = grpo_update.group_advantages(
            SCORES, apart, GREEDY, None, None, jnp.float32(0), settings(method, kl_coef=0.0)
        )
        expected[[0, 2, 3]] = worth
        close(made, expected[:, None] * np.asarray(apart.response_mask), rtol=1e-5)
    made, valid = grpo_update.pairs(apart, SCORES.at[1].set(9.0), G, ())
    np.testing.assert_array_equal(valid, [[1, 1], [0, 0]])
    np.testing.assert_array_equal(made.tokens[0], problem.rollout.tokens[jnp.asarray([0, 3])])


@pytest.mark.parametrize("method", ["grpo", "reinforce_pp", "gpg"])
def test_unscored_responses_are_no_part_of_the_update(problem, method):
    """Policy and metrics are those of an update without them, but for the rounding of sums of float32."""
    silent = np.isin(np.arange(B), [1, 4, 6])
    scores = np.where(silent, np.nan, SCORES).astype(np.float32)
    options = settings(method)
    left = leave_out_unscored(problem.rollout, scores, PAD, problem.spec.mesh)
    params, compared, metrics = run(problem, options, jnp.asarray(scores), rollout=left)
    rest = jax.tree.map(lambda x: x[~silent], problem.rollout)
    expected, alone, known = run(problem, options, SCORES[~silent], rollout=rest)
    close(params, expected, atol=2e-6)
    close(compared.advantages[~silent], alone.advantages, rtol=1e-5)
    assert not compared.advantages[silent].any()
    assert metrics.keys() == known.keys()
    for key in metrics:
        np.testing.assert_allclose(metrics[key], known[key], rtol=1e-4, atol=2e-6, err_msg=key)


def test_zero_variance_groups_change_nothing(problem):
    scores = SCORES.at[:G].set(0.5)
    params, compared, metrics = run(problem, settings("dapo"), jnp.full(B, 0.1))
    close(params, problem.policy, rtol=0, atol=0)
    assert metrics["groups/flat"] == 2
    _, compared, metrics = run(problem, settings("dapo"), scores)
    assert metrics["groups/flat"] == 1
    assert not np.any(compared.advantages[:G]) and np.any(compared.advantages[G:])


SEVERAL = {"num_iterations": 2, "num_mini_batches": 2, "kl_coef": 0.1}


def test_neither_micro_batches_nor_padding_nor_devices_change_an_update_of_several_steps(problem):
    whole, _, expected = run(problem, settings("grpo", **SEVERAL))
    assert expected["policy/steps"] == 4 and expected["val/first_log_ratio_max"] <= 1e-5 < expected["val/log_ratio_max"]
    other = jnp.where(problem.rollout.mask, problem.rollout.tokens, 13)
    rollout = dataclasses.replace(problem.rollout, tokens=other)
    parts, _, metrics = run(problem, settings("grpo", micro_batch_size=1, **SEVERAL), rollout=rollout)
    close(parts, whole, atol=2e-5)
    close({k: metrics[k] for k in expected}, expected, rtol=1e-3, atol=1e-5)
    shuffled, *_ = run(problem, settings("grpo", **SEVERAL), key=jax.random.key(4))
    differs = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (shuffled, whole)), strict=True)]
    assert any(differs), "another key is another order of the mini-batches"
    mesh = sharding.make_mesh(Mesh(fsdp=2, tensor=4))
    together, *_ = run(problem, settings("grpo", **SEVERAL), mesh=mesh)
    close(together, whole, atol=2e-5)


def test_one_step_needs_no_old_log_probs_whatever_the_micro_batches(problem):
    """Also with weights for the sampler, which are made of the policy's own log-probs then."""
    options = {"sampler_correction": "truncate", "kl_coef": 0.1}
    whole, compared, expected = run(problem, settings("gspo", **options))
    parts, _, metrics = run(problem, settings("gspo", micro_batch_size=2, **options))
    assert compared.old_logprobs is None and metrics["val/first_log_ratio_max"] == 0
    close(parts, whole, atol=2e-5)
    close({k: metrics[k] for k in expected}, expected, rtol=1e-3, atol=1e-5)


def test_gspo_has_one_sampler_weight_per_response(problem):
    apart = dataclasses.replace(problem.rollout, logprobs=problem.rollout.logprobs - jnp.linspace(0, 1, R))
    weights, _ = grpo_update.sampler_correction(
        apart, problem.rollout.logprobs, settings("gspo", sampler_correction="truncate", sampler_cap=1.5)
    )
    mask = np.asarray(apart.response_mask)
    for row, real in enumerate(mask):
        expected = min(np.exp(np.linspace(0, 1, R)[real].mean()), 1.5)
        np.testing.assert_allclose(np.asarray(weights)[row, real], expected, rtol=1e-5)


def test_online_dpo_trains_on_the_best_and_the_worst_of_each_group_except_ties(problem):
    scores = SCORES.at[:G].set(0.5)
    params, compared, metrics = run(problem, settings("online_dpo"), scores)
    np.testing.assert_array_equal(compared.rollout.tokens[1], problem.rollout.tokens[jnp.asarray([5, 6])])
    np.testing.assert_array_equal(compared.advantages, [[0, 0], [1, 1]])
    mask = np.asarray(compared.rollout.response_mask)
    ratios = np.sum(np.float64(compared.rollout.logprobs - compared.ref_logprobs) * mask, axis=2)[1]
    margin = 0.1 * (ratios[0] - ratios[1])
    np.testing.assert_allclose(metrics["rewards/margins"], margin, rtol=1e-3)
    np.testing.assert_allclose(metrics["loss/policy_avg"], np.log1p(np.exp(-margin)), rtol=1e-4)
    assert metrics["groups/tied"] == 1
    parts, *_ = run(problem, settings("online_dpo", micro_batch_size=2), scores)
    close(parts, params, atol=2e-5)


def test_online_dpo_against_a_text_that_is_always_rejected(problem):
    grpo, rejected = settings("online_dpo", rejected_text="no"), (5, 9)
    made, valid = grpo_update.pairs(problem.rollout, SCORES, G, rejected)
    assert valid.all()
    response = problem.rollout.response_mask.shape[1]
    np.testing.assert_array_equal(made.tokens[:, 1, -response:][:, :2], [rejected] * 2)
    np.testing.assert_array_equal(made.response_mask[:, 1].sum(axis=1), [2, 2])
    best = np.argmax(np.asarray(SCORES).reshape(-1, G), axis=1) + G * np.arange(2)
    np.testing.assert_array_equal(made.tokens[:, 0], problem.rollout.tokens[best])
    said = made.tokens[0, 0, -response:][made.response_mask[0, 0]]
    _, valid = grpo_update.pairs(problem.rollout, SCORES, G, tuple(said.tolist()))
    np.testing.assert_array_equal(valid, [[0, 0], [1, 1]])  # the best of the first group says just that
    _, compared, metrics = run(problem, grpo, rejected=rejected)
    assert metrics["groups/tied"] == 0 and np.isfinite(metrics["loss/policy_avg"]) and metrics["policy/grad_norm"] > 0
    assert compared.rollout.response_mask[:, 1].sum() == 4
    # nobody sampled the text: it has no part in what is measured of the policy
    mask, kl = compared.rollout.response_mask[:, 0], compared.rollout.logprobs[:, 0] - compared.ref_logprobs[:, 0]
    np.testing.assert_allclose(metrics["objective/kl"], jnp.sum(jnp.where(mask, kl, 0), axis=1).mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/kl_per_token"], kl[mask].mean(), rtol=1e-4)
    assert metrics["val/sampler_logprob_gap_max"] < 1e-5
    chosen = jax.tree.map(lambda x: x[:, 0], compared.rollout)
    policy = problem.policy
    _, entropy = sequence_logprobs(policy, problem.spec.policy, chosen, 0.7)
    np.testing.assert_allclose(metrics["objective/entropy_per_token"], entropy[mask].mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["objective/entropy"], entropy.sum(axis=1).mean(), rtol=1e-4)

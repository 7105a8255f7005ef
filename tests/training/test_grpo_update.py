"""Group-relative updates on one small rollout, against numpy; the trainer around them is in test_grpo_trainer.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ppo_case import PAD, B, R, case, close

from jaxrlhf import sharding
from jaxrlhf.algorithms import token_selection
from jaxrlhf.algorithms.entropy import EntropyControl
from jaxrlhf.config import GRPO, Mesh, Optim, Reference
from jaxrlhf.config.grpo_methods import RECIPES
from jaxrlhf.training import setup
from jaxrlhf.training.grpo import update as grpo_update
from jaxrlhf.training.on_policy.rollout import leave_out_unscored
from jaxrlhf.training.on_policy.update import sampler_weights, sequence_logprobs
from jaxrlhf.training.optim import make_optimizer
from jaxrlhf.training.state import State

G = 4
SCORES = jnp.asarray([1.0, 0.0, 0.5, -1.0, 2.0, 2.5, 0.0, 0.25])
COMPONENTS = jnp.stack([SCORES, jnp.asarray([0.0, 1.0, 1.0, 0.5, 3.0, 0.0, 2.0, 2.5])], axis=1)
WEIGHTS = 1.0, 0.5
GREEDY = jnp.asarray([0.25, 0.5]).repeat(G)
OPTIMIZERS = (("policy", make_optimizer(Optim(eps=1e-3), 1e-2, 100)),)  # one for all: programs are shared; see ppo_case
KEY = jax.random.key(3)


@pytest.fixture(scope="module")
def problem():
    made = case()
    made.rollout = dataclasses.replace(made.rollout, index=jnp.arange(B) // G)
    return made


def spec_of(problem, grpo, *, mesh=None, rejected=()):
    return grpo_update.GRPOSpec(
        policy=problem.spec.policy,
        optimizers=OPTIMIZERS,
        temperature=0.7,
        mesh=mesh or problem.spec.mesh,
        reference=Reference(),
        grpo=grpo,
        response_length=R,
        rejected=rejected,
        reward_weights=WEIGHTS if grpo.recipe.advantage == "decoupled" else (),
    )


def run(problem, grpo, scores=SCORES, *, rollout=None, key=KEY, mesh=None, rejected=()):
    """(the policy after the update, what was compared, metrics)."""
    mesh = mesh or problem.spec.mesh
    roles = spec_of(problem, grpo, mesh=mesh, rejected=rejected)
    policy, reference = problem.policy, problem.frozen["reference"]
    rollout = rollout or problem.rollout
    if mesh.size > 1:
        policy, reference = (jax.device_put(tree, sharding.shardings(tree, mesh)) for tree in (policy, reference))
        rollout, scores = sharding.put_rows((rollout, scores), mesh)
    params = {"policy": setup.cast_copy(policy, "float32", mesh)}
    control = None if grpo.entropy_target is None else EntropyControl(jnp.float32(0.2), jnp.float32(0.2))
    state = State(params, dict(OPTIMIZERS), mesh, grpo.kl_weight, entropy=control).value
    frozen = {"policy": {}} | ({"reference": reference} if grpo.has_reference else {})
    greedy = GREEDY if grpo.recipe.advantage == "greedy" else None
    components = COMPONENTS if grpo.recipe.advantage == "decoupled" else None
    compared, before = grpo_update.annotate(state, frozen, rollout, scores, greedy, components, spec=roles)
    used = {role: frozen[role] for role in roles.update_roles}
    state, after = grpo_update.update(state, used, compared, key, spec=roles)
    return state.params["policy"], compared, before | after


def settings(method, **options):
    if method == "pass_at_k":
        options = {"pass_k": 2} | options
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
    of_components = np.float64(COMPONENTS).reshape(-1, G, 2)
    spread = of_components.std(1, ddof=1, keepdims=True) + 1e-4
    summed = ((of_components - of_components.mean(1, keepdims=True)) / spread @ WEIGHTS).reshape(-1)
    maxima = np.array([[max(a, b) for j, b in enumerate(one) if j != i] for one in group for i, a in enumerate(one)])
    every = maxima.reshape(2, -1)
    of_pairs = (maxima.mean(1) - every.mean(1).repeat(G)) / (every.std(1).repeat(G) + 1e-4)
    advantages = {
        "gdpo": (summed - summed.mean()) / (summed.std(ddof=1) + 1e-4),
        "pass_at_k": of_pairs,
        "dr_grpo": centred,
        "rloo": centred * G / (G - 1),
        "gpg": centred,
        "remax": scores - np.float64(GREEDY),
        "reinforce_pp": white(np.cumsum(rewards[:, ::-1], axis=1)[:, ::-1]),
        "reinforce_pp_baseline": white(centred[:, None] * np.ones(mask.shape)),
    }.get(method, scaled)
    advantages = (advantages if advantages.ndim == 2 else advantages[:, None]) * mask
    terms = advantages * (logprobs if method in ("rloo", "remax", "gpg", "cispo") else 1)
    by_sequence = np.mean(terms.sum(1) / lengths)
    loss = {
        **dict.fromkeys(("grpo", "gspo", "gmpo", "gdpo"), by_sequence),
        "sapo": np.mean((terms * np.where(terms > 0, 2.0, 2 / 1.05)).sum(1) / lengths),  # the gate at a ratio of 1
        "luspo": terms.sum() / B,
        "clip_cov": terms.sum() / mask.sum(),  # no token has such a covariance
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
    assert all(np.isfinite(value).all() for value in metrics.values()) and metrics["skipped_updates"] == 0
    assert metrics["val/first_log_ratio_max"] == 0 or compared.old_logprobs is not None
    moved = [np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (params, problem.policy)), strict=True)]
    assert any(moved) and metrics.get("groups/count", 0) == (2 if grpo.recipe.needs_group else 0)


def test_gamma_discounts_the_score_for_earlier_tokens(problem):
    mask = np.asarray(problem.rollout.response_mask)
    none = settings("reinforce_pp", gamma=0.5, kl_coef=0.0)
    made = grpo_update.group_advantages(
        SCORES, problem.rollout, None, None, None, None, jnp.float32(0), spec_of(problem, none)
    )
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
            SCORES, apart, GREEDY, None, None, None, jnp.float32(0), spec_of(problem, settings(method, kl_coef=0.0))
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
    for key, value in metrics.items():
        found = value[~silent] if key.endswith("_rows") else value
        np.testing.assert_allclose(found, known[key], rtol=1e-4, atol=2e-6, err_msg=key)


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
    for known in (expected, metrics):  # returned in the order of the batch; the sampler's are those of the policy
        np.testing.assert_allclose(known["old_logprobs_rows"], problem.rollout.logprobs, atol=1e-5)
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


SELECTING = {
    "top_entropy": ("grpo", {"top_entropy_quantile": 0.3}),
    "clip_cov": ("clip_cov", {"cov_ratio": 0.2, "clip_cov_low": -100.0, "clip_cov_high": 100.0}),
    "kl_cov": ("kl_cov", {"cov_ratio": 0.2, "kl_cov_coef": 2.0}),
}


@pytest.mark.parametrize("name", SELECTING)
def test_tokens_are_selected_over_the_rollout_whatever_the_micro_batches_and_the_padding(problem, name):
    method, options = SELECTING[name]
    options |= {"num_iterations": 2, "num_mini_batches": 2}
    whole, compared, expected = run(problem, settings(method, **options))
    wide = dataclasses.replace(
        problem.rollout,
        **{
            key: jnp.pad(getattr(problem.rollout, key), ((0, 0), (0, 3)), constant_values=value)
            for key, value in (("tokens", 0), ("mask", False), ("response_mask", False), ("logprobs", 0))
        },
    )
    parts, _, metrics = run(problem, settings(method, micro_batch_size=1, **options), rollout=wide)
    close(parts, whole, atol=2e-5)
    close({k: metrics[k] for k in expected}, expected, rtol=1e-3, atol=1e-5)
    mask = problem.rollout.response_mask
    covariance = token_selection.covariances(compared.old_logprobs, compared.advantages, mask)
    share = {
        "top_entropy": lambda: metrics["policy/trained"],
        "clip_cov": lambda: 1 - metrics["policy/trained"],
        "kl_cov": lambda: metrics["policy/penalised"],
    }[name]()
    assert (0.3 if name == "top_entropy" else 0.2) == pytest.approx(float(share), abs=0.05)
    plain, *_ = run(problem, settings("dapo", max_refills=0, num_iterations=2, num_mini_batches=2))
    assert any(np.any(a != b) for a, b in zip(*map(jax.tree.leaves, (plain, whole)), strict=True))
    assert np.asarray(covariance).any()


def test_truncated_completions_are_baselines_but_not_trained_on(problem):
    """The loss is that of the others, with the advantages of all; if none is finished, nothing changes."""
    cut = np.isin(np.arange(B), [0, 3, 6])
    rollout = dataclasses.replace(problem.rollout, finished=jnp.asarray(~cut))
    _, everyone, _ = run(problem, settings("dapo"), rollout=rollout)
    options = {"mask_truncated_completions": True}
    params, compared, metrics = run(problem, settings("dapo", **options), rollout=rollout)
    advantages, mask = np.asarray(everyone.advantages), np.asarray(problem.rollout.response_mask)
    np.testing.assert_allclose(metrics["loss/policy_avg"], -advantages[~cut][mask[~cut]].mean(), rtol=1e-4)
    np.testing.assert_array_equal(compared.advantages, advantages * ~cut[:, None])
    assert metrics["tokens/masked"] == 3 / 8 and metrics["groups/count"] == 2
    again, _, several = run(problem, settings("dapo", micro_batch_size=1, num_iterations=2, **options), rollout=rollout)
    assert several["val/first_log_ratio_max"] < 1e-5
    none = dataclasses.replace(problem.rollout, finished=jnp.zeros(B, bool))
    unchanged, _, metrics = run(problem, settings("dapo", **options), rollout=none)
    close(unchanged, problem.policy, rtol=0, atol=0)
    assert metrics["policy/steps"] == 0 and all(np.isfinite(value).all() for value in metrics.values())


def test_the_entropy_bonus_has_the_gradient_of_the_mean_entropy(problem):
    """Without advantages only the bonus moves the policy, by its own gradient."""
    flat = jnp.full(B, 0.5)
    options = {"entropy_coef": 0.3, "kl_coef": 0.0}
    params, _, metrics = run(problem, settings("grpo", **options), flat)
    rollout, mask = problem.rollout, problem.rollout.response_mask

    def entropy(policy):
        found = sequence_logprobs(policy, problem.spec.policy, rollout, 0.7, entropy_gradient=True)[1]
        return jnp.sum(jnp.where(mask, found, 0)) / jnp.sum(mask)

    gradient = jax.grad(entropy)(problem.policy)
    norm = np.sqrt(sum(np.sum(np.square(x)) for x in jax.tree.leaves(gradient)))
    np.testing.assert_allclose(metrics["policy/grad_norm"], 0.3 * norm, rtol=1e-3)
    assert entropy(params) > entropy(problem.policy) + 1e-3
    parts, *_ = run(problem, settings("grpo", micro_batch_size=1, **options), flat)
    close(parts, params, atol=2e-5)


def test_the_adaptive_entropy_coefficient_is_applied_and_moves(problem):
    """The state's coefficient of 0.2 is that of this update; its entropy is above the target, so the next has none."""
    flat, options = jnp.full(B, 0.5), {"kl_coef": 0.0, "entropy_target": 1e-3, "entropy_coef_delta": 0.05}
    constant, *_ = run(problem, settings("grpo", entropy_coef=0.2, kl_coef=0.0), flat)
    adaptive, _, metrics = run(problem, settings("grpo", **options), flat)
    close(adaptive, constant, atol=1e-7)
    np.testing.assert_allclose(metrics["policy/entropy_coef"], 0.2)


BOUNDS = {"sampler_cap": 1.5, "sampler_floor": 0.8}


@pytest.mark.parametrize("mode", ["truncate", "sequence_truncate", "mask", "sequence_mask", "token_mask"])
def test_sampler_weights_are_those_of_their_equations(problem, mode):
    """token_mask is IcePop's; sequence_mask is masked importance sampling; mask only drops."""
    rng = np.random.default_rng(0)
    gap = 0.3 * rng.normal(size=problem.rollout.logprobs.shape)
    gap[0], gap[1] = 100.0, -100.0
    mask = np.asarray(problem.rollout.response_mask)
    bounds = {"sampler_cap": 1.5} if mode.endswith("truncate") else BOUNDS
    grpo = settings("grpo", sampler_correction=mode, **bounds)
    weights, cut = sampler_weights(jnp.where(mask, gap, 0).astype(jnp.float32), jnp.asarray(mask), grpo)
    for row, real in enumerate(mask):
        token = np.exp(gap[row, real])
        ratio = token if mode in ("truncate", "token_mask") else np.full(real.sum(), np.prod(token))
        inside = (ratio >= 0.8) & (ratio <= 1.5)
        expected = {
            "truncate": np.minimum(ratio, 1.5),
            "sequence_truncate": np.minimum(ratio, 1.5),
            "mask": inside,
            "sequence_mask": np.where(inside, ratio, 0),
            "token_mask": np.where(inside, ratio, 0),
        }[mode]
        np.testing.assert_allclose(np.asarray(weights)[row, real], expected, rtol=1e-5, atol=1e-12)
        np.testing.assert_array_equal(np.asarray(cut)[row, real], ratio > 1.5 if "truncate" in mode else ~inside)
        assert not np.asarray(weights)[row, ~real].any()

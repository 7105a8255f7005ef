"""Annotation and update of PPO: the properties that other implementations break (peers are named where known)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ppo_case import MODEL, STOPS, B, R, V, case, close

from jaxrlhf import sharding, traced
from jaxrlhf.config import PPO, Mesh
from jaxrlhf.logprobs import response_states
from jaxrlhf.models import lm_logits
from jaxrlhf.training.ppo import update as ppo_update


def test_rollouts_of_the_case_are_ragged():
    rollout = case().rollout
    lengths = rollout.response_mask.sum(1)
    assert rollout.finished.any() and not rollout.finished.all() and len(set(lengths.tolist())) > 2


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("micro", [1, 2, None])
def test_first_ratio_is_one(dtype, micro):
    *_, metrics = case(dtype=dtype, micro_batch_size=micro).run()
    assert metrics["val/first_log_ratio_max"] <= 1e-5
    assert metrics["val/log_ratio_max"] > 1e-3  # and later ones are not: mini-batches really step (trl#5645)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_kl_to_a_copy_is_exactly_zero(dtype):
    problem = case(dtype=dtype, drift=0.0)
    *_, metrics = problem.run()
    assert metrics["objective/kl"] == 0 and metrics["objective/rlhf_reward"] == metrics["objective/scores"]


def test_old_logprobs_are_those_of_the_sampler_at_its_temperature():
    problem = case()
    _, experience, metrics = problem.run()
    np.testing.assert_allclose(experience.old_logprobs, problem.rollout.logprobs, atol=1e-5)
    assert metrics["val/sampler_logprob_gap"] <= 1e-5


@pytest.mark.parametrize("micro", [1, 2])
def test_micro_batches_do_not_change_the_update(micro):
    whole, _, expected = case().run()
    parts, _, metrics = case(micro_batch_size=micro).run()
    close(parts.params, whole.params, atol=2e-5)
    close({k: metrics[k] for k in expected}, expected, rtol=1e-3, atol=1e-5)


def test_a_one_step_update_without_annotation_equals_one_with_it():
    short = case(PPO(batch_size=B, num_ppo_epochs=1, num_mini_batches=1))
    long = case(PPO(batch_size=B, num_ppo_epochs=1, num_mini_batches=1, micro_batch_size=B // 2))
    assert short.spec.one_step(B) and not long.spec.one_step(B)
    a, filled, fused = short.run()
    b, known, annotated = long.run()
    close(a.params, b.params, atol=2e-5)
    assert set(fused) == set(annotated) and fused["val/first_log_ratio_max"] == 0
    close(filled, known, atol=1e-5)
    close(fused["objective/kl"], annotated["objective/kl"])


@pytest.mark.parametrize("passes", [1, 2])
def test_micro_batches_inside_the_layers_are_those_of_the_whole_pass(passes):
    """Without annotation by policy and critic if there is one step. A model that keeps activations has them outside."""
    inside, outside = (case(micro_batch_size=2, num_ppo_epochs=passes, num_mini_batches=passes) for _ in range(2))
    batch = 4 * passes  # few enough for this small model
    for problem in (inside, outside):
        problem.rollout, problem.scores = jax.tree.map(lambda x: x[:batch], (problem.rollout, problem.scores))
    models = {"policy": inside.spec.policy, "critic": inside.spec.critic}
    full = {role: dataclasses.replace(model, remat="full") for role, model in models.items()}
    inside.spec = dataclasses.replace(inside.spec, **full)
    params = inside.state().params
    parted = ppo_update.with_micro_batches_in_layers(inside.spec, params, inside.rollout)
    assert parted.policy.micro_batch_rows == parted.critic.micro_batch_rows == 2 and parted.one_step(batch) == (
        passes == 1
    )
    assert ppo_update.with_micro_batches_in_layers(outside.spec, params, outside.rollout) == outside.spec
    assert not outside.spec.one_step(batch)
    (a, seen, metrics), (b, annotated, expected) = inside.run(), outside.run()
    close(a.params, b.params, atol=2e-5)
    close(seen, annotated, atol=1e-5)
    close(metrics, expected, rtol=1e-3, atol=1e-5)


def test_many_rows_for_the_size_of_a_model_stay_in_micro_batches():
    """The inputs of its layers would take more memory than its gradients."""
    problem = case(micro_batch_size=2)
    models = problem.spec.policy, problem.spec.critic
    policy, critic = (dataclasses.replace(model, remat="full") for model in models)
    spec = dataclasses.replace(problem.spec, policy=policy, critic=critic)
    long = dataclasses.replace(problem.rollout, tokens=jnp.zeros((B, 1000), jnp.int32))
    params = problem.state().params
    assert ppo_update.with_micro_batches_in_layers(spec, params, problem.rollout) != spec
    rounded = jax.tree.map(lambda x: x.astype(jnp.bfloat16), params)  # whose gradients it would add up in bfloat16
    assert ppo_update.with_micro_batches_in_layers(spec, rounded, problem.rollout) == spec
    assert ppo_update.with_micro_batches_in_layers(spec, problem.state().params, long) == spec


def test_score_lands_on_the_last_real_token_and_nowhere_else():
    problem = case(kl_coef=0.0)
    _, experience, _ = problem.run()
    last = np.asarray(problem.rollout.response_mask).sum(1) - 1
    expected = np.zeros((B, R), np.float32)
    expected[np.arange(B), last] = problem.scores  # trl#3750 puts it one later, on padding
    np.testing.assert_allclose(experience.rewards, expected, atol=1e-6)


def test_token_scores_are_added_to_their_own_tokens():
    """Beside the score, in the objective too, and the same on the short way of an update of one step."""
    token_scores = jnp.asarray(np.random.default_rng(0).normal(size=(B, R)), jnp.float32)
    options = {"kl_coef": 0.0, "num_ppo_epochs": 1, "num_mini_batches": 1}
    plain, whole = case(micro_batch_size=B // 2, **options), case(micro_batch_size=B // 2, **options)
    whole.token_scores = token_scores
    _, without, _ = plain.run()
    long, experience, metrics = whole.run()
    mask = np.asarray(whole.rollout.response_mask)
    assert not mask.all()
    np.testing.assert_allclose(experience.rewards, without.rewards + np.where(mask, token_scores, 0), atol=1e-6)
    total = np.asarray(whole.scores) + np.where(mask, token_scores, 0).sum(1)
    np.testing.assert_allclose(metrics["objective/scores"], total.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], total.mean(), rtol=1e-5)
    np.testing.assert_allclose(metrics["objective/scores_std"], total.std(), rtol=1e-5)
    short = case(**options)
    short.token_scores = token_scores
    close(short.run()[0].params, long.params, atol=2e-5)


def test_fractional_scores_survive():
    problem = case(kl_coef=0.0)  # Tunix 0.1.7 truncates them to integers
    _, experience, _ = problem.run()
    np.testing.assert_allclose(experience.rewards.sum(1), problem.scores, atol=1e-6)


def test_kl_penalty_is_taken_from_every_token():
    problem = case(kl_coef=0.5)
    _, experience, metrics = problem.run()
    total = problem.scores - 0.5 * (experience.old_logprobs - experience.ref_logprobs).sum(1)
    np.testing.assert_allclose(experience.rewards.sum(1), total, atol=1e-5)
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], total.mean(), atol=1e-5)


@pytest.mark.parametrize("estimator", ["k2", "k3"])
def test_a_kl_in_the_loss_is_not_in_the_rewards(estimator):
    """One optimizer step, fused and annotated: both have the KL term that the annotated log-probs give by hand."""
    options = {"kl_in": "loss", "kl_estimator": estimator, "kl_coef": 0.5, "num_ppo_epochs": 1, "num_mini_batches": 1}
    a, _, fused = case(**options).run()
    problem = case(micro_batch_size=B // 2, **options)
    b, experience, metrics = problem.run()
    np.testing.assert_allclose(experience.rewards.sum(1), problem.scores, atol=1e-6)
    d = np.float64(experience.old_logprobs - experience.ref_logprobs)
    terms = d**2 / 2 if estimator == "k2" else np.exp(-d) - 1 + d
    expected = terms.sum() / experience.rollout.response_mask.sum()
    np.testing.assert_allclose([fused["loss/kl_avg"], metrics["loss/kl_avg"]], expected, rtol=1e-4)
    assert metrics["objective/non_score_reward"] == 0
    objective = problem.scores.mean() - 0.5 * d.sum(1).mean()
    np.testing.assert_allclose(metrics["objective/rlhf_reward"], objective, rtol=1e-4)
    close(a.params, b.params, atol=2e-5)


def exact_kl(problem, state):
    """KL(pi || ref) over the whole vocabulary, mean over the response tokens of the rollout."""
    policy, reference = (
        jax.nn.log_softmax(lm_logits(p, MODEL, response_states(p, MODEL, problem.rollout)[:, :-1]) / 0.7)
        for p in (state.params["policy"], problem.frozen["reference"])
    )
    return jnp.mean(jnp.sum(jnp.exp(policy) * (policy - reference), axis=-1)[problem.rollout.response_mask])


def test_a_kl_in_the_loss_holds_the_policy_to_its_reference():
    problem = case(kl_in="loss", kl_estimator="k3", kl_coef=30.0, drift=2.0)
    free, *_ = problem.run(dataclasses.replace(problem.state(), kl_coef=jnp.float32(0)))
    held, *_ = problem.run()
    assert exact_kl(problem, held) < 0.8 * exact_kl(problem, free)


FILTERED = {"top_k": 4, "renormalise_logprobs": True}


@pytest.mark.parametrize("drift", [0.0, 0.3])
def test_log_probs_renormalised_on_the_sampled_support(drift):
    """Old, new and reference are all over the tokens that could be drawn."""
    problem = case(filters=FILTERED, drift=drift, micro_batch_size=2)
    _, experience, metrics = problem.run()
    np.testing.assert_allclose(experience.old_logprobs, problem.rollout.logprobs, atol=1e-5)
    assert metrics["val/first_log_ratio_max"] <= 1e-5 and metrics["val/log_ratio_max"] > 1e-3
    assert (metrics["objective/kl"] == 0) == (drift == 0)
    mask = np.asarray(problem.rollout.response_mask)
    kept = np.unpackbits(np.asarray(problem.rollout.support), axis=-1, count=V)[mask] > 0
    assert (kept.sum(-1) == 4).all()
    reference = problem.frozen["reference"]
    logits = np.float64(lm_logits(reference, MODEL, response_states(reference, MODEL, problem.rollout)[:, :-1]) / 0.7)[
        mask
    ]
    targets = np.asarray(problem.rollout.tokens[:, -R:])[mask]
    expected = logits[np.arange(len(logits)), targets] - np.log(np.sum(np.exp(logits) * kept, axis=-1))
    np.testing.assert_allclose(np.asarray(experience.ref_logprobs)[mask], expected, atol=1e-5)
    assert metrics["policy/entropy_avg"] < np.log(4)


def test_truncated_responses_bootstrap_only_when_asked():
    terminal, open_end = case().run()[1], case(bootstrap_truncated=True, whiten_advantages=False).run()[1]
    assert not terminal.bootstrap.any()
    finished = np.asarray(open_end.rollout.finished)
    assert not open_end.bootstrap[finished].any() and np.all(np.abs(open_end.bootstrap[~finished]) > 0)
    row = int(np.flatnonzero(~finished)[0])
    delta = open_end.rewards[row, -1] + open_end.bootstrap[row] - open_end.values[row, -1]
    np.testing.assert_allclose(open_end.advantages[row, -1], delta, rtol=1e-5)


def test_advantages_are_whitened_over_the_whole_batch():
    _, experience, _ = case().run()
    real = np.asarray(experience.advantages)[np.asarray(experience.rollout.response_mask)]
    np.testing.assert_allclose([real.mean(), real.std(ddof=1)], [0, 1], atol=1e-4)


@pytest.mark.parametrize("other", [STOPS[0], 13])
def test_tokens_in_the_padding_do_not_matter(other):
    problem = case()
    expected, _, _ = problem.run()
    tokens = jnp.where(problem.rollout.mask, problem.rollout.tokens, other)
    problem.rollout = dataclasses.replace(problem.rollout, tokens=tokens)
    close(problem.run()[0].params, expected.params)


def test_a_nan_score_leaves_the_state_as_it_was():
    problem = case()
    before = jax.tree.map(np.asarray, problem.state())
    problem.scores = problem.scores.at[3].set(jnp.nan)
    after, _, metrics = problem.run()
    assert metrics["skipped_updates"] == 4
    for role in ("params", "opt_state"):
        jax.tree.map(np.testing.assert_array_equal, getattr(after, role), getattr(before, role))


def test_two_epochs_of_two_mini_batches_are_four_optimizer_steps():
    after, _, _ = case().run()
    counts = [x for x in jax.tree.leaves(after.opt_state) if x.dtype == jnp.int32]
    assert counts and all(int(c) == 4 for c in counts) and after.step == 1


def test_each_program_compiles_once():
    problem = case()
    ppo_update.annotate.clear_cache(), ppo_update.update.clear_cache()
    state = problem.state()
    for _ in range(3):
        state, *_ = problem.run(state)
    assert ppo_update.annotate._cache_size() == 1 and ppo_update.update._cache_size() == 1


def test_no_transfer_happens_inside_annotation_and_update():
    problem = case()
    state, key = problem.state(), jax.random.key(3)
    spec = traced.place(problem.spec, problem.spec.mesh)  # as a trainer's
    with jax.transfer_guard("disallow"):
        experience, _ = ppo_update.annotate(state, problem.frozen, problem.rollout, problem.scores, spec=spec)
        ppo_update.update(state, problem.frozen, experience, key, spec=spec)


def test_rows_may_be_on_any_device():
    """Sorted by length, so that some devices have the long responses and others the short ones, or not."""
    found = []
    for balanced in (True, False):
        problem = case(mesh=Mesh(data=4), num_mini_batches=1, num_ppo_epochs=1, micro_batch_size=4)
        lengths = np.asarray(problem.rollout.response_mask).sum(axis=1)
        order = np.arange(B) if balanced else np.argsort(lengths)
        rows = jax.tree.map(lambda x, order=order: np.asarray(x)[order], (problem.rollout, problem.scores))
        problem.rollout, problem.scores = sharding.put_rows(rows, problem.spec.mesh)
        state, _, metrics = problem.run()
        found.append((state.params, {key: metrics[key] for key in ("loss/policy_avg", "objective/kl")}))
    assert np.any(order != np.arange(B))
    close(found[0][0], found[1][0], atol=2e-5)
    close(found[0][1], found[1][1], rtol=1e-4)

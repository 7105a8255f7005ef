"""What the options of a PPO update do, each against the plain update or against arithmetic."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ppo_case import OPTIMIZERS, B, case, close

import jaxrlhf
from jaxrlhf import config
from jaxrlhf.config import PPO, Critic, Optim, Reference
from jaxrlhf.training.ppo.critic import critic_params
from jaxrlhf.training.ppo.trainer import PPOTrainer

ONE_STEP = {"num_ppo_epochs": 1, "num_mini_batches": 1}


def same(a, b):
    return all(np.array_equal(x, y) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True))


def host(tree):
    return jax.tree.map(np.array, tree)


@pytest.mark.parametrize("rows", [1, 2, B, 2 * B])
def test_the_rows_of_an_annotation_pass_do_not_change_the_update(rows):
    expected, experience, _ = case().run()
    after, chunked, _ = case(local_rollout_forward_batch_size=rows).run()
    close(chunked, experience, atol=1e-5)
    close(after.params, expected.params, atol=2e-5)


def test_an_entropy_bonus_raises_the_entropy():
    *_, without = case(kl_coef=0.0).run()
    _, *_, bonus = case(kl_coef=0.0, entropy_coef=5.0).run()
    assert bonus["policy/entropy_avg"] > without["policy/entropy_avg"] + 0.01


def test_micro_batches_do_not_change_an_update_with_everything_on():
    options = {
        "entropy_coef": 0.1, "cliprange_high": 0.3, "dual_clip": 2.0, "kl_in": "loss", "kl_estimator": "k3",
        "sampler_correction": "truncate", "value_target": "reward_to_go", "whiten_rewards": True,
    }  # fmt: skip
    whole, _, expected = case(rollout_dtype="bfloat16", **options).run()
    parts, _, metrics = case(rollout_dtype="bfloat16", micro_batch_size=2, **options).run()
    close(parts.params, whole.params, atol=3e-5)
    close({k: metrics[k] for k in expected}, expected, rtol=2e-3, atol=2e-5)


def test_the_value_target_is_the_reward_to_go_or_the_lambda_return():
    lam, togo = case(lam=0.5).run()[1], case(lam=0.5, value_target="reward_to_go").run()[1]
    mask = np.asarray(togo.rollout.response_mask)
    expected = np.where(mask, np.cumsum(np.asarray(togo.rewards)[:, ::-1], axis=1)[:, ::-1], 0)
    np.testing.assert_allclose(togo.returns, expected, atol=1e-5)
    np.testing.assert_allclose(togo.advantages, lam.advantages, atol=1e-6)
    assert np.abs(togo.returns - lam.returns).max() > 0.05


def test_target_kl_ends_the_update_before_the_step_that_is_too_far():
    """The first step is at ratio 1: never too far. The second is, if the bound is below its KL."""
    free, _, measured = case(num_ppo_epochs=3, num_mini_batches=1).run()
    assert measured["policy/steps"] == 3 and measured["policy/kl_avg"] > 0
    held, _, metrics = case(num_ppo_epochs=3, num_mini_batches=1, target_kl=1e-9).run()
    assert metrics["policy/steps"] == 2  # one was made, one was measured and thrown away
    once, _, _ = case(num_ppo_epochs=1, num_mini_batches=1, micro_batch_size=B // 2).run()
    close(held.params, once.params, atol=2e-5)
    far, _, metrics = case(num_ppo_epochs=3, num_mini_batches=1, target_kl=1e3).run()
    close(far.params, free.params, atol=1e-6)
    assert metrics["policy/steps"] == 3


def test_warm_up_trains_the_critic_alone_and_then_both():
    problem = case(critic=Critic(warmup_updates=1))
    start = host(problem.state())
    first, *_ = problem.run()
    one = host(first)
    assert same(one.params["policy"], start.params["policy"]) and same(
        one.opt_state["policy"], start.opt_state["policy"]
    )
    assert not same(one.params["critic"], start.params["critic"])
    second, *_ = problem.run(first)
    assert not same(second.params["policy"], one.params["policy"])


def test_each_role_has_its_own_maximum_gradient_norm():
    from jaxrlhf.training.optim import make_optimizer

    tight = make_optimizer(Optim(eps=1e-3, max_grad_norm=1e-4), 1e-2, 100)
    *_, metrics = case(optimizers=(OPTIMIZERS[0], ("critic", tight))).run()
    assert metrics["critic/grad_norm_clipped"] == pytest.approx(1e-4, rel=1e-4)
    assert metrics["policy/grad_norm_clipped"] > 1e-2


def test_a_shared_trunk_trains_on_both_losses_and_the_head_on_the_value_loss():
    problem = case(critic=Critic(trunk="shared"), kl_coef=0.0)
    state = problem.state()
    assert list(state.params["critic"]) == ["score"] and not problem.frozen["critic"]
    before = host(state.params)
    after, _, metrics = problem.run(state)
    assert not same(after.params["critic"], before["critic"])
    # no advantage to learn from, only values: the trunk moves with the value loss alone
    values_only = dataclasses.replace(problem.spec.ppo, whiten_advantages=False, lam=1.0)
    problem.spec = dataclasses.replace(problem.spec, ppo=values_only)
    flat, *_ = problem.run(scores=jnp.zeros(B))
    moved = jax.tree.map(
        lambda a, b: float(np.abs(a - b).max()), flat.params["policy"]["layers"], before["policy"]["layers"]
    )
    assert max(jax.tree.leaves(moved)) > 1e-4
    critic = critic_params(after.params, problem.frozen, problem.spec.trunk)
    assert critic["layers"] is after.params["policy"]["layers"] and critic["score"] is after.params["critic"]["score"]


def test_values_of_a_shared_trunk_come_from_its_own_hidden_states():
    """At the start it is the policy's trunk: the same values as a critic of one's own that is a copy of the policy."""
    own, shared = case().run()[1], case(critic=Critic(trunk="shared")).run()[1]
    np.testing.assert_allclose(shared.values, own.values, atol=1e-5)


@pytest.mark.parametrize("steps", [{}, ONE_STEP])
def test_the_adaptive_coefficient_is_in_the_state(steps):
    problem = case(kl_coef=0.1, kl_target=0.5, kl_horizon=100.0, **steps)
    after, _, metrics = problem.run()
    error = float(np.clip(metrics["objective/kl"] / 0.5 - 1, -0.2, 0.2))
    np.testing.assert_allclose(after.kl_coef, 0.1 * (1 + error * B / 100), rtol=1e-5)
    assert error and metrics["objective/kl_coef"] == jnp.float32(0.1)
    fixed, *_ = case(kl_coef=0.1, **steps).run()
    assert fixed.kl_coef == jnp.float32(0.1)


def test_the_reference_moves_every_sync_every_updates():
    problem = case(moving=Reference(sync_every=2))
    start = host(problem.state().reference)
    first, *_ = problem.run()
    assert same(first.reference, start)
    second, *_ = problem.run(first)
    assert same(second.reference, second.params["policy"])
    *_, metrics = problem.run(second)
    assert metrics["objective/kl"] == 0  # the policy is its reference


def test_the_reference_may_be_a_moving_average_of_the_policy():
    problem = case(moving=Reference(sync_every=1, sync_alpha=0.25))
    start = host(problem.state().reference)
    after, *_ = problem.run()
    expected = jax.tree.map(lambda old, new: 0.75 * old + 0.25 * new, start, host(after.params["policy"]))
    close(after.reference, expected, atol=1e-6)


def test_a_moving_reference_is_not_the_frozen_critics_trunk():
    problem = case(critic=Critic(trunk="frozen"), moving=Reference(sync_every=1))
    state = problem.state()
    trunk = host(problem.frozen["critic"])
    problem.run(state)
    assert problem.spec.trunk == "frozen" and same(problem.frozen["critic"], trunk)


def test_truncated_importance_weights_correct_a_quantised_sampler():
    problem = case(rollout_dtype="int8", sampler_correction="truncate", sampler_cap=1.0005)
    _, experience, metrics = problem.run()
    mask = np.asarray(experience.rollout.response_mask)
    ratio = np.exp(np.float64(experience.old_logprobs - experience.rollout.logprobs))
    np.testing.assert_allclose(experience.weights, np.where(mask, np.minimum(ratio, 1.0005), 0), rtol=1e-5)
    assert 0 < metrics["val/sampler_corrected"] == pytest.approx((ratio > 1.0005)[mask].mean(), rel=1e-5)
    gap = np.abs(np.log(ratio))[mask]
    np.testing.assert_allclose(metrics["val/sampler_logprob_gap"], gap.mean(), rtol=1e-4)
    np.testing.assert_allclose(metrics["val/sampler_logprob_gap_max"], gap.max(), rtol=1e-4)
    np.testing.assert_allclose(metrics["val/sampler_ratio_q50"], np.quantile(ratio[mask], 0.5), rtol=1e-4)
    np.testing.assert_allclose(metrics["val/sampler_ratio_q99"], np.quantile(ratio[mask], 0.99), rtol=1e-4)


def test_a_sequence_mask_drops_responses_with_a_ratio_too_large_or_too_small():
    problem = case(rollout_dtype="int8", sampler_correction="mask", sampler_cap=1.002)
    _, experience, metrics = problem.run()
    mask = np.asarray(experience.rollout.response_mask)
    total = np.where(mask, experience.old_logprobs - experience.rollout.logprobs, 0).sum(1)
    kept = np.abs(total) <= np.log(1.002)
    assert 0 < kept.sum() < B
    np.testing.assert_array_equal(experience.weights, np.where(mask & kept[:, None], 1.0, 0.0))
    np.testing.assert_allclose(metrics["val/sampler_corrected"], (mask & ~kept[:, None]).sum() / mask.sum(), rtol=1e-5)


def test_replay_trains_again_on_kept_rollouts():
    plain = case()
    once, *_ = plain.run()
    problem = case(replay=2)
    first, experience, metrics = problem.run()
    assert metrics["policy/steps"] == 4, "nothing is kept yet"
    close(first.params["critic"]["score"], once.params["critic"]["score"], atol=0.05)
    jax.tree.map(lambda kept, new: np.testing.assert_array_equal(kept[0], new), host(first.replay), host(experience))
    second, _, metrics = problem.run(first, scores=problem.scores * 2)
    assert metrics["policy/steps"] == 8
    third, _, metrics = problem.run(second)
    assert metrics["policy/steps"] == 12
    old = host(third.replay.old_logprobs)
    fourth, _, metrics = problem.run(third)
    assert metrics["policy/steps"] == 12, "two are kept, and the oldest made room"
    # update 3 (from 0) took the place of update 1
    assert not np.array_equal(fourth.replay.old_logprobs[1], old[1]) and np.array_equal(
        fourth.replay.old_logprobs[0], old[0]
    )


def test_an_update_that_target_kl_ends_trains_on_no_kept_rollout():
    problem = case(replay=1, target_kl=1e-7)
    first, _, metrics = problem.run()
    assert metrics["policy/steps"] == 2, "the second mini-batch is too far, and nothing follows it"
    *_, metrics = problem.run(first)
    assert metrics["policy/steps"] == 2


def test_the_reference_moves_to_the_policy_after_the_kept_rollouts():
    problem = case(replay=1, moving=Reference(sync_every=1))
    first, *_ = problem.run()
    second, _, metrics = problem.run(first)
    assert metrics["policy/steps"] == 8 and same(second.reference, host(second.params["policy"]))


def test_the_ratio_of_a_kept_rollout_is_to_the_policy_that_sampled_it():
    """With the same rollout kept and a policy that has moved, the ratios of its rows are not 1."""
    problem = case(PPO(batch_size=B, num_ppo_epochs=1, num_mini_batches=1, replay=1))
    first, *_ = problem.run()
    *_, metrics = problem.run(first)
    assert metrics["val/first_log_ratio_max"] <= 1e-5 < metrics["val/log_ratio_max"]


def test_metrics_of_a_rollout_are_over_real_tokens():
    problem = case(gamma=0.9)
    _, experience, metrics = problem.run()
    mask = np.asarray(experience.rollout.response_mask)
    lengths = mask.sum(1)
    assert metrics["tokens/finished"] == pytest.approx(np.mean(experience.rollout.finished))
    assert metrics["tokens/max_length"] == lengths.max() and metrics["tokens/min_length"] == lengths.min()
    np.testing.assert_allclose(metrics["val/value_mean"], np.asarray(experience.values)[mask].mean(), rtol=1e-4)
    correlation = np.corrcoef(problem.scores, lengths)[0, 1]
    np.testing.assert_allclose(metrics["objective/score_length_correlation"], correlation, atol=1e-5)
    returns, values = (np.float64(x)[mask] for x in (experience.returns, experience.values))
    explained = 1 - np.var(returns - values) / np.var(returns)
    np.testing.assert_allclose(metrics["val/explained_variance"], explained, rtol=1e-3, atol=1e-4)
    raw = case(gamma=0.9, whiten_advantages=False).run()[1]
    np.testing.assert_allclose(metrics["val/advantage_mean"], np.asarray(raw.advantages)[mask].mean(), atol=1e-5)


def test_scores_less_those_of_the_others_and_a_lambda_that_follows_the_length(ppo):
    """Of two completions of a prompt, the rewards of one add up to minus those of the other; a completion without a
    score leaves the other one without a reward. The advantages are GAE's with each row's lambda."""
    options = {"num_generations": 2, "baseline": "leave_one_out", "lam_alpha": 0.3, "value_target": "reward_to_go"}
    options |= {"kl_coef": 0.0, "whiten_advantages": False}

    def reward(prompts, completions):
        scores: list[float | None] = [float(len(text)) + i for i, text in enumerate(completions)]
        scores[3] = None
        return scores

    trainer = PPOTrainer(config.PPOConfig(**ppo | {"ppo": config.replace(ppo["ppo"], **options)}), reward=reward)
    step = trainer.ppo_step(["say red ", "say blue ", "go ", "stop "])
    experience, scores = step["experience"], step["rewards"]
    assert len(step["generated_texts"]) == 8 and scores[3] is None
    rewards, values, mask = (
        np.asarray(x) for x in (experience.rewards, experience.values, experience.rollout.response_mask)
    )
    expected = [scores[i] - scores[i ^ 1] if i // 2 != 1 else 0.0 for i in range(8)]
    np.testing.assert_allclose(rewards.sum(1), expected, rtol=1e-5, atol=1e-6)
    assert not mask[3].any() and mask[2].any() and np.abs(expected).max() > 1
    table = jaxrlhf.inspect(experience, trainer.tokenizer)
    for i, real in enumerate(mask):
        lam, size = max(1 - 1 / (0.3 * max(real.sum(), 1)), 0), real.sum()
        following = np.append(values[i, real], 0.0)
        deltas = rewards[i, real] + following[1:] - following[:-1]
        wanted = [sum(lam**k * deltas[t + k] for k in range(size - t)) for t in range(size)]
        np.testing.assert_allclose(np.asarray(experience.advantages)[i, real], wanted, rtol=1e-4, atol=1e-5)
    shown = [row["raw_advantage"] for row in table.rows]
    np.testing.assert_allclose(shown, [row["advantage"] for row in table.rows], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"lam_alpha": 0.05, "lam": 0.9}, "leave one of them out"),
        ({"num_generations": 3}, r"must be a multiple of ppo.num_generations \(3\); 15 would do"),
        ({"baseline": "leave_one_out"}, "give 2 or more"),
    ],
)
def test_options_of_groups_and_lambdas_that_cannot_work_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        config.PPO(**options)

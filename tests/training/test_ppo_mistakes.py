"""Mistakes of other implementations that no other test of PPO is named after; docs/correctness.md has them all."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.ppo_case import MODEL, B, case

import jaxrlhf
from jaxrlhf import config
from jaxrlhf.config import Critic, Reference
from jaxrlhf.training.ppo import update as ppo_update
from jaxrlhf.training.ppo.critic import critic_model, init_critic
from jaxrlhf.training.ppo.trainer import PPOTrainer


def test_each_epoch_of_each_update_shuffles_the_whole_batch_anew(monkeypatch):
    seen, gradients = [], ppo_update.gradients_in_turn

    def spy(losses, params, batch, *others):
        jax.debug.callback(lambda rows: seen.append(np.array(rows)), batch.rollout.index, ordered=True)
        return gradients(losses, params, batch, *others)

    experience = case().run()[1]
    monkeypatch.setattr(ppo_update, "gradients_in_turn", spy)
    problem = case(num_ppo_epochs=3, kl_coef=0.061)  # a coefficient of its own: a program of its own
    for key in (3, 4):
        ppo_update.update(problem.state(), problem.frozen, experience, jax.random.key(key), spec=problem.spec)
    jax.effects_barrier()
    assert [len(rows) for rows in seen] == [B // 2] * 12
    epochs = [tuple(np.concatenate(seen[i : i + 2]).tolist()) for i in range(0, 12, 2)]
    assert all(sorted(epoch) == list(range(B)) for epoch in epochs), "every row once"
    assert len(set(epochs)) == 6, "two updates of three epochs"
    assert len({frozenset(rows.tolist()) for rows in seen}) > 4, "mini-batches are put together anew"


def test_the_ratio_differs_from_one_after_the_first_step():
    *_, metrics = case().run()
    assert metrics["val/first_log_ratio_max"] <= 1e-5 < metrics["val/log_ratio_max"]
    assert metrics["policy/approxkl_avg"] > 0 and metrics["val/ratio_var"] > 0


def test_metrics_are_means_over_the_steps_that_ran():
    *_, metrics = case().run()  # four steps; a mean over eight places, half of them empty, would be 0.5
    assert metrics["val/ratio"] == pytest.approx(1, abs=0.2)
    assert metrics["policy/steps"] == 4


def test_a_critic_can_be_initialised_from_a_policy_with_tied_embeddings():
    problem = case()
    critic = problem.state().params["critic"]
    assert MODEL.tie_embeddings and "embed" in critic and "lm_head" not in critic
    values = problem.run()[1].values
    assert np.isfinite(values).all() and np.asarray(values).any()


@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_the_value_head_starts_at_zero(head):
    problem = case(critic=Critic(head=head))
    reference, mesh = problem.frozen["reference"], problem.spec.mesh
    model = critic_model(problem.config, MODEL, None)
    critic, _ = init_critic(problem.config, model, problem.policy, reference, None, mesh, jax.random.key(0))
    assert not np.any(jaxrlhf.models.scalar_head(critic, model, jnp.ones((2, 3, 16))))


def test_the_head_of_a_frozen_critic_trains_and_is_in_the_checkpoint():
    problem = case(critic=Critic(trunk="frozen"), moving=Reference(sync_every=1))
    before = problem.state()
    assert list(before.params["critic"]) == ["score"], "what is in the state is what a checkpoint holds"
    start = np.array(before.params["critic"]["score"]["kernel"])
    after, *_ = problem.run(before)
    assert np.abs(np.asarray(after.params["critic"]["score"]["kernel"]) - start).max() > 1e-4


def zero(prompts, completions, **columns):
    return [0.0] * len(prompts)


def test_updates_sample_different_responses_and_a_repeated_update_the_same(ppo):
    trainer = PPOTrainer(config.PPOConfig(**ppo), reward=zero)
    rows = trainer.data.train[:8]
    first, second, again = (trainer.generate(rows, step)[1] for step in (0, 1, 0))
    assert first == again
    assert all(a != b for a, b in zip(first, second, strict=True))


def test_the_reference_is_the_policy_without_a_value_head_and_the_value_model_is_kept(ppo, tmp_path):
    trainer = PPOTrainer(config.PPOConfig(**ppo), reward=zero)
    assert trainer.frozen["reference"].keys() == trainer.params.keys() and "score" not in trainer.params
    saved = trainer.state.template  # its shapes, and those of a checkpoint
    assert "score" in saved.params["critic"] and "critic" in saved.opt_state
    model, critic = jaxrlhf.load(trainer.save_pretrained(tmp_path / "critic", role="critic"))
    assert model.head == "linear" and "score" in critic


def test_greedy_completions_of_a_validation_do_not_depend_on_the_key(ppo):
    options = ppo | {"data": config.replace(ppo["data"], validation_fraction=0.25)}
    trainer = PPOTrainer(config.PPOConfig(**options), reward=zero)
    validator, params, said = trainer.validator, trainer.sampler.inference_copy(trainer.params), []
    for seed in (0, 1):
        validator._key = jax.random.key(seed)
        said.append(validator._generate(params, greedy=True)[1])
    one, other = said
    assert one == other and len(one) == len(validator.rows)

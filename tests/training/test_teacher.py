"""A teacher as the reference of PPO and GRPO: its log-probs, its pull, and what is refused."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import length_reward, records

import jaxrlhf
from jaxrlhf import config
from jaxrlhf.errors import ConfigError
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer

PROMPTS = ["say red ", "say blue! ", "say grey ", "say pink!! "]


@pytest.fixture
def options(parts, teacher):
    return parts | {
        "sampling": config.Sampling(response_length=8),
        "data": config.replace(parts["data"], validation_fraction=0.0),
        "reference": config.Reference(path=str(teacher)),
        "optim": config.Optim(learning_rate=2e-2),
    }


def teacher_logprobs(folder, rollout):
    model, params = jaxrlhf.load(folder)
    return np.asarray(jaxrlhf.sequence_logprobs(params, model, jax.tree.map(jnp.asarray, rollout), 1.0)[0])


@pytest.mark.parametrize("method", ["ppo", "grpo"])
def test_the_kl_is_to_the_teacher(method, options, on_disk, teacher):
    """PPO with adapters, whose base model would be the reference; GRPO with the KL in the loss."""
    if method == "ppo":
        settings = {"ppo": config.PPO(batch_size=4, total_episodes=4, num_ppo_epochs=2, kl_coef=0.5), **on_disk}
        trainer = PPOTrainer(config.PPOConfig(**options | settings), reward=length_reward)
        result = trainer.ppo_step(PROMPTS)
    else:
        grpo = config.GRPO(batch_size=8, num_generations=2, total_episodes=8, num_mini_batches=2)
        trainer = GRPOTrainer(config.GRPOConfig(grpo=grpo, **options), reward=length_reward)
        result = trainer.grpo_step(PROMPTS)
    assert "KL to the teacher" in trainer.describe()
    experience = jax.device_get(result["experience"])
    expected = teacher_logprobs(teacher, experience.rollout)
    np.testing.assert_allclose(experience.ref_logprobs, expected, atol=2e-4)
    kl = np.where(experience.rollout.response_mask, experience.old_logprobs - expected, 0).sum(1)
    assert result["objective/kl"] == pytest.approx(kl.mean(), abs=1e-3) and abs(kl.mean()) > 0.1
    if method == "ppo":
        inner = experience.rollout.response_mask[:, :-1] & experience.rollout.response_mask[:, 1:]
        np.testing.assert_allclose(
            experience.rewards[:, :-1][inner],
            -0.5 * (experience.old_logprobs - expected)[:, :-1][inner],
            atol=1e-3,
            err_msg="every token but the last pays the KL alone",
        )


@pytest.mark.long
def test_a_policy_without_another_reward_comes_near_its_teacher(options, teacher, tmp_path):
    """All scores are equal, so that the KL in the loss is all there is to learn."""
    options |= {
        "grpo": config.GRPO(batch_size=16, num_generations=2, total_episodes=960, kl_coef=1.0),
        "data": config.replace(options["data"], validation_fraction=0.25),
        "validation": config.Validation(max_prompts=8),
        "reference": config.Reference(path=str(teacher), quantize="int8"),
    }
    run = config.GRPOConfig(run_dir=str(tmp_path / "run"), **options)
    trainer = GRPOTrainer(run, reward=lambda prompts, completions, **_: [0.0] * len(completions))
    assert "codes" in trainer.reference["layers"]["mlp"]["up"]
    result = trainer.train()
    before = json.loads((tmp_path / "run" / "validation.json").read_text())["metrics"]["eval/kl"]
    assert result["eval/kl"] < 0.8 * before
    assert len(records(tmp_path / "run")) == 60


def test_what_does_not_go_with_a_teacher_is_refused(options):
    for section, reason in (
        ({"path": "t", "sync_every": 2}, "a teacher .* does not move with the policy"),
        ({"quantize": "int8"}, "revision and quantize are a teacher's, and path is empty"),
    ):
        with pytest.raises(ConfigError, match=reason):
            config.Reference(**section)
    teacher = config.Reference(path="t")
    with pytest.raises(ConfigError, match="critic.trunk: frozen takes the arrays of the reference"):
        config.PPOConfig(reference=teacher, critic=config.Critic(trunk="frozen"))
    with pytest.raises(ConfigError, match=r"reference.path is set, and with a grpo.kl_coef of 0 \(dapo\)"):
        config.GRPOConfig(reference=teacher, grpo=config.GRPO(method="dapo"))
    with pytest.raises(ConfigError, match="the teacher of reference.path has a vocabulary of its own"):
        config.PPOConfig(reference=teacher, sampling=config.Sampling(renormalise_logprobs=True, top_k=5))
    assert config.PPOConfig(reference=config.Reference(path="t", offload=True), lora=config.LoRA(enabled=True))

"""Rollouts drawn one update ahead on devices of their own (`rollout.devices`)."""

import dataclasses

import jax
import numpy as np
import pytest
from support.runs import equal, length_reward, records

from jaxrlhf import config, sharding
from jaxrlhf.errors import ConfigError, Preempted
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer

STEPS = 5


@pytest.fixture(params=["ppo", pytest.param("grpo", marks=pytest.mark.long)])
def make(request, parts, tmp_path):
    """make(name, **options): a trainer whose rollouts are drawn ahead, except across the checkpoint of step 2."""
    common = {
        "batch_size": 8,
        "total_episodes": 8 * STEPS,
        "num_mini_batches": 2,
        "sampler_correction": "truncate",
    }
    base = parts | {
        "sampling": config.Sampling(response_length=8),
        "data": config.replace(parts["data"], validation_fraction=0.0),
        "mesh": config.Mesh(data=2),
        "rollout": config.Generation(devices=2),
        "checkpoint": config.Checkpoint(save_every=2),
        "logging": config.Logging(quiet=True, tensorboard=False, sample_every=0, token_samples=0),
    }

    def trainer(name, **options):
        given = base | {"run_dir": str(tmp_path / name)} | options
        if request.param == "ppo":
            return PPOTrainer(config.PPOConfig(ppo=config.PPO(**common), **given), reward=length_reward)
        grpo = config.GRPO(num_generations=2, **common)
        return GRPOTrainer(config.GRPOConfig(grpo=grpo, **given), reward=length_reward)

    return trainer


def test_rollouts_are_one_update_old_and_runs_resume_bit_for_bit(make, tmp_path, request):
    whole = make("whole")
    whole.train()
    log = records(tmp_path / "whole")
    assert [record["rollout/staleness"] for record in log] == [0, 1, 0, 1, 0]
    gaps = [record["val/sampler_logprob_gap"] for record in log]
    assert max(gaps[0::2]) < 1e-4 < 0.01 < min(gaps[1::2]), "the older policy gives its own responses other log-probs"
    assert all(record["val/sampler_corrected"] == 0 for record in log[0::2])
    if "val/sampler_ratio_q01" in log[0]:  # ppo
        assert all(
            record["val/sampler_ratio_q01"] < 0.99 < 1.01 < record["val/sampler_ratio_q99"] for record in log[1::2]
        )

    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted, match="after step 2"):
        make("parts").train()
    resumed = make("parts")
    resumed.train()
    assert records(tmp_path / "parts") == log
    equal(jax.device_get(resumed.state.value), jax.device_get(whole.state.value))


def test_a_run_ahead_is_the_updates_written_out_one_by_one(make, tmp_path):
    """With the trainer's own parts: responses of the policy of the update before, on the mesh that trains."""
    ahead = make("ahead")
    ahead.train()
    alone = make("alone", rollout=config.Generation())
    policy = jax.device_get(alone.params)
    for step in range(STEPS):
        older, policy = policy, jax.device_get(alone.params)
        rows = alone.prompts(step)
        placed = jax.device_put(policy if step % 2 == 0 else older, sharding.shardings(policy, alone.mesh))
        rollout, completions = alone.sampler.generate(placed, rows, alone.key(step, 0))
        scored = alone.scorer.score_rows(rows, completions, rollout)
        if isinstance(alone, PPOTrainer):
            alone.learn(rollout, scored.scores, step)
        else:
            alone.learn(rollout, scored.totals, step)
    a, b = (jax.device_get(trainer.state.value.params) for trainer in (ahead, alone))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_a_run_stopped_between_checkpoints_goes_on_with_fresh_responses(make, tmp_path, request, capsys):
    request.getfixturevalue("stop_at_two")
    options = {"checkpoint": config.Checkpoint(save_every=4), "logging": config.Logging(tensorboard=False)}
    with pytest.raises(Preempted, match="after step 2"):
        make("parts", **options).train()
    make("parts", **options).train()
    assert [record["rollout/staleness"] for record in records(tmp_path / "parts")] == [0, 1, 0, 1, 0]
    assert capsys.readouterr().out.count("update 3 has fresh responses") == 1


def test_meshes_are_disjoint_and_options_that_cannot_work_are_refused(make):
    trainer = make("some", mesh=config.Mesh(data=-1), rollout=config.Generation(devices=4))
    used = [set(mesh.devices.flat) for mesh in (trainer.mesh, trainer.ahead.sampler.mesh)]
    assert len(used[0]) == len(used[1]) == 4 and not used[0] & used[1]
    for devices, message in (
        (8, "there are 8 devices, so none would be left"),
        (3, r"\(8\) must be a multiple of .* \(3\)"),
    ):
        with pytest.raises(ConfigError, match=message):
            make("none", rollout=config.Generation(devices=devices))
    with pytest.raises(ConfigError, match=r"rollout.devices \(3\) must be a multiple of mesh.tensor \(2\)"):
        make("none", mesh=config.Mesh(tensor=2), rollout=config.Generation(devices=3))
    section = trainer.config.method
    plain = dataclasses.replace(getattr(trainer.config, section), sampler_correction="none")
    with pytest.raises(ValueError, match=f"set {section}.sampler_correction to truncate or mask"):
        dataclasses.replace(trainer.config, **{section: plain})


def test_online_dpo_is_refused(parts):
    options = config.GRPO(method="online_dpo", batch_size=8, num_generations=2)
    with pytest.raises(ValueError, match="online_dpo has no importance weights"):
        config.GRPOConfig(**parts, grpo=options, rollout=config.Generation(devices=1))

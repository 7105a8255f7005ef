"""A run that an earlier version of the package started and stopped is resumed by this one.

The run of PPO has most of what a checkpoint can hold; those of the other methods come from scripts/record_runs.py.
"""

import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from support.runs import length_reward, records

from jaxrlhf import config
from jaxrlhf.checkpoint.digest import digests, leaves_by_name
from jaxrlhf.cli import main
from jaxrlhf.training.ppo import PPOTrainer

RUNS = pathlib.Path(__file__).resolve().parents[1] / "fixtures" / "runs"
RECORDED = RUNS / "ppo"
"""Four updates recorded at commit cabfee0 with jax 0.10.2 on a CPU. `run` was stopped after two of them; metrics and
final state of the same run without a stop are in `expected.jsonl` and `digests.json`."""


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A copy of the recorded run in the current directory, and its trainer: adaptive KL, running score statistics, a
    moving reference, warm-up of the critic and validation, all of which the checkpoint restores."""
    shutil.copytree(RECORDED, tmp_path / "recorded")
    monkeypatch.chdir(tmp_path / "recorded")
    return PPOTrainer(
        config.PPOConfig(
            run_dir="run",
            model=config.ModelSource(path="model"),
            data=config.Data(path="rows.jsonl", validation_fraction=0.25),
            optim=config.Optim(learning_rate=1e-2),
            logging=config.Logging(quiet=True, tensorboard=False, sample_every=0),
            checkpoint=config.Checkpoint(save_every=2, keep=1),
            sampling=config.Sampling(response_length=8),
            ppo=config.PPO(
                batch_size=8,
                total_episodes=32,
                num_mini_batches=2,
                num_ppo_epochs=2,
                kl_coef=0.2,
                kl_target=0.01,
                kl_horizon=50.0,
            ),
            reference=config.Reference(sync_every=2, sync_alpha=0.5),
            scores=config.Scores(normalise="running", clip=2.0, missing_eos_penalty=0.5),
            critic=config.Critic(trunk="own", warmup_updates=1),
            validation=config.Validation(eval_steps=2, max_prompts=4),
        ),
        reward=length_reward,
    )


def test_a_run_of_an_earlier_version_resumes(recorded, monkeypatch):
    """To rounding on any machine: the same samples and, after two updates, the same metrics. The bits of the state are
    compared where the machine gives the recorded bits of the metrics."""
    recorded.train()
    assert recorded.state.value.step == 4
    log = records("run")
    expected = [json.loads(line) for line in pathlib.Path("expected.jsonl").read_text().splitlines()]
    expected = [{k: v for k, v in record.items() if not k.startswith("perf/")} for record in expected]
    assert log[:2] == expected[:2], "the log is kept as it was"
    new = [record.keys() - before.keys() for record, before in zip(log, expected, strict=True)]
    assert new == [set(), set(), *[{"tokens/generated"}] * 2], "of the updates made now"
    assert all(before.keys() <= record.keys() for record, before in zip(log, expected, strict=True))
    assert [record.pop("tokens/generated") for record in log[2:]] == [64, 63], "8 responses of mean_length"
    for record, before in zip(log, expected, strict=True):
        for key, value in before.items():
            np.testing.assert_allclose(record[key], value, rtol=2e-3, atol=2e-5, err_msg=key)
    if log == expected:
        bits = json.loads(pathlib.Path("digests.json").read_text())
        assert digests(leaves_by_name(jax.device_put(recorded.state.value))) == bits


@pytest.mark.parametrize("name", sorted(path.parent.name for path in RUNS.glob("*-*/run")))
def test_a_run_of_each_method_resumes_with_its_own_config(name, tmp_path, monkeypatch):
    for part in ("inputs", name):
        shutil.copytree(RUNS / part, tmp_path / part)
    monkeypatch.chdir(tmp_path / name)
    method = json.loads(pathlib.Path("run/run.json").read_text())["method"]
    expected = [json.loads(line) for line in pathlib.Path("expected.jsonl").read_text().splitlines()]
    assert main([method, "run/config.yaml"]) == 0
    log = records("run")
    assert log[:2] == expected[:2], "the log is kept as it was"
    assert [record["step"] for record in log] == [1, 2, 3, 4]
    for record, before in zip(log, expected, strict=True):
        for key, value in before.items():
            np.testing.assert_allclose(record[key], value, rtol=2e-3, atol=2e-5, err_msg=key)
    assert list(pathlib.Path("run/export").glob("*.safetensors"))

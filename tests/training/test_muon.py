"""Runs with Muon, and checkpoints by time; the optimizer's steps are in test_step.py."""

import jax
import numpy as np
import pytest
from support.runs import equal, records

from jaxrlhf import config
from jaxrlhf.errors import Preempted
from jaxrlhf.training.sft import SFTTrainer, update

MUON = {"optim": config.Optim(name="muon", learning_rate=1e-2, state_dtype="bfloat16")}


def test_a_stopped_run_with_muon_goes_on_bit_for_bit_wherever_it_was_saved(supervised, tmp_path, request):
    """One run is saved by steps, the other by time, after each; both learn."""
    train = config.replace(supervised["train"], max_steps=6)
    by_steps = supervised | MUON | {"train": train, "checkpoint": config.Checkpoint(save_every=2, keep=9)}
    by_time = by_steps | {"checkpoint": config.Checkpoint(save_every=0, save_minutes=1e-9, keep=9)}
    seldom = by_steps | {"checkpoint": config.Checkpoint(save_every=0, save_minutes=1e6, keep=9)}

    def make(name, options):
        return SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / name), **options))

    def steps(name):
        return sorted(int(path.name) for path in (tmp_path / name / "checkpoints").iterdir())

    whole = make("whole", by_steps)
    whole.train()
    log = records(tmp_path / "whole")
    assert log[-1]["loss"] < 0.9 * log[0]["loss"] and steps("whole") == [2, 3, 4, 6]  # evaluated after 3
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted, match="after step 2"):
        make("parts", by_time).train()
    assert steps("parts") == [1, 2]
    resumed = make("parts", by_time)
    resumed.train()
    assert records(tmp_path / "parts") == log and steps("parts") == [1, 2, 3, 4, 5, 6]
    equal(resumed.state.value, whole.state.value)
    make("seldom", seldom).train()
    assert steps("seldom") == [3, 6]


def test_muon_on_several_devices_is_that_on_one(supervised):
    train = config.Train(max_steps=2, batch_size=8, eval_batch_size=8)
    options = supervised | {"train": train, "optim": config.Optim(name="muon", learning_rate=1e-2, eps=1e-3)}
    ends = []
    for mesh in (config.Mesh(), config.Mesh(fsdp=4, tensor=2)):
        trainer = SFTTrainer(config.SFTConfig(mesh=mesh, **options))
        for step in range(2):
            arguments = trainer.state.value, trainer.frozen, trainer.batch(step), trainer.key
            trainer.state.value, _ = update(*arguments, spec=trainer.spec)
        state, template = trainer.state.value, trainer.state.template
        assert all(jax.tree.leaves(jax.tree.map(lambda x, y: x.sharding == y.sharding, state, template)))
        ends.append(jax.device_get(state.params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-3, atol=2e-5), *ends)
    moments = {
        name: jax.tree.leaves(part) for name, part in trainer.state.value.opt_state["policy"][0].inner_states.items()
    }
    assert any(len(x.sharding.spec) for x in moments["muon"] if x.ndim)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"optim": {"momentum": 0.9}}, "whose momentum is optim.beta1"),
        ({"optim": {"name": "muon"}, "lora": {"enabled": True}}, "adapters would all be left to AdamW"),
    ],
)
def test_options_that_muon_does_not_take_are_refused(options, said):
    with pytest.raises(ValueError, match=said):
        config.SFTConfig(**options)


def test_checkpoints_by_time_are_refused_with_rollouts_ahead():
    options = {
        "rollout": {"devices": 1},
        "checkpoint": {"save_minutes": 5.0},
        "ppo": {"sampler_correction": "truncate"},
    }
    with pytest.raises(ValueError, match="use checkpoint.save_every"):
        config.PPOConfig(**options)

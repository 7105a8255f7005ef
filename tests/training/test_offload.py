"""Moments and reference in the host's memory between their uses: the same numbers, and room on the device."""

import gc

import jax
import pytest
from support.runs import equal, length_reward, records

from jaxrlhf import config, sharding
from jaxrlhf.errors import ConfigError
from jaxrlhf.training import setup
from jaxrlhf.training.ppo import trainer as ppo_trainer
from jaxrlhf.training.ppo.trainer import PPOTrainer


def kinds(tree) -> set[str]:
    return {x.sharding.memory_kind for x in jax.tree.leaves(tree)}


def size(tree) -> int:
    return sum(x.nbytes for x in jax.tree.leaves(tree))


def device_bytes() -> int:
    """Bytes of the buffers on devices; several arrays may share one."""
    gc.collect()
    held = [x for x in jax.live_arrays() if x.sharding.memory_kind != sharding.HOST]
    shards = [shard.data for x in held for shard in x.addressable_shards]
    return sum({x.unsafe_buffer_pointer(): x.nbytes for x in shards}.values())


@pytest.fixture
def make(ppo, tmp_path):
    def build(offload: bool, **options):
        options = ppo | {"data": config.replace(ppo["data"], validation_fraction=0.25)} | options
        options["optim"] = config.replace(ppo["optim"], offload=offload)
        options["reference"] = config.Reference(offload=offload)
        return PPOTrainer(config.PPOConfig(run_dir=str(tmp_path / str(offload)), **options), reward=length_reward)

    return build


def test_an_offloaded_run_equals_one_without_offloading_bit_for_bit(make, tmp_path):
    plain, offloaded = (make(offload, mesh=config.Mesh(fsdp=2, tensor=2)) for offload in (False, True))
    for trainer in (plain, offloaded):
        trainer.train()
    assert records(tmp_path / "True") == records(tmp_path / "False")
    equal(offloaded.state.value, plain.state.value)
    assert kinds(offloaded.state.value.opt_state) == kinds(offloaded.frozen["reference"]) == {sharding.HOST}
    assert sharding.HOST not in kinds((plain.state.value, plain.frozen, offloaded.state.value.params))


def test_between_updates_the_device_has_neither_moments_nor_reference(make, monkeypatch):
    given, update, held = [], ppo_trainer.update, {}

    def watched(state, *args, **keywords):
        given.append(state.opt_state)
        assert sharding.HOST not in kinds(state)
        return update(state, *args, **keywords)

    monkeypatch.setattr(ppo_trainer, "update", watched)
    for offload in (False, True):
        before = device_bytes()
        trainer = make(offload)
        trainer.ppo_step(["say red ", "say blue "])
        held[offload] = device_bytes() - before
        moved = trainer.state.value.opt_state, trainer.frozen["reference"]
        del trainer
    assert all(x.is_deleted() for x in jax.tree.leaves(given)), "given to the update"
    assert held[False] - held[True] == size(moved)


def test_a_device_that_does_not_reach_the_hosts_memory_is_refused_before_weights_are_read(make, monkeypatch):
    monkeypatch.setattr(sharding.placement, "HOST", "shelf")
    monkeypatch.setattr(setup, "load_model", lambda *args, **keywords: pytest.fail("weights were read"))
    with pytest.raises(ConfigError, match=r"optim.offload is true, but jax's cpu backend .* no memory of kind shelf"):
        make(True)


@pytest.mark.parametrize(
    ("method", "options", "reason"),
    [
        ("ppo", {"lora": config.LoRA(enabled=True)}, "the model under the policy's adapters"),
        ("ppo", {"reference": config.Reference(offload=True, sync_every=2)}, "sync_every is 2"),
        ("ppo", {"critic": config.Critic(trunk="frozen")}, "the reference's own arrays"),
        ("sft", {"optim": config.Optim(offload=True)}, "it is for PPO"),
        ("reward", {"optim": config.Optim(offload=True)}, "it is for PPO"),
    ],
)
def test_offloading_that_would_save_nothing_is_refused(method, options, reason):
    kind = {"ppo": config.PPOConfig, "sft": config.SFTConfig, "reward": config.RewardConfig}[method]
    options = ({"reference": config.Reference(offload=True)} if method == "ppo" else {}) | options
    with pytest.raises(ValueError, match=reason):
        kind(**options)

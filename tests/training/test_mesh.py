"""SFT on eight devices is SFT on one. (PPO's update: test_ppo_update.py.)"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import length_reward, supervised_step

from jaxrlhf import config, models, sharding
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.sft import SFTTrainer


@pytest.mark.parametrize("shape", [config.Mesh(data=8), config.Mesh(fsdp=2, tensor=4)])
def test_sft_on_eight_devices_equals_one(supervised, tmp_path, shape):
    # A large eps: Adam magnifies the rounding of a gradient near zero by learning_rate / eps.
    train = config.Train(max_steps=2, batch_size=8, eval_batch_size=8)
    options = supervised | {"train": train, "optim": config.Optim(learning_rate=1e-2, eps=1e-3)}
    runs = []
    for mesh in (config.Mesh(), shape):
        trainer = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / str(mesh.tensor)), mesh=mesh, **options))
        supervised_step(trainer, 0), supervised_step(trainer, 1)
        runs.append(trainer)
    alone, together = runs
    kernel = together.params["layers"]["mlp"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.size == kernel.size // (
        shape.fsdp * shape.tensor
    )
    a, b = jax.device_get((alone.params, together.params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


@pytest.mark.parametrize("quantize", ["int8", "nf4"])
def test_adapters_over_a_packed_model_on_eight_devices_equal_one(supervised, quantize):
    lora = config.LoRA(enabled=True, rank=2, quantize=quantize, double_quant=quantize == "nf4")
    train = config.Train(max_steps=2, batch_size=8, eval_batch_size=8)
    options = supervised | {"train": train, "optim": config.Optim(learning_rate=1e-2, eps=1e-3), "lora": lora}
    trainers = [
        SFTTrainer(config.SFTConfig(mesh=mesh, **options))
        for mesh in (config.Mesh(), config.Mesh(data=2, fsdp=2, tensor=2))
    ]
    for part in ("up", "down"):
        whole, cut = (trainer.frozen["layers"]["mlp"][part]["codes"] for trainer in trainers)
        layers, rows, outputs = whole.shape
        assert cut.addressable_shards[0].data.shape == (layers, rows // 2, outputs // 2), part
    tokens, mask = jnp.arange(8 * 16).reshape(8, 16) % 40, jnp.ones((8, 16), bool)
    run = jax.jit(models.forward, static_argnums=1)
    made = [run(t.params, t.model, *sharding.put_rows((tokens, mask), t.mesh)) for t in trainers]
    np.testing.assert_allclose(*map(jax.device_get, made), rtol=1e-4, atol=1e-5)
    for trainer in trainers:
        supervised_step(trainer, 0), supervised_step(trainer, 1)
    a, b = (jax.device_get(trainer.state.value.params) for trainer in trainers)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_kept_rollouts_and_a_moving_reference_on_eight_devices_equal_one(ppo, tmp_path):
    options = ppo | {
        "ppo": config.replace(ppo["ppo"], num_mini_batches=1, replay=1, kl_coef=0.2, total_episodes=16),
        "reference": config.Reference(sync_every=1, sync_alpha=0.5),
        "optim": config.Optim(learning_rate=1e-2, eps=1e-3),
    }
    trainers = []
    for mesh in (config.Mesh(), config.Mesh(data=2, fsdp=2, tensor=2)):
        run = config.PPOConfig(run_dir=str(tmp_path / str(mesh.tensor)), mesh=mesh, **options)
        trainers.append(PPOTrainer(run, reward=length_reward))
        trainers[-1].train()
    states = [jax.device_get((t.state.value.params, t.state.value.reference, t.state.value.replay)) for t in trainers]
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), *states)
    assert np.any(states[0][2].advantages)


@pytest.mark.parametrize("method", ["sft", "ppo"])
def test_a_run_on_eight_devices_saves_at_every_step_and_resumes(method, supervised, ppo, tmp_path):
    """Digests of sharded arrays are sums over devices: many of them under way at once have brought XLA to a halt."""
    train = {"num_train_epochs": 9.0, "batch_size": 8, "eval_batch_size": 8, "keep_best": False}
    trainers = {
        "sft": lambda steps: SFTTrainer(
            config.SFTConfig(**options | {"train": config.Train(**train, max_steps=steps)})
        ),
        "ppo": lambda steps: PPOTrainer(
            config.PPOConfig(**options | {"ppo": config.PPO(batch_size=8, total_episodes=8 * steps)}),
            reward=lambda prompts, completions: [float(len(text)) for text in completions],
        ),
    }
    options = (supervised if method == "sft" else ppo) | {
        "mesh": config.Mesh(fsdp=2, tensor=4),
        "run_dir": str(tmp_path / "run"),
        "checkpoint": config.Checkpoint(save_every=1),
        "optim": config.Optim(learning_rate=1e-3, schedule="constant"),
    }
    trainers[method](2).train()
    again = trainers[method](4)
    again.train()
    assert int(again.state.value.step) == 4


def test_rollout_on_eight_devices_gives_the_same_tokens(ppo):
    texts = []
    for mesh in (config.Mesh(), config.Mesh(data=4, tensor=2)):
        options = ppo | {"ppo": config.replace(ppo["ppo"], num_mini_batches=1)}
        trainer = PPOTrainer(config.PPOConfig(mesh=mesh, **options), reward=lambda prompts, completions: [0.0] * 8)
        texts.append(trainer.generate(trainer.data.train[:8], 0)[1])
    assert texts[0] == texts[1]

"""SFT on eight devices is SFT on one. (PPO's update: test_ppo_update.py.)"""

import jax
import numpy as np
import pytest

from jaxrlhf import config
from jaxrlhf.training.ppo import PPOTrainer
from jaxrlhf.training.sft import SFTTrainer


@pytest.mark.parametrize("shape", [config.Mesh(data=8), config.Mesh(fsdp=2, tensor=4)])
def test_sft_on_eight_devices_equals_one(supervised, tmp_path, shape):
    # A large eps: Adam magnifies the rounding of a gradient near zero by learning_rate / eps.
    train = config.Train(max_steps=2, batch_size=8, eval_batch_size=8)
    options = supervised | {"train": train, "optim": config.Optim(learning_rate=1e-2, eps=1e-3)}
    runs = []
    for mesh in (config.Mesh(), shape):
        trainer = SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / str(mesh.tensor)), mesh=mesh, **options))
        trainer._update(0), trainer._update(1)
        runs.append(trainer)
    alone, together = runs
    kernel = together.params["layers"]["mlp"]["up"]["kernel"]
    assert len(kernel.sharding.device_set) == 8 and kernel.addressable_shards[0].data.size == kernel.size // (
        shape.fsdp * shape.tensor
    )
    a, b = jax.device_get((alone.params, together.params))
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-4, atol=1e-5), a, b)


def test_rollout_on_eight_devices_gives_the_same_tokens(ppo):
    texts = []
    for mesh in (config.Mesh(), config.Mesh(data=4, tensor=2)):
        options = ppo | {"ppo": config.replace(ppo["ppo"], num_mini_batches=1)}
        trainer = PPOTrainer(config.PPOConfig(mesh=mesh, **options), reward=lambda prompts, completions: [0.0] * 8)
        texts.append(trainer.generate(trainer.data.train[:8], 0)[1])
    assert texts[0] == texts[1]

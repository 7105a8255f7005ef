"""A run on eight devices is the run on one, on every mesh."""

import json
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import length_reward, supervised_step

from jaxrlhf import config, models, sharding
from jaxrlhf.errors import ConfigError
from jaxrlhf.training import sft
from jaxrlhf.training.dpo.trainer import DPOTrainer
from jaxrlhf.training.grpo.trainer import GRPOTrainer
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.reward.trainer import RewardTrainer
from jaxrlhf.training.sft import SFTTrainer

SHAPES = (
    config.Mesh(data=8),
    config.Mesh(fsdp=8),
    config.Mesh(fsdp=2, tensor=4),
    config.Mesh(replica=2, fsdp=2, tensor=2),
)
LORA = config.LoRA(enabled=True, rank=8, alpha=8.0)
PROMPTS = [f"say {word} " for word in ("red", "green", "blue", "black", "white", "grey", "pink", "brown")]


@pytest.fixture(scope="session")
def wide_model(tiny_model, tmp_path_factory):
    """The tiny model with heads for four devices of `tensor`, and matrices beside which norms are small."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("wide") / "model")
    file = folder / "config.json"
    changes = {"num_attention_heads": 8, "num_key_value_heads": 4, "hidden_size": 64, "intermediate_size": 64}
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    return folder


def first_update(method, options, shape):
    """The trainer after one update on a mesh, the loss, and the tokens it trained on."""
    options |= {"mesh": shape}
    if method in ("ppo", "grpo"):
        sizes = {"batch_size": 8, "total_episodes": 16, "num_mini_batches": 1}
        options |= {"sampling": config.Sampling(response_length=8)}
        if method == "ppo":
            settings = {"ppo": config.PPO(num_ppo_epochs=1, kl_coef=0.2, **sizes)}
            trainer = PPOTrainer(config.PPOConfig(**options | settings), reward=length_reward)
            result = trainer.ppo_step(PROMPTS)
            loss = result["policy_loss"] + result["value_loss"]
        else:
            settings = {"grpo": config.GRPO(num_generations=2, kl_coef=0.2, **sizes)}
            trainer = GRPOTrainer(config.GRPOConfig(**options | settings), reward=length_reward)
            result = trainer.grpo_step(PROMPTS[:4])
            loss = result["policy_loss"]
        return trainer, loss, jax.device_get(result["experience"].rollout.tokens)
    options |= {"train": config.Train(max_steps=2, batch_size=8, eval_batch_size=8)}
    makers = {
        "sft": lambda: SFTTrainer(config.SFTConfig(**options)),
        "reward": lambda: RewardTrainer(config.RewardConfig(head="mlp", **options)),
        "dpo": lambda: DPOTrainer(config.DPOConfig(**options)),
    }
    trainer = makers[method]()
    return trainer, supervised_step(trainer, 0)["loss"], jax.device_get(trainer.batch(0))


USUAL = {"sft": SHAPES[1:]} | dict.fromkeys(("sft lora", "reward", "dpo", "ppo", "grpo"), SHAPES[3:])
RARE = dict.fromkeys(("dpo lora", "ppo lora"), SHAPES[3:])
"""Meshes of each trainer in every round of tests; the last one has every axis. All on all are `long`."""


@pytest.mark.parametrize(
    ("method", "shapes"),
    [pytest.param(*case, id=case[0]) for case in USUAL.items()]
    + [pytest.param(*case, id=case[0], marks=pytest.mark.long) for case in RARE.items()]
    + [
        pytest.param(method, SHAPES[: -len(shapes)], id=f"{method} on the others", marks=pytest.mark.long)
        for method, shapes in (USUAL | RARE).items()
    ],
)
def test_an_update_of_each_trainer_on_any_mesh_equals_that_on_one_device(method, shapes, parts, wide_model):
    """Loss, parameters, and the tokens that PPO and GRPO sampled. Parameters and moments are split over the devices."""
    method, *adapters = method.split()
    # A large eps: Adam magnifies the rounding of a gradient near zero by learning_rate / eps.
    options = parts | {
        "model": config.ModelSource(path=str(wide_model), init="random"),
        "optim": config.Optim(learning_rate=1e-2, eps=1e-3),
        "lora": LORA if adapters else config.LoRA(),
        "data": config.replace(parts["data"], validation_fraction=0.0),
    }
    alone, expected, tokens = first_update(method, dict(options), config.Mesh())
    before = jax.device_get(alone.state.value.params)
    for shape in shapes:
        trainer, loss, read = first_update(method, dict(options), shape)
        # of GRPO it is 0 but for rounding: advantages of a group add up to 0, and the ratios are 1
        np.testing.assert_allclose(loss, expected, rtol=1e-5, atol=1e-7, err_msg=str(shape))
        jax.tree.map(np.testing.assert_array_equal, read, tokens)
        state, template = trainer.state.value, trainer.state.template
        after = jax.device_get(state.params)
        jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=2e-6), after, before)
        placed = jax.tree.map(lambda x, y: x.sharding == y.sharding, state, template)
        assert all(jax.tree.leaves(placed)), "an update returns the shardings it was given"
        trained = jax.tree.leaves((state.params, state.opt_state))
        local, total = (
            sum(x) for x in zip(*((x.addressable_shards[0].data.nbytes, x.nbytes) for x in trained), strict=True)
        )
        assert local <= 1.1 * total / (shape.fsdp * shape.tensor), (shape, local, total)


def test_fsdp_gathers_weights_and_never_adds_up_activations(parts, wide_model):
    """Partial results of all rows would be many times the bytes of the weights."""
    options = parts | {"model": config.ModelSource(path=str(wide_model), init="random")}
    trainer, *_ = first_update("sft", options, config.Mesh(fsdp=8))
    batch = trainer.batch(0)
    compiled = sft.update.lower(trainer.state.template, trainer.frozen, batch, trainer.key, spec=trainer.spec).compile()
    exchanged = re.findall(r"= (\S+) (all-gather|all-reduce)(?:-start)?\(", compiled.as_text())
    assert any("64,64" in shape for shape, kind in exchanged if kind == "all-gather")
    positions = batch.tokens.shape[1] - 1, batch.tokens.shape[1]
    assert not [shape for shape, _ in exchanged for length in positions if f",{length},64" in shape]


@pytest.mark.parametrize("quantize", [pytest.param("int8", marks=pytest.mark.long), "nf4"])
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


@pytest.mark.long
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


@pytest.mark.parametrize("method", [pytest.param("sft", marks=pytest.mark.long), "ppo"])
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
        "mesh": config.Mesh(fsdp=4, tensor=2),
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


@pytest.mark.parametrize("heads", [(16, 2), (8, 4), (4, 4)])
def test_heads_that_tensor_cannot_split_are_refused_with_the_sizes_that_can(heads, supervised, tiny_model, tmp_path):
    folder = shutil.copytree(tiny_model, tmp_path / "model")
    count, kv = heads
    changes = {"num_attention_heads": count, "num_key_value_heads": kv, "head_dim": 8}
    (folder / "config.json").write_text(json.dumps(json.loads((folder / "config.json").read_text()) | changes))
    sizes = ", ".join(str(n) for n in (1, 2, 4) if kv % n == 0)
    options = {"model": config.ModelSource(path=str(folder), init="random"), "mesh": config.Mesh(tensor=8)}
    with pytest.raises(ConfigError, match=rf"tensor \(8\) .* {count} attention .* {kv} key-value .* can be {sizes}\."):
        SFTTrainer(config.SFTConfig(**supervised | options))


def test_a_reward_model_with_fewer_heads_than_the_policy_is_refused_by_its_name(ppo, wide_model, tiny_model, tmp_path):
    judge = shutil.copytree(tiny_model, tmp_path / "judge")
    changes = {"architectures": ["LlamaForSequenceClassification"], "num_labels": 1}
    (judge / "config.json").write_text(json.dumps(json.loads((judge / "config.json").read_text()) | changes))
    options = ppo | {
        "model": config.ModelSource(path=str(wide_model), init="random"),
        "reward": config.RewardSource(model=str(judge)),
        "mesh": config.Mesh(fsdp=2, tensor=4),
    }
    with pytest.raises(ConfigError, match=r"2 key-value heads of the reward model .*judge: it can be 1, 2\."):
        PPOTrainer(config.PPOConfig(**options))

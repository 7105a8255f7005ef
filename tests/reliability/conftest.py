"""A tiny run of PPO: a model without weights, a few prompts, no noise on the console."""

import json
import pathlib

import jax
import pytest

import jaxrlhf
from jaxrlhf import config, weights

WORDS = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    file = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"say {word} "}) + "\n" for word in ("red", "green", "blue", "pink")))
    return file


@pytest.fixture
def ppo(tiny_model: pathlib.Path, prompts: pathlib.Path, tmp_path: pathlib.Path) -> config.PPOConfig:
    return config.PPOConfig(
        run_dir=str(tmp_path / "run"),
        model=config.ModelSource(path=str(tiny_model), init="random"),
        data=config.Data(path=str(prompts)),
        ppo=config.PPO(batch_size=8, total_episodes=16),
        sampling=config.Sampling(response_length=4),
        logging=config.Logging(quiet=True, tensorboard=False, num_samples=2, token_samples=0),
        checkpoint=config.Checkpoint(save_every=1),
    )


@pytest.fixture
def start(ppo, tiny_model, tmp_path):
    """Make the run of a method in `tmp_path / "run"`, or go on with it."""
    rows = [f'{{"prompt": "say {w} ", "completion": "{w}", "chosen": "{w}", "rejected": "no"}}\n' for w in WORDS]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    shared = {name: getattr(ppo, name) for name in ("run_dir", "model")} | {
        "data": config.Data(path=str(tmp_path / "rows.jsonl"), validation_fraction=0.25),
        "optim": config.Optim(learning_rate=1e-2, warmup_steps=2),
        "logging": config.Logging(quiet=True, tensorboard=False, sample_every=2, num_samples=2, token_samples=0),
    }
    sampling = config.Sampling(response_length=4)

    def made(method, save_every=1, max_steps=3, lora=False):
        train = config.Train(batch_size=8, max_steps=max_steps, num_train_epochs=9, eval_every=2, eval_batch_size=8)
        shared["checkpoint"] = config.Checkpoint(save_every=save_every, keep=1)
        if lora:  # on a model with weights; that of a run with random ones is exported whole
            model, params = weights.load(tiny_model, init="random", key=jax.random.key(0))
            base = weights.export(tmp_path / "base", model, params, source=tiny_model)
            shared.update(model=config.ModelSource(path=str(base)), lora=config.LoRA(enabled=True, rank=2))
        match method:
            case "sft":
                return jaxrlhf.SFTTrainer(config.SFTConfig(**shared, train=train, sampling=sampling))
            case "reward":
                return jaxrlhf.RewardTrainer(config.RewardConfig(**shared, train=train))
            case "dpo":
                return jaxrlhf.DPOTrainer(config.DPOConfig(**shared, train=train))
        sizes = {"batch_size": 8, "total_episodes": 24}
        common = shared | {"sampling": sampling}
        if method == "ppo":
            run = jaxrlhf.PPOTrainer, config.PPOConfig(**common, ppo=config.PPO(**sizes))
        else:
            run = jaxrlhf.GRPOTrainer, config.GRPOConfig(**common, grpo=config.GRPO(**sizes, num_generations=2))
        return run[0](run[1], reward=lambda prompts, completions: [len(set(text)) / 9 for text in completions])

    return lambda method, **options: made(method, **options).train()

"""A tiny run of PPO: a model without weights, a few prompts, no noise on the console."""

import json
import pathlib

import pytest

from jaxrlhf import config


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

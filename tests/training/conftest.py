"""Tiny runs of every trainer: a model without weights, a few rows of text, no noise on the console."""

import json
import pathlib
import shutil

import jax
import pytest

import jaxrlhf
from jaxrlhf import config, weights
from jaxrlhf.training import session

WORDS = ("red", "green", "blue", "black", "white", "grey", "pink", "brown")


@pytest.fixture(scope="session")
def rows(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """Rows that serve every trainer: a prompt, a completion for SFT, a better and a worse answer for pairs."""
    file = tmp_path_factory.mktemp("rows") / "rows.jsonl"
    made = []
    for i, word in enumerate(WORDS * 3):
        prompt = f"say {word}{'!' * (i % 4)} "
        made.append(
            {"prompt": prompt, "completion": word, "chosen": word, "rejected": "no" + "o" * (i % 5), "word": word}
        )
    file.write_text("".join(json.dumps(row) + "\n" for row in made))
    return file


@pytest.fixture
def parts(tiny_model: pathlib.Path, rows: pathlib.Path) -> dict:
    """Sections common to all run configs."""
    return {
        "model": config.ModelSource(path=str(tiny_model), init="random"),
        "data": config.Data(path=str(rows), validation_fraction=0.25),
        "optim": config.Optim(learning_rate=1e-2),
        "logging": config.Logging(quiet=True, tensorboard=False, sample_every=4, num_samples=2, token_samples=0),
        "checkpoint": config.Checkpoint(save_every=3),
    }


@pytest.fixture
def supervised(parts: dict) -> dict:
    return parts | {"train": config.Train(num_train_epochs=3, batch_size=6, eval_batch_size=4)}


@pytest.fixture
def ppo(parts: dict) -> dict:
    return parts | {
        "ppo": config.PPO(batch_size=8, total_episodes=32, num_mini_batches=2, num_ppo_epochs=2),
        "sampling": config.Sampling(response_length=8),
        "data": config.replace(parts["data"], validation_fraction=0.0),
    }


@pytest.fixture(scope="session")
def written(tiny_model, tmp_path_factory):
    """The tiny model with weights: adapters of random weights would be for nothing that exists."""
    model, params = jaxrlhf.load(tiny_model, init="random", key=jax.random.key(7))
    return weights.export(
        tmp_path_factory.mktemp("written") / "model", model, params, source=tiny_model,
        tokenizer=jaxrlhf.load_tokenizer(tiny_model, config.TokenizerSource()),
    )  # fmt: skip


@pytest.fixture(scope="session")
def teacher(tiny_model, tmp_path_factory):
    """A larger model with the tokenizer of the tiny one, whose probabilities are far from uniform."""
    folder = shutil.copytree(tiny_model, tmp_path_factory.mktemp("teacher") / "config")
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"hidden_size": 48, "num_hidden_layers": 3}))
    model, params = jaxrlhf.load(folder, init="random", key=jax.random.key(9))
    params["embed"]["embedding"] *= 20
    tokenizer = jaxrlhf.load_tokenizer(folder, config.TokenizerSource())
    return weights.export(folder.parent / "model", model, params, source=folder, tokenizer=tokenizer)


@pytest.fixture
def on_disk(written):
    return {
        "model": config.ModelSource(path=str(written)),
        "lora": config.LoRA(enabled=True, rank=2, alpha=8.0),
    }


@pytest.fixture
def stop_at_two(monkeypatch):
    """The first run of the test is asked to stop after its second step."""
    asked, original = [], session.Session.stop_if_asked

    def stop_once(self, step, *, saved=False):
        if step == 2 and not asked:
            asked.append(step)
            self.run.stopping = True
        original(self, step, saved=saved)

    monkeypatch.setattr(session.Session, "stop_if_asked", stop_once)

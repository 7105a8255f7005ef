"""Tokens that a chat format adds learn beside adapters, the model's own rows stay, and nothing is lost on disk."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.runs import equal, length_reward, records

import jaxrlhf
from jaxrlhf import config, models, weights
from jaxrlhf.errors import Preempted
from jaxrlhf.logprobs import token_logprobs
from jaxrlhf.training.export import export
from jaxrlhf.training.ppo.trainer import PPOTrainer
from jaxrlhf.training.sft import SFTTrainer

WORDS = ("red", "green", "blue", "white", "grey", "pink")


@pytest.fixture(params=["the table grows", "it has spare rows and an untied head"])
def chat(request, written, on_disk, tmp_path):
    """Sections of a run whose tokenizer gets two tokens, and whether the model has rows for them."""
    spare = request.param == "it has spare rows and an untied head"
    if spare:
        model, params = jaxrlhf.load(written)
        model, params = weights.resize_embeddings(model, params, model.vocab_size + 4)
        model = dataclasses.replace(model, tie_embeddings=False)
        params |= models.init_head(model, jax.random.key(1))
        weights.export(tmp_path / "base", model, params, source=written)
        on_disk = on_disk | {"model": config.ModelSource(path=str(tmp_path / "base"))}
    turns = [{"prompt": [{"role": "user", "content": f"say {w}"}], "completion": [{"role": "assistant", "content": w}]}
             for w in WORDS * 4]  # fmt: skip
    (tmp_path / "chat.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    data = config.Data(path=str(tmp_path / "chat.jsonl"))
    return on_disk | {"tokenizer": config.TokenizerSource(chat_template="chatml"), "data": data}, spare


def logits(model, params):
    tokens = jnp.arange(2 * 24).reshape(2, 24)  # the new tokens among them
    return models.lm_logits(params, model, models.forward(params, model, tokens, jnp.ones((2, 24), bool)))


def test_sft_learns_the_new_tokens(supervised, chat, tmp_path, request):
    options, spare = chat

    def make(name):
        return SFTTrainer(config.SFTConfig(run_dir=str(tmp_path / name), **supervised | options))

    trainer = make("whole")
    ends = trainer.tokenizer.control_tokens["<|im_end|>"]
    row = trainer.data.train[0].tokens
    at = len(row) - 1 - row[::-1].index(ends)

    def surprise():
        hidden = models.forward(trainer.params, trainer.model, jnp.array([row]), jnp.ones((1, len(row)), bool))
        return -token_logprobs(trainer.params, trainer.model, hidden[:, at - 1 : at], jnp.array([[ends]]), 1.0)[
            0
        ].item()

    before, (start, base) = surprise(), jax.device_get((trainer.params["lora"]["rows"], trainer.frozen))
    trainer.train()
    assert surprise() < before - 1
    equal(trainer.frozen, base)
    assert start.keys() == ({"embedding"} if trainer.model.tie_embeddings else {"embedding", "kernel"})
    for leaf, rows in start.items():
        assert np.all(np.asarray(trainer.params["lora"]["rows"][leaf]) != rows)
    out = tmp_path / "whole" / "export"
    assert (out / ("adapter_model.safetensors" if spare else "model.safetensors")).is_file()
    if spare:
        said = json.loads((out / "adapter_config.json").read_text())["trainable_token_indices"]
        assert said["embed_tokens"] == list(range(ends - 1, ends + 1))
    model, params = jaxrlhf.load(tmp_path / "whole")
    np.testing.assert_allclose(logits(model, params), logits(trainer.model, trainer.params), rtol=1e-4, atol=1e-5)
    request.getfixturevalue("stop_at_two")
    with pytest.raises(Preempted):
        make("parts").train()
    resumed = make("parts")
    resumed.train()
    assert records(tmp_path / "parts") == records(tmp_path / "whole")
    equal(resumed.state.value, trainer.state.value)


@pytest.mark.parametrize("chat", ["it has spare rows and an untied head"], indirect=True)
def test_ppo_trains_them_in_policy_and_critic_and_the_reference_has_the_old(ppo, chat, tmp_path):
    options = ppo | chat[0] | {"critic": config.Critic(trunk="own"), "run_dir": str(tmp_path / "run")}
    trainer = PPOTrainer(config.PPOConfig(**options), reward=length_reward)
    start = jax.device_get(trainer.state.value.params)
    assert "lora" not in trainer.frozen["reference"] and start["critic"]["lora"]["rows"].keys() == {"embedding"}
    trainer.train()
    log = records(tmp_path / "run")
    assert log[0]["objective/kl"] == 0 and log[0]["val/first_log_ratio_max"] < 1e-5
    assert max(record["val/sampler_logprob_gap_max"] for record in log) < 1e-4, (
        "what is sampled from is what is trained"
    )
    for role, before in start.items():
        after = trainer.state.value.params[role]["lora"]["rows"]
        assert all(np.any(np.asarray(after[leaf]) != rows) for leaf, rows in before["lora"]["rows"].items()), role
        now = jaxrlhf.load(trainer.save_pretrained(tmp_path / role, role, merge_lora=True))
        again = jaxrlhf.load(export(tmp_path / "run", tmp_path / f"{role}-again", role, merge_lora=True))
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-7), again[1], now[1]
        )  # another mesh

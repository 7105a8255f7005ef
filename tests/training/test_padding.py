"""An exported reward model has a padding token that ends no text, so that transformers reads the score where we do."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from support.tiny import tiny

import jaxrlhf
from jaxrlhf import config, lora, weights
from jaxrlhf.errors import ConfigError
from jaxrlhf.models import Adapters
from jaxrlhf.training import export, pretrained
from jaxrlhf.training.ppo.critic import critic_model
from jaxrlhf.weights import peft

PROMPTS = ["Name a fruit. ", "What is it? Say so in a few words. ", "Hi "]
COMPLETIONS = ["A pear, or two.", "It is a cat.", "Bye"]
SHAPE = {
    "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 1,
    "intermediate_size": 16, "max_position_embeddings": 128, "tie_word_embeddings": True,
}  # fmt: skip
CASES = {  # family, rows, tokenizer, changes to it, rows and padding token of the export
    "gpt2": ("gpt2", 50257, "tokenizers/gpt2", {}, 50258, "<|pad|>"),
    "llama": ("llama", 512, "models/stories260K", {}, 513, "<|pad|>"),
    "qwen2": ("qwen2", 151936, "tokenizers/qwen2.5", {"eos_token": "<|endoftext|>"}, 151936, "<|pad|>"),
    "qwen2 with its own": ("qwen2", 151936, "tokenizers/qwen2.5", {}, 151936, "<|endoftext|>"),
    "a chat format that ends with pad": ("llama", 49152, "tokenizers/smollm2", {}, 49153, "<|pad|>"),
}


def make_reward_model(folder, family, rows, tokenizer, changes):
    """A model of random weights beside a real tokenizer: (its folder, model, params)."""
    shutil.copytree(tokenizer, folder)
    (folder / "model.safetensors").unlink(missing_ok=True)
    (folder / "generation_config.json").unlink(missing_ok=True)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    shape = {"n_embd": 16, "n_layer": 1, "n_head": 2, "n_positions": 128} if family == "gpt2" else SHAPE
    named = {"model_type": family, "vocab_size": rows, **shape}
    named["architectures"] = ["GPT2LMHeadModel" if family == "gpt2" else f"{family.capitalize()}ForCausalLM"]
    (folder / "config.json").write_text(json.dumps(named))
    model, params = jaxrlhf.load(folder, init="random", head="linear", key=jax.random.key(0))
    params = jax.tree.map(lambda x: x * 4 if x.ndim > 1 else x, params)  # scores that differ visibly
    return weights.export(folder.with_name("base"), model, params, source=folder), model, params


def save(target, source, model, params, **settings):
    tokenizer = jaxrlhf.load_tokenizer(source, config.TokenizerSource(**settings))
    run = config.RewardConfig(model={"path": str(source)}, tokenizer=settings)
    return pretrained.save(target, model, params, run, tokenizer, step=1, results={})


@pytest.mark.parity
@pytest.mark.parametrize("case", CASES)
def test_transformers_scores_a_padded_batch_as_we_do(case, shared_data, tmp_path):
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    family, rows, tokenizer, changes, rows_out, pad = CASES[case]
    source, model, params = make_reward_model(tmp_path / "m", family, rows, shared_data / tokenizer, changes)
    out = save(tmp_path / "out", source, model, params)
    assert pretrained.padding_note(out) is None
    ours = jaxrlhf.score(out, PROMPTS, COMPLETIONS)
    np.testing.assert_array_equal(ours, jaxrlhf.score(source, PROMPTS, COMPLETIONS), "a pad token changes no score")

    theirs = transformers.AutoTokenizer.from_pretrained(out)
    loaded = transformers.AutoModelForSequenceClassification.from_pretrained(out, dtype=torch.float32).eval()
    assert (theirs.pad_token, loaded.config.pad_token_id) == (pad, theirs.pad_token_id)
    assert loaded.config.vocab_size == rows_out
    texts = [prompt + completion + theirs.eos_token for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)]
    if theirs.chat_template:
        turns = [
            [{"role": "user", "content": prompt}, {"role": "assistant", "content": completion}]
            for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
        ]
        texts = theirs.apply_chat_template(turns, tokenize=False)
    batch = theirs(texts, padding=True, return_tensors="pt")
    assert not batch["attention_mask"].all(), "there is padding"
    with torch.no_grad():
        scores = loaded(**batch).logits[:, 0].numpy()
    np.testing.assert_allclose(scores, ours, atol=1e-5, rtol=0)
    assert np.ptp(ours) > 1e-2


@pytest.fixture
def source(tiny_model, tmp_path):
    """A language model with weights whose tokenizer has no padding token and as many tokens as the model has rows."""
    folder = shutil.copytree(tiny_model, tmp_path / "tokenizer")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        text = (folder / name).read_text().replace('"pad_token": "<pad>", ', "").replace("<pad>", "<other>")
        (folder / name).write_text(text)
    model, params = jaxrlhf.load(folder, init="random", key=jax.random.key(0))
    return weights.export(tmp_path / "base", model, params, source=folder)


def with_adapters(source, rows):
    """(model, params) of a reward model of adapters on the folder's model, which gets this many rows."""
    model, params = jaxrlhf.load(source, head="linear", key=jax.random.key(1))
    model, params = weights.resize_embeddings(model, params, rows)
    model = dataclasses.replace(model, adapters=Adapters(2, 4.0))
    return model, params | lora.init(
        model, params, peft.modules(model, ["q_proj"]), jax.random.key(2), magnitudes=False
    )


def test_adapters_leave_their_base_model_as_it_is_and_the_run_says_what_that_means(source, tmp_path):
    rows = jaxrlhf.load(source)[0].vocab_size
    out = save(tmp_path / "out", source, *with_adapters(source, rows))
    assert "export it with --merge-lora" in pretrained.padding_note(out)
    scores = jaxrlhf.score(out, PROMPTS, COMPLETIONS)
    merged = export.merge(out, tmp_path / "merged")
    assert pretrained.padding_note(merged) is None
    assert weights.load_config(merged).vocab_size == rows + 1
    np.testing.assert_allclose(jaxrlhf.score(merged, PROMPTS, COMPLETIONS), scores, rtol=1e-5)


def test_adapters_on_a_base_model_with_spare_rows_have_a_padding_token_of_their_own(source, tmp_path):
    model, params = jaxrlhf.load(source)
    rows = model.vocab_size
    roomy = weights.export(tmp_path / "roomy", *weights.resize_embeddings(model, params, rows + 3), source=source)
    out = save(tmp_path / "out", roomy, *with_adapters(source, rows + 3))
    assert f"set config.pad_token_id of the base model to {rows}" in pretrained.padding_note(out)
    assert jaxrlhf.load_tokenizer(out, config.TokenizerSource()).pad_id == rows


def test_a_padding_token_that_was_asked_for_stays_and_is_named(source, tmp_path):
    model, params = jaxrlhf.load(source, head="linear", key=jax.random.key(1))
    out = save(tmp_path / "out", source, model, params, pad_token="</s>")
    assert "tokenizer.pad_token says so" in pretrained.padding_note(out)
    assert json.loads((out / "config.json").read_text())["pad_token_id"] == 2
    whole = save(tmp_path / "whole", source, model, params)
    assert pretrained.padding_note(whole) is None
    assert pretrained.padding_note(source) is None, "a language model"
    assert json.loads((whole / "tokenizer_config.json").read_text())["pad_token"] == "<|pad|>"
    config_file = json.loads((whole / "config.json").read_text())
    assert config_file["pad_token_id"] == model.vocab_size == config_file["vocab_size"] - 1
    np.testing.assert_array_equal(jaxrlhf.score(whole, PROMPTS, COMPLETIONS), jaxrlhf.score(out, PROMPTS, COMPLETIONS))


def test_a_critic_may_have_a_row_for_padding_that_the_policy_lacks():
    """A policy and a reward model trained from the same base model, which got the row at its export."""
    policy, run = tiny(), config.PPOConfig(critic={"init": "reward"}, reward={"model": "m"})
    larger, smaller = (tiny(head="linear", vocab_size=policy.vocab_size + n) for n in (1, -1))
    assert critic_model(run, policy, larger).vocab_size == policy.vocab_size + 1
    with pytest.raises(ConfigError, match="the reward model has 28 token rows and the policy 29"):
        critic_model(run, policy, smaller)

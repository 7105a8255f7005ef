"""scripts/stand_in.py: small models in place of those on the hub."""

import json

import jax
import pytest
import stand_in

import jaxrlhf
from jaxrlhf import weights


@pytest.mark.parametrize("name", stand_in.MODELS)
def test_a_description_is_read_and_its_tokenizer_encodes_any_text(tmp_path, name):
    stand_in.write_description(tmp_path, name, "", "the cat sat on the mat\n" * 20)
    config, _, roles = stand_in.MODELS[name]
    model = weights.load_config(tmp_path)
    tokenizer = jaxrlhf.load_tokenizer(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["architectures"] == config["architectures"]
    text = "the cat, ünïcode 猫\n\tand 🐈"
    assert tokenizer.decode(tokenizer.encode_prompt(text)) == text
    assert tokenizer.convert_ids_to_tokens([tokenizer.eos_id]) == [roles["eos_token"]]
    assert max(tokenizer.encode_prompt(text)) < model.vocab_size


def test_its_random_weights_load(tmp_path):
    stand_in.write_description(tmp_path / "a", "gpt2", "", "the cat sat on the mat\n" * 20)
    model, params = jaxrlhf.load(tmp_path / "a", init="random", key=jax.random.key(0))
    jaxrlhf.export(tmp_path / "b", model, params, source=tmp_path / "a")
    assert jaxrlhf.load(tmp_path / "b")[0] == model

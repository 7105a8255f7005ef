import re

import yaml

from jaxrlhf.models import ModelConfig
from jaxrlhf.weights.card import card, is_ours

MODEL = ModelConfig(
    family="llama",
    vocab_size=8,
    hidden_size=8,
    num_layers=1,
    num_heads=1,
    num_kv_heads=1,
    head_dim=8,
    mlp_size=8,
    max_positions=8,
    norm="rmsnorm",
    norm_eps=1e-5,
    activation="silu",
    gated_mlp=True,
    rope=None,
    qkv_bias=False,
    attention_out_bias=False,
    mlp_bias=False,
    qk_norm=False,
    sliding_window=None,
    sliding_layers=(False,),
    tie_embeddings=True,
)
REWARD = ModelConfig(**{**MODEL.__dict__, "head": "linear"})


def front(text: str) -> dict:
    opening, matter, _ = text.split("---\n", 2)
    assert opening == ""
    return yaml.safe_load(matter)


def test_card_contains_the_facts_of_a_run():
    facts = {
        "method": "ppo",
        "base_model": "org/base-1.5B",
        "dataset": "org/data",
        "license": "mit",
        "steps": 12,
        "command": "jaxrlhf ppo x.yaml",
        "config": {"ppo": {"kl_coef": 0.05, "ids": (1, 2)}},
        "metrics": {"objective/kl": 1.23456789, "n": 256},
        "notes": ["Measured on held-out prompts."],
    }
    text = card(MODEL, {}, facts)
    assert front(text) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "org/base-1.5B",
        "datasets": ["org/data"],
        "license": "mit",
        "tags": ["jaxrlhf", "ppo", "language-model"],
    }
    for expected in (
        "```sh\njaxrlhf ppo x.yaml\n```",
        "| objective/kl | 1.23457 |",
        "| n | 256 |",
        "| steps | 12 |",
        "kl_coef: 0.05",
        "- Measured on held-out prompts.",
    ):
        assert expected in text
    assert is_ours(text)


def test_facts_are_escaped():
    hostile = "x`y```\n````\n---\n# Head\n<script>alert(1)</script> | a | [b](c)\n- jaxrlhf"
    facts = dict.fromkeys(("method", "base_model", "dataset", "license", "command", "other"), hostile)
    text = card(MODEL, {}, facts | {"metrics": {hostile: hostile}, "notes": [hostile], "config": {hostile: hostile}})
    assert set(front(text)) == {"library_name", "pipeline_tag", "license", "tags"}
    outside = re.sub(r"^(`{3,})(sh|yaml)\n.*?\n\1$", "", text.split("---\n", 2)[2], flags=re.S | re.M)
    assert not re.search(r"(?<!\\)(<script|\[b\]|`)", outside)
    assert not re.search(r"^# Head", outside, re.M)
    for row in re.findall(r"^\|.*$", outside, re.M):
        assert len(re.findall(r"(?<!\\)\|", row)) == 3, row


def test_a_base_model_that_is_a_path_is_not_claimed_to_be_on_the_hub(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "sft").mkdir(parents=True)
    for path in ("/models/base", "./base", "base", "runs/sft", "a/b/c", None, 3):
        text = card(MODEL, {}, {"base_model": path})
        assert "base_model" not in front(text)


def test_card_says_how_to_read_the_score():
    assert front(card(REWARD, {"pad_token_id": 0}, {}))["pipeline_tag"] == "text-classification"
    assert "single output" in card(REWARD, {"pad_token_id": 0, "eos_token_id": 2}, {})
    assert "before the end token" not in card(REWARD, {"pad_token_id": 0, "eos_token_id": 2}, {})
    assert "before the end token" in card(REWARD, {"pad_token_id": 2, "eos_token_id": [1, 2]}, {})
    assert "one text at a time" in card(REWARD, {}, {})


def test_cards_of_other_programs_are_recognised():
    assert not is_ours("")
    assert not is_ours("# jaxrlhf\n- jaxrlhf\n")
    assert not is_ours("---\ntags:\n- other\n---\n- jaxrlhf\n---\n")
    assert is_ours("---\ntags:\n- jaxrlhf\n---\n")

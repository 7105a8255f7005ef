import re

import pytest
import yaml

from jaxrlhf.models import ModelConfig
from jaxrlhf.weights.card import card, inherited, is_ours

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
        "tags": ["jaxrlhf", "ppo", "rlhf", "language-model"],
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


HOSTILE = "x`y```\n````\n~~~~\n---\n# Head\n<script>alert(1)</script> | a | [b](c)\n- jaxrlhf\n\x1b[2J \u202e \ud800"


def test_facts_are_escaped():
    names = ("method", "base_model", "dataset", "license", "license_name", "original", "command", "other")
    facts = dict.fromkeys(names, HOSTILE) | {"notes": [HOSTILE], "config": {HOSTILE: HOSTILE}}
    facts |= {"metrics": {HOSTILE: HOSTILE, "loss": 1.0}, "before": {HOSTILE: HOSTILE}}
    facts |= {"samples": [{HOSTILE: HOSTILE, "completion": "````\n" * 3}]}
    text = card(MODEL, {}, facts)
    assert set(front(text)) == {"library_name", "pipeline_tag", "license", "license_name", "tags"}
    text.encode()
    assert not {"\x1b", "\u202e"} & set(text)
    outside = re.sub(r"^(`{3,})(sh|yaml|text)\n.*?\n\1$", "", text.split("---\n", 2)[2], flags=re.S | re.M)
    assert not re.search(r"(?<!\\)(<script|\[b\]|`|~)", outside)
    assert not re.search(r"^# Head", outside, re.M)
    tables = [[len(re.findall(r"(?<!\\)\|", row)) for row in part.splitlines()] for part in outside.split("\n\n")]
    tables = [bars for bars in tables if bars and bars[0]]
    assert [set(bars) for bars in tables] == [{3}, {5}], "facts; metrics with the values before training"


NAMES = ["a: b", "#x", "'", '"', "- x", "{a", "&a", "*a", "!!python/object:x", "y\nz: 1", "a\tb", "é", "no", "1e3"]


@pytest.mark.parametrize("name", NAMES)
def test_the_front_matter_is_yaml_for_any_name(name):
    matter = front(card(MODEL, {}, {"method": name, "license": name, "base_model": name, "dataset": f"hf://{name}"}))
    assert matter["tags"][1] == matter["license"] == " ".join(name.split())


def test_metrics_have_definitions_and_held_out_ones_come_first():
    metrics = {"loss": 1.0, "eval/loss": 2.0, "rewards/mine/mean": 3.0}
    rows = re.findall(r"^\| (\S+) \| (.*?) \| (.*?) ?\|$", card(MODEL, {}, {"metrics": metrics}), re.M)
    assert [row[0] for row in rows[2:]] == ["eval/loss", "loss", "rewards/mine/mean"]
    assert rows[2][2] == r"\`loss\` over all held-out rows" and rows[4][2].startswith(
        "mean over the completions that the component mine scored"
    )
    minor = {"rewards/mine_unanswered/mean": 0.0, "rewards/mine/std": 1.0, "tokens/min_length": 3.0}
    text = card(MODEL, {}, {"metrics": metrics | minor})
    assert "The other 3 metrics are in" in text and not any(name in text for name in minor)
    assert "| eval/loss | 2 | 5 | " in card(MODEL, {}, {"metrics": metrics, "before": {"eval/loss": 5.0}})


def test_a_license_and_the_original_model_come_from_the_card_of_the_base_model(tmp_path):
    readme = tmp_path / "README.md"
    assert inherited(readme) == {}
    theirs = "license: other\nlicense_name: qwen\nlicense_link: https://x/y\nbase_model: org/parent"
    readme.write_text(f"---\n{theirs}\n---\n# Model\n")
    facts = inherited(readme)
    assert facts == {"license": "other", "license_name": "qwen", "license_link": "https://x/y"}, (
        "its parent is not ours"
    )
    ours = card(MODEL, {}, facts | {"method": "sft", "base_model": "org/base"})
    readme.write_text(ours)
    assert inherited(readme) == facts | {"original": "org/base"}
    child = front(card(MODEL, {}, inherited(readme) | {"method": "ppo", "base_model": str(tmp_path)}))
    assert (child["base_model"], child["license"], child["license_name"]) == ("org/base", "other", "qwen")
    for broken in ("", "no", "---\n: [\n---\n", "---\n- a\n---\n", "---\nlicense: [mit]\n---\n", "---\n"):
        readme.write_text(broken)
        assert inherited(readme) == {}
    readme.write_bytes(b"---\nlicense: mit\n---\n\xff")
    assert inherited(readme) == {"license": "mit"}


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

"""Verdicts of a reward model on examples, against scores of each row computed separately."""

import dataclasses
import json

import jax
import numpy as np
import pytest

from jaxrlhf import weights
from jaxrlhf.cli import main
from jaxrlhf.config import RewardConfig
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.evaluation.reward_examples import judge, table
from jaxrlhf.metrics.statistics import wilson
from jaxrlhf.rewards.sources.model import RewardModel

PROMPTS = ["why? ", "what is it? ", "so? "]


@pytest.fixture(scope="module")
def folder(tiny_model, tmp_path_factory):
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(1), head="linear")
    params["score"]["kernel"] = params["score"]["kernel"] * 30
    return weights.export(tmp_path_factory.mktemp("reward") / "m", model, params, source=tiny_model)


def scored(folder, texts) -> np.ndarray:
    model = RewardModel(str(folder), dtype="float32", micro_batch_size=16)
    tokenizer: Tokenizer = model.tokenizer
    return model.score_ids([[*tokenizer.encode_prompt(text), tokenizer.eos_id] for text in texts])[0]


def test_the_command_prints_a_verdict_for_each_named_pair(folder, tmp_path, capsys):
    file, out = tmp_path / "e.json", tmp_path / "r.json"
    rows = [{"name": f"case {i}", "prompt": p, "good": "a cat.", "bad": "no!"} for i, p in enumerate(PROMPTS)]
    file.write_text(json.dumps(rows))
    assert main(["evaluate", str(folder), "--examples", str(file), "--output", str(out)]) == 0
    good, bad = (scored(folder, [p + word for p in PROMPTS]) for word in ("a cat.", "no!"))
    result = json.loads(out.read_text())
    assert [e["good"] for e in result["examples"]] == pytest.approx(good.tolist(), rel=1e-4)
    assert [e["bad"] for e in result["examples"]] == pytest.approx(bad.tolist(), rel=1e-4)
    assert [e["right"] for e in result["examples"]] == (good > bad).tolist()
    shown, right = capsys.readouterr().out, int((good > bad).sum())
    low, high = wilson(right, 3)
    assert f"{right} of 3 right: {right / 3:.3f} [{low:.3f}, {high:.3f}]" in shown and "case 2: so?" in shown
    assert shown.count("right  good") == right and shown.count("WRONG  good") == 3 - right
    assert result["evaluation"]["accuracy"] == pytest.approx(right / 3)
    assert "accuracy of length alone (longer is better): 1.000" in shown


def test_labelled_and_preferred_rows(folder, tmp_path):
    file = tmp_path / "e.jsonl"

    def result(rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return judge(RewardConfig(model={"path": str(folder)}, data={"path": str(file)}))

    words = ["a cat.", "no!", "yes"]
    single = result([{"prompt": p, "completion": w, "label": w != "no!"} for p, w in zip(PROMPTS, words, strict=True)])
    scores = scored(folder, [p + w for p, w in zip(PROMPTS, words, strict=True)])
    assert [e["score"] for e in single["examples"]] == pytest.approx(scores.tolist(), rel=1e-4)
    assert [e["right"] for e in single["examples"]] == ((scores > 0) == [True, False, True]).tolist()
    assert "line 1: why?" in table(single)
    pairs = [{"prompt": p, "chosen": "a cat.", "rejected": "no!"} for p in PROMPTS]
    preferred = result([*pairs, {"prompt": "a", "chosen": "b", "rejected": "b"}])
    assert len(preferred["examples"]) == 3 and "dropped 1: chosen and rejected are the same" in table(preferred)


def test_accuracy_by_category(folder, tmp_path, capsys):
    """Of each category from its own pairs, whatever their layout."""
    file, out = tmp_path / "e.jsonl", tmp_path / "r.json"
    kinds = ["cats", "dogs", None]
    pairs = [(p, *("a cat.", "no!")[:: 1 if i % 2 else -1]) for i, p in enumerate([*PROMPTS, *PROMPTS])]
    rows = [{"question": p, "chosen": a, "rejected": b, "kind": kinds[i % 3]} for i, (p, a, b) in enumerate(pairs)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = ["evaluate", str(folder), "--examples", str(file), "--output", str(out)]
    assert main([*asked, "--by", "kind"]) == 0
    result, shown = json.loads(out.read_text()), capsys.readouterr().out
    assert list(result["groups"]) == ["(none)", "cats", "dogs"]
    verdicts = [example["right"] for example in result["examples"]]
    for number, name in enumerate(["cats", "dogs", "(none)"]):
        right = sum(verdicts[number::3])
        assert result["groups"][name] == {
            "right": right,
            "examples": 2,
            "share": right / 2,
            "interval_95": list(wilson(right, 2)),
        }
    assert sum(verdicts) == result["accuracy"]["right"] and "by kind:" in shown
    assert main([*asked, "--by", "colour"]) == 3
    assert "there is no column 'colour'" in capsys.readouterr().err


def test_evaluate_needs_either_prompts_or_examples(folder, capsys):
    assert main(["evaluate", str(folder)]) == 3
    assert "--examples FILE, for a reward model" in capsys.readouterr().err


def test_two_labels_show_probability_and_class(tiny_model, tmp_path):
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(1), head="linear")
    kernel = jax.random.normal(jax.random.key(2), (model.hidden_size, 2))
    two = dataclasses.replace(model, num_labels=2)
    folder = weights.export(tmp_path / "m", two, params | {"score": {"kernel": kernel}}, source=tiny_model)
    words, file = ["a cat.", "no!", "yes"], tmp_path / "e.jsonl"

    def result(rows):
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return judge(RewardConfig(model={"path": str(folder)}, data={"path": str(file)}))

    single = result([{"prompt": p, "completion": w, "label": True} for p, w in zip(PROMPTS, words, strict=True)])
    wanted = scored(folder, [p + w for p, w in zip(PROMPTS, words, strict=True)])
    assert [e["probability"]["score"] for e in single["examples"]] == pytest.approx(wanted.tolist(), rel=1e-4)
    assert [e["class"]["score"] for e in single["examples"]] == ["good" if p > 0.5 else "bad" for p in wanted]
    pair = result([{"prompt": PROMPTS[0], "chosen": words[0], "rejected": words[1]}])
    both = scored(folder, [PROMPTS[0] + word for word in words[:2]])
    classes = [f"(p {p:.3f}, {'good' if p > 0.5 else 'bad'})" for p in both]
    assert all(text in table(pair).splitlines()[0] for text in classes)

"""Facts of a run for its model card."""

import json

import pytest

from jaxrlhf.config import Component, PPOConfig, RewardConfig, RewardSource, SFTConfig, replace
from jaxrlhf.training import facts


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_only_options_that_were_changed_are_listed():
    assert facts.changes(SFTConfig()) == {}
    config = replace(PPOConfig(), **{"optim.learning_rate": 0.5, "model.path": "m", "sampling.stop_strings": ("a",)})
    assert facts.changes(config) == {
        "model": {"path": "m"},
        "optim": {"learning_rate": 0.5},
        "sampling": {"stop_strings": ["a"]},
    }
    parts = (Component(function="a.py:f"), Component(model="m", weight=0.5))  # a component is nothing without a source
    assert facts.changes(RewardSource(components=parts)) == {
        "components": [{"function": "a.py:f"}, {"model": "m", "weight": 0.5}]
    }


def test_samples_are_of_the_same_prompts_before_and_after(tmp_path):
    path = tmp_path / "samples.jsonl"
    assert facts.before_and_after(path, 9) == []
    rows = [
        {"step": 0, "prompt": "p", "completion": "first", "score": -1.25},
        {"step": 1, "prompt": "once", "completion": "x"},
        {"step": 4, "prompt": "p", "completion": "middle"},
        {"step": 8, "prompt": "p", "completion": "c" * 1500, "score": 2.0},
        {"step": 12, "prompt": "p", "completion": "after the exported state"},
    ]
    write(path, rows)
    (sample,) = facts.before_and_after(path, 8)
    assert sample["prompt"] == "p" and sample["completion before training, score -1.25"] == "first"
    last = sample["completion after step 8, score 2"]
    assert last.startswith("c" * facts.LONGEST + " ... (500 more")
    write(
        path, [{"step": s, "prompt": [{"role": "user"}], "completion": f"c{n}"} for s in (1, 2) for n in range(5)][:7]
    )
    assert len(facts.before_and_after(path, 2)) == 1
    write(path, [{"step": s, "prompt": f"{s} {n}", "completion": "c"} for s in (1, 2) for n in range(5)])
    assert [sample["prompt"] for sample in facts.before_and_after(path, 2)] == ["2 0", "2 1", "2 2"]


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        (["/env/bin/jaxrlhf", "ppo", "my config.yaml"], "jaxrlhf ppo 'my config.yaml'"),
        (["/src/jaxrlhf/__main__.py", "sft", "a.yaml"], "jaxrlhf sft a.yaml"),
        (["/home/me/train.py", "--x"], "python train.py --x"),
        ([""], ""),
    ],
)
def test_the_command_can_be_typed(tmp_path, command, shown):
    record = {"starts": [{"command": ["other"]}, {"command": command}]}
    (tmp_path / "run.json").write_text(json.dumps(record))
    found = facts.of_export(SFTConfig(), 1, {}, facts.Origin(tmp_path, "abc"))
    assert (found["command"], found["data_sha256"]) == (shown, "abc")


def test_held_out_results_say_of_how_many(tmp_path):
    origin = facts.Origin(tmp_path)
    (tmp_path / "validation.json").write_text(json.dumps({"metrics": {"eval/scores": 1.0}, "scores": [1.0, None, 0.0]}))
    found = facts.of_export(PPOConfig(), 3, {"objective/kl": 1.5, "perf/x": 1.0, "val/ratio": 1.0}, origin)
    assert found["before"] == {"eval/scores": 1.0} and found["metrics"] == {"objective/kl": 1.5}
    assert found["notes"][0] == "The metrics eval/... are of 3 held-out prompts."
    assert "1.5 nats per response" in found["notes"][1]
    evaluation = {"pairs": 600, "accuracy": 0.95, "length_accuracy": 0.4}
    (tmp_path / "evaluation.json").write_text(json.dumps(evaluation))
    (tmp_path / "validation.json").write_text("[")
    note = facts.of_export(RewardConfig(), 3, {}, origin)["notes"][0]
    assert "600 held-out pairs the accuracy is 0.95 (95 % Wilson interval 0.93 to 0.965)" in note, note


def test_parameters_that_no_run_has_trained_have_no_command_and_no_samples():
    assert not {"command", "samples", "before"} & facts.of_export(SFTConfig(), 0, {}, None).keys()

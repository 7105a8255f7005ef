"""Evaluation of a language model: statistics against independent formulas, ranking, repeatability, output files."""

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrlhf import weights
from jaxrlhf.cli import main
from jaxrlhf.config import PPO, Data, Generation, ModelSource, PPOConfig, Sampling
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.errors import DataError, RewardError
from jaxrlhf.evaluation import completions, console, prompts
from jaxrlhf.evaluation.win_rates import against
from jaxrlhf.selection.rule import Rule
from jaxrlhf.selection.select import select


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory) -> Path:
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(1))
    return weights.export(tmp_path_factory.mktemp("models") / "m", model, params, source=tiny_model)


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_text(
        "".join(json.dumps({"prompt": f"question {'x' * i}", "worth": i, "right": f"so {i}"}) + "\n" for i in range(7))
    )
    return file


@pytest.fixture(scope="module")
def config(model_folder, prompts_file) -> PPOConfig:
    return PPOConfig(
        seed=3,
        model=ModelSource(path=str(model_folder)),
        data=Data(path=str(prompts_file)),
        ppo=PPO(batch_size=5),
        sampling=Sampling(response_length=6),
    )


def vowels(prompts, completions, worth):
    return [w + sum(letter in "aeiou" for letter in text) for text, w in zip(completions, worth, strict=True)]


@pytest.fixture(scope="module")
def result(config) -> dict:
    return completions.evaluate(config, num_prompts=4, num_completions=3, function=vowels)


def test_completions_are_scored_by_the_function_and_ranked(result):
    assert len(result["prompts"]) == 4
    assert len({p["index"] for p in result["prompts"]}) == 4
    for prompt in result["prompts"]:
        answers = prompt["completions"]
        assert [a["rank"] for a in answers] == ["BEST", "MEDIUM", "WORST"]
        scores = [a["score"] for a in answers]
        assert scores == sorted(scores, reverse=True)
        assert scores == vowels(None, [a["text"] for a in answers], [prompt["index"]] * 3)
        assert prompt["prompt"] == f"question {'x' * prompt['index']}"
        assert all(a["tokens"] <= 6 for a in answers)


def test_the_function_sees_every_completion_once(config, result):
    calls = []

    def reward(prompts, completions, worth):
        calls.append(list(zip(prompts, completions, strict=True)))
        return vowels(prompts, completions, worth)

    assert (
        completions.evaluate(config, num_prompts=4, num_completions=3, function=reward)["statistics"]["completions"]
        == 12
    )
    assert [len(call) for call in calls] == [6, 6], "whole prompts, of five completions or more"
    seen = sorted(pair for call in calls for pair in call)
    assert seen == sorted((p["prompt"], a["text"]) for p in result["prompts"] for a in p["completions"])


def test_statistics_are_those_of_the_scores(result):
    stats = result["statistics"]
    table = np.array([[a["score"] for a in p["completions"]] for p in result["prompts"]])
    assert stats["completions"] == 12
    assert stats["mean"] == pytest.approx(table.mean())
    assert stats["standard_error"] == pytest.approx(table.mean(1).std(ddof=1) / 2)
    assert stats["std"] == pytest.approx(table.std(ddof=1))
    assert stats["best_of_n_mean"] == pytest.approx(table.max(1).mean())
    assert stats["spread_within_prompt"] == pytest.approx(np.ptp(table, axis=1).mean())
    assert stats["components"]["vowels"]["mean"] == pytest.approx(table.mean())
    answers = [a for p in result["prompts"] for a in p["completions"]]
    assert stats["finished"] == pytest.approx(np.mean([a["finished"] for a in answers]))


def test_a_completion_depends_on_the_seed_and_not_on_the_batch(config, result):
    for other in (
        dataclasses.replace(config, ppo=PPO(batch_size=64)),
        dataclasses.replace(config, rollout=Generation(slots=2)),
        dataclasses.replace(config, rollout=Generation(slots=12)),  # all of them at once
    ):
        again = completions.evaluate(other, num_prompts=4, num_completions=3, function=vowels)
        assert again["prompts"] == result["prompts"]
    other = dataclasses.replace(config, seed=4)
    assert (
        completions.evaluate(other, num_prompts=4, num_completions=3, function=vowels)["prompts"] != result["prompts"]
    )


def test_the_table_shows_every_completion_and_the_json_reads_back(result, tmp_path):
    shown = console.table(result)
    assert shown.count("BEST") == shown.count("WORST") == 4
    assert max(map(len, shown.splitlines())) <= 100
    written = completions.write(result, tmp_path / "new" / "r.json")
    assert json.loads(written.read_text()) == result
    assert [p.name for p in written.parent.iterdir()] == ["r.json"]


def test_sampled_rows_depend_on_the_seed_and_never_repeat(result):
    rows = [prompts.Question(PromptRow([1], "p", {}, i), "f", i, None, "c") for i in range(50)]
    asked = prompts.Questions(None, rows, "", "")

    def drawn(count, seed):
        return [question.number for question in asked.sample(count, seed).questions]

    first = drawn(20, 0)
    assert first == drawn(20, 0) == sorted(first) != drawn(20, 1)
    assert len(set(first)) == 20
    assert drawn(99, 0) == [*range(50)]


def test_a_response_length_without_room_for_a_prompt_is_refused(config):
    greedy = dataclasses.replace(config, sampling=Sampling(response_length=64))
    with pytest.raises(DataError, match="response_length is 64 and the model's context 64: no room"):
        completions.evaluate(greedy, num_prompts=1, num_completions=1, function=vowels)


def test_the_command_writes_json(model_folder, prompts_file, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def reward(completions):\n    return [len(c) for c in completions]\n")
    output = tmp_path / "r.json"
    arguments = [
        "evaluate",
        str(model_folder),
        "--prompts",
        str(prompts_file),
        "--reward",
        f"{tmp_path}/mine.py:reward",
    ]
    arguments += ["--num-prompts", "2", "--num-completions", "2", "--output", str(output)]
    assert main([*arguments, "--sampling.response_length", "6"]) == 0
    assert json.loads(output.read_text())["statistics"]["completions"] == 4
    shown = capsys.readouterr().out
    assert str(output) in shown
    assert "reward " in shown
    assert "_unanswered" not in shown, "nothing went unanswered"


def test_evaluation_by_references_without_a_reward(model_folder, prompts_file, tmp_path, capsys):
    asked = ["evaluate", str(model_folder), "--prompts", str(prompts_file), "--sampling.response_length", "6"]
    assert main(asked) == 3
    assert "nothing to measure completions by" in (said := capsys.readouterr().err)
    assert "it has prompt, worth, right" in said
    asked += ["--num-prompts", "2", "--num-completions", "2", "--output", f"{tmp_path}/r.json"]
    assert main([*asked, "--references", "left"]) == 3
    assert main([*asked, "--references", "right"]) == 0
    found = json.loads((tmp_path / "r.json").read_text())
    assert found["references_from"] == "right"
    assert [prompt["reference"] for prompt in found["prompts"]] == [f"so {p['index']}" for p in found["prompts"]]
    assert found["statistics"]["references"]["prompts"] == 2
    assert "mean" not in found["statistics"]
    shown = capsys.readouterr().out
    assert "ROUGE-L" in shown and "REFERENCE" in shown
    assert "score" not in shown


def test_selection_and_evaluation_generate_the_same_completions(config, result, tmp_path):
    """Completions do not depend on the prompts generated with them, nor on the number of slots."""
    expected = {p["prompt"]: sorted((a["text"], a["score"]) for a in p["completions"]) for p in result["prompts"]}
    few = dataclasses.replace(
        config, rollout=Generation(slots=2), ppo=PPO(batch_size=1)
    )  # two prompts before any is scored
    selected = select(few, tmp_path / "all.jsonl", Rule("all"), 3, function=vowels)
    rows = [json.loads(line) for line in (tmp_path / "all.jsonl").read_text().splitlines()]
    assert len(rows) == selected.rows == 21
    assert [row["worth"] for row in rows] == [i for i in range(7) for _ in range(3)], "in file order"
    for prompt, answers in expected.items():
        assert sorted((row["completion"], row["score"]) for row in rows if row["prompt"] == prompt) == answers


def test_unscored_completions_are_no_part_of_the_statistics_of_scores(config):
    """The first call scores two of six completions, both of its second prompt; the second call all but one."""
    answers = iter([[None, None, None, 3.0, None, 1.0], [5.0, 2.0, 2.0, None, 4.0, 7.0]])

    def reward(completions):
        return next(answers)

    result = completions.evaluate(config, num_prompts=4, num_completions=3, function=reward)
    stats = result["statistics"]
    assert stats["unscored"] == pytest.approx(5 / 12)
    assert stats["mean"] == pytest.approx(np.mean([2, 3, 5.5])) and (stats["min"], stats["max"]) == (1, 7)
    assert stats["standard_error"] == pytest.approx(np.std([2, 3, 5.5], ddof=1) / np.sqrt(3))
    assert stats["std"] == pytest.approx(np.std([3, 1, 5, 2, 2, 4, 7], ddof=1))
    assert stats["best_of_n_mean"] == 5 and stats["spread_within_prompt"] == pytest.approx(8 / 3)
    assert stats["components"]["reward"] == {"mean": stats["mean"], "standard_error": stats["standard_error"]}
    first, second = result["prompts"][:2]
    assert (first["mean"], first["spread"]) == (None, None)
    assert [a["rank"] for a in first["completions"]] == ["UNSCORED"] * 3
    assert [(a["rank"], a["score"]) for a in second["completions"]] == [("BEST", 3), ("WORST", 1), ("UNSCORED", None)]
    shown = console.table(result)
    assert "unscored      0.4167 of the completions" in shown and shown.count("  UNSCORED  ") == 5
    found = against([p | {"mean": 2.5} for p in result["prompts"]], result["prompts"], "score")
    assert (found["prompts"], found["left_out"], found["wins"], found["losses"]) == (3, 1, 2, 1)
    with pytest.raises(RewardError, match="none of 3 completions has a score"):
        completions.evaluate(config, num_prompts=1, num_completions=3, function=lambda completions: [None] * 3)

"""Evaluation: statistics against independent formulas, ranking, repeatability, and what is written."""

import dataclasses
import json
import math
import statistics as stdlib
from pathlib import Path

import jax
import numpy as np
import pytest

from jaxrlhf import evaluate, weights
from jaxrlhf.cli import main
from jaxrlhf.config import PPO, Data, Engine, ModelSource, PPOConfig, Sampling
from jaxrlhf.errors import DataError


def test_mean_and_error_against_the_standard_library():
    values = [1.0, 4.0, -2.0, 7.5]
    mean, error = evaluate.mean_and_error(values)
    assert mean == pytest.approx(stdlib.fmean(values))
    assert error == pytest.approx(stdlib.stdev(values) / 2)
    assert evaluate.mean_and_error([3.0]) == (3.0, 0.0)


def test_wilson_bounds_solve_the_score_equation():
    for successes, total in [(0, 10), (3, 10), (10, 10), (150, 200)]:
        low, high = evaluate.wilson(successes, total)
        share = successes / total
        assert 0 <= low <= share <= high <= 1
        for bound in (low, high):
            if 0 < bound < 1:
                z = (share - bound) / math.sqrt(bound * (1 - bound) / total)
                assert abs(z) == pytest.approx(1.96, abs=1e-4)
    assert evaluate.wilson(0, 0) == (0.0, 1.0)


def test_wilson_covers_the_truth_about_as_often_as_it_says():
    rng = np.random.default_rng(0)
    bounds = {k: evaluate.wilson(k, 40) for k in range(41)}
    covered = [bounds[int(k)][0] <= 0.3 <= bounds[int(k)][1] for k in rng.binomial(40, 0.3, 2000)]
    assert 0.92 < np.mean(covered) < 0.98


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory) -> Path:
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(1))
    return weights.export(tmp_path_factory.mktemp("models") / "m", model, params, source=tiny_model)


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    file.write_text("".join(json.dumps({"prompt": f"question {'x' * i}", "worth": i}) + "\n" for i in range(7)))
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
    return evaluate.evaluate(config, num_prompts=4, num_completions=3, function=vowels)


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
        evaluate.evaluate(config, num_prompts=4, num_completions=3, function=reward)["statistics"]["completions"] == 12
    )
    assert [len(call) for call in calls] == [5, 5, 2]
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
        dataclasses.replace(config, rollout=Engine(slots=2)),
    ):
        again = evaluate.evaluate(other, num_prompts=4, num_completions=3, function=vowels)
        assert again["prompts"] == result["prompts"]
    other = dataclasses.replace(config, seed=4)
    assert evaluate.evaluate(other, num_prompts=4, num_completions=3, function=vowels)["prompts"] != result["prompts"]


def test_the_table_shows_every_completion_and_the_json_reads_back(result, tmp_path):
    shown = evaluate.table(result)
    assert shown.count("BEST") == shown.count("WORST") == 4
    assert max(map(len, shown.splitlines())) <= 100
    written = evaluate.write(result, tmp_path / "new" / "r.json")
    assert json.loads(written.read_text()) == result
    assert [p.name for p in written.parent.iterdir()] == ["r.json"]


def test_choosing_is_seeded_and_never_repeats(result):
    rows = [*range(50)]
    first = evaluate.choose(rows, 20, 0)
    assert first == evaluate.choose(rows, 20, 0) != evaluate.choose(rows, 20, 1)
    assert len(set(first)) == 20
    assert evaluate.choose(rows, 99, 0) == rows


def test_no_room_for_a_prompt_is_refused(config):
    greedy = dataclasses.replace(config, sampling=Sampling(response_length=64))
    with pytest.raises(DataError, match="response_length is 64 and the model's context 64: no room"):
        evaluate.evaluate(greedy, num_prompts=1, num_completions=1, function=vowels)


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
    assert main(["evaluate", str(model_folder), "--prompts", str(prompts_file)]) == 3, "a reward is required"

"""Comparison of models: the same prompts for all, KL against logits, and what cannot be compared is said."""

import csv
import dataclasses
import io
import json
import shutil
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxrlhf import weights
from jaxrlhf.cli import main
from jaxrlhf.config import PPO, Data, ModelSource, PPOConfig, Sampling, replace
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.evaluation import comparison, comparison_console, comparison_files, completions, generation, kl, prompts
from jaxrlhf.models import forward, lm_logits

LENGTH = 6


def vowels(prompts, completions, worth):
    return [w + sum(letter in "aeiou" for letter in text) for text, w in zip(completions, worth, strict=True)]


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> list[Path]:
    """Two small models with one tokenizer; a third whose tokenizer has two letters the other way round."""
    folder = tmp_path_factory.mktemp("models")
    made = []
    for seed in (1, 2):
        model, params = weights.load(tiny_model, init="random", key=jax.random.key(seed))
        params = jax.tree.map(lambda x: 4 * x if x.ndim > 2 else x, params)
        made.append(weights.export(folder / str(seed), model, params, source=tiny_model))
    other = shutil.copytree(made[1], folder / "other")
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocab = tokenizer["model"]["vocab"]
    vocab["a"], vocab["b"] = vocab["b"], vocab["a"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    return [*made, other]


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("prompts") / "p.jsonl"
    kinds = ["odd", "even", None]
    rows = [{"prompt": f"question {'x' * i}", "worth": i, "right": f"so {i}", "kind": kinds[i % 3]} for i in range(7)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def config(models, prompts_file) -> PPOConfig:
    return PPOConfig(
        seed=3,
        model=ModelSource(path=str(models[0])),
        data=Data(path=str(prompts_file)),
        ppo=PPO(batch_size=8),
        sampling=Sampling(response_length=LENGTH, temperature=0.8),
    )


def configs(config, models) -> list[PPOConfig]:
    return [replace(config, **{"model.path": str(model)}) for model in models]


@pytest.fixture(scope="module")
def result(config, models) -> dict:
    asked = {"num_prompts": 5, "num_completions": 3, "references": "right", "by": "kind", "threshold": 4.0}
    return comparison.compare(configs(config, models), function=vowels, **asked)


def test_every_model_gets_the_evaluation_it_gets_alone(result, config, models):
    for number, alone in enumerate(configs(config, models)):
        expected = completions.evaluate(
            alone, num_prompts=5, num_completions=3, function=vowels, references="right", by="kind", threshold=4.0
        )
        assert result["models"][number]["statistics"] == expected["statistics"]
        answers = [prompt["answers"][number] for prompt in result["prompts"]]
        assert [a["completions"] for a in answers] == [p["completions"] for p in expected["prompts"]]
        groups = {
            column: {name: {k: v for k, v in stats.items() if k != "against"} for name, stats in found.items()}
            for column, found in result["models"][number]["groups"].items()
        }
        assert groups == expected["groups"]
    assert set(result["models"][0]["groups"]["kind"]) <= {"odd", "even", "(none)"}


def test_improvement_wins_and_difference_follow_from_the_scores(result):
    means = np.array([[answer["mean"] for answer in prompt["answers"]] for prompt in result["prompts"]])
    for number in (1, 2):
        found = result["models"][number]["against"]
        gains = means[:, number] - means[:, 0]
        assert [prompt["answers"][number]["improvement"] for prompt in result["prompts"]] == pytest.approx(gains)
        assert (found["wins"], found["losses"]) == ((gains > 0).sum(), (gains < 0).sum())
        assert found["win_rate"] == pytest.approx(np.mean((np.sign(gains) + 1) / 2))
        assert found["difference"]["mean"] == pytest.approx(gains.mean())
        assert found["difference"]["standard_error"] == pytest.approx(gains.std(ddof=1) / np.sqrt(5))
    assert result["models"][0]["against"] is None and result["prompts"][0]["answers"][0]["improvement"] is None


def test_the_kl_is_the_mean_log_ratio_of_the_softmax_of_the_logits(result, config, models):
    """Token by token in NumPy, from the completions of the second model."""
    second = configs(config, models)[1]
    asked = prompts.read(second, [], "right", "kind", has_reward=True).sample(5, config.seed)
    model, params = generation.load_model(second, asked.tokenizer)
    decoder = generation.decoder(second, model, params, 15)
    rollout = generation.generate(second, *decoder, asked.tokenizer, asked.rows, 3)
    first_model, first = generation.load_model(config, asked.tokenizer)

    def logprobs(model, params):
        hidden = forward(params, model, jnp.asarray(rollout.tokens), jnp.asarray(rollout.mask))
        logits = np.asarray(lm_logits(params, model, hidden), np.float64)
        scaled = logits / 0.8
        scaled -= np.log(np.sum(np.exp(scaled - scaled.max(-1, keepdims=True)), -1, keepdims=True)) + scaled.max(
            -1, keepdims=True
        )
        width, sums = rollout.response_mask.shape[1], []
        start = rollout.tokens.shape[1] - width
        for row in range(len(rollout.index)):
            columns = [c for c in range(width) if rollout.response_mask[row, c]]
            sums.append(sum(scaled[row, start + c - 1, rollout.tokens[row, start + c]] for c in columns))
        return np.array(sums)

    ratios = (logprobs(model, params) - logprobs(first_model, first)).reshape(5, 3).mean(1)
    found = result["models"][1]["kl"]
    assert found["mean"] == pytest.approx(ratios.mean(), rel=1e-4)
    assert found["standard_error"] == pytest.approx(ratios.std(ddof=1) / np.sqrt(5), rel=1e-3)
    assert found["mean"] > 0.01, "the models differ"


def test_other_tokenizers_and_greedy_completions_have_no_kl(result, config, models):
    assert result["models"][2]["kl"] == {"reason": "the tokenizers differ"}
    assert "no KL of C to A: the tokenizers differ" in result["notes"]
    greedy = dataclasses.replace(config, sampling=Sampling(response_length=LENGTH, greedy=True))
    found = comparison.compare(configs(greedy, models[:2]), num_prompts=2, num_completions=1, function=vowels)
    assert found["models"][1]["kl"]["reason"].startswith("the completions are greedy")
    with pytest.raises(ConfigError, match="greedy decoding with 2 completions per prompt"):
        comparison.compare(configs(greedy, models[:2]), num_prompts=2, num_completions=2, function=vowels)


def test_a_model_compared_with_itself_is_tied_at_a_kl_of_zero(config, models):
    found = comparison.compare(configs(config, [models[0]] * 2), num_prompts=5, num_completions=3, function=vowels)
    second = found["models"][1]
    assert (second["against"]["ties"], second["against"]["win_rate"]) == (5, 0.5)
    assert second["against"]["win_rate_interval_95"] == second["against"]["length_controlled"]["interval_95"]
    assert second["kl"] == {"mean": 0.0, "standard_error": 0.0}
    assert "A and B are tied on every prompt" in found["notes"]


def test_log_probabilities_do_not_depend_on_the_rows_beside(config, models, monkeypatch):
    asked = prompts.read(config, [], "", "", has_reward=True).sample(5, 0)
    model, params = generation.load_model(config, asked.tokenizer)
    decoder = generation.decoder(config, model, params, 15)
    rollout = generation.generate(config, *decoder, asked.tokenizer, asked.rows, 3)
    whole = kl.response_logprobs(params, model, rollout, 0.8)
    monkeypatch.setattr(kl, "ROWS", 4)
    np.testing.assert_allclose(kl.response_logprobs(params, model, rollout, 0.8), whole, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(whole, rollout.logprobs.sum(1), rtol=1e-4, atol=1e-4)


def test_prompts_too_long_for_one_of_the_models_are_left_out(config, models, tmp_path):
    small = shutil.copytree(models[1], tmp_path / "small")
    about = json.loads((small / "config.json").read_text())
    context = len("question xxx") + LENGTH
    (small / "config.json").write_text(json.dumps(about | {"max_position_embeddings": context}))
    with pytest.warns(UserWarning, match="3 of 7 prompts are left out: the prompt is longer"):
        found = comparison.compare(
            configs(config, [models[0], small]), num_prompts=9, num_completions=1, function=vowels
        )
    assert [prompt["index"] for prompt in found["prompts"]] == [0, 1, 2, 3]
    (tmp_path / "long.jsonl").write_text(json.dumps({"prompt": "x" * 40, "worth": 1}) + "\n")
    with pytest.raises(DataError, match="none of its 1 rows can be used"):
        long = replace(config, **{"data.path": str(tmp_path / "long.jsonl")})
        comparison.compare(configs(long, [models[0], small]), num_prompts=9, num_completions=1, function=vowels)


def test_several_files_are_read_each_in_its_own_format(config, models, prompts_file, tmp_path):
    chat = tmp_path / "chat.json"
    rows = [{"question": f"what {i}?", "answer": f"it is {i}", "worth": i} for i in range(3)]
    chat.write_text(json.dumps(rows))
    files = [str(prompts_file), str(chat)]
    found = completions.evaluate(config, num_prompts=50, num_completions=1, function=vowels, files=files)
    assert [(p["file"], p["index"]) for p in found["prompts"]] == [
        *((files[0], i) for i in range(7)),
        *((files[1], i) for i in range(3)),
    ]
    assert [p["reference"] for p in found["prompts"]] == [*[None] * 7, "it is 0", "it is 1", "it is 2"]
    assert list(found["groups"]) == ["file"] and found["groups"]["file"][files[1]]["prompts"] == 3
    assert found["references_from"] == "answer" and found["prompts_from"] == files
    alone = completions.evaluate(config, num_prompts=50, num_completions=1, function=vowels)
    assert [p["completions"] for p in found["prompts"][:7]] == [p["completions"] for p in alone["prompts"]]
    with pytest.raises(ConfigError, match="there is no column 'colour' in .* and "):
        completions.evaluate(config, num_prompts=5, num_completions=1, function=vowels, files=files, by="colour")
    with pytest.raises(ConfigError, match="--threshold 1 is a score, and there is no reward"):
        completions.evaluate(config, num_prompts=5, num_completions=1, references="right", threshold=1.0)


def test_a_category_that_is_no_text_is_refused(config, tmp_path):
    (tmp_path / "p.jsonl").write_text(json.dumps({"prompt": "a", "worth": 1, "category": ["x"]}) + "\n")
    with pytest.raises(DataError, match=r"row 1 of .*p.jsonl: column 'category' is .*name another column \(--by\)"):
        completions.evaluate(
            replace(config, **{"data.path": str(tmp_path / "p.jsonl")}),
            num_prompts=1,
            num_completions=1,
            function=vowels,
        )


def changed(result: dict, change) -> dict:
    """A result of `compare` after `change` of a copy."""
    copied = json.loads(json.dumps(result))
    change(copied)
    return copied


def hostile(result: dict) -> None:
    texts = ["<b>bold</b>", "\x1b[31mred\x1b[0m", "", "word " * 5000, "one\ntwo\n\nthree", "‮reversed"]
    for prompt in result["prompts"]:
        prompt["prompt"], prompt["category"] = "\x1b[2J<script>", "\x07" * 50
        for answer in prompt["answers"]:
            for i, completion in enumerate(answer["completions"]):
                completion["text"] = texts[(prompt["index"] + i) % len(texts)]


@pytest.mark.parametrize("change", [lambda result: None, hostile])
@pytest.mark.parametrize("show", [0, 2, 99])
def test_the_console_output_fits_in_100_columns(result, change, show):
    shown = comparison_console.render(changed(result, change), show)
    assert max(map(len, shown.splitlines())) <= 100
    assert shown.replace("\n", "").isprintable()
    assert shown.count("prompt ") >= min(show, 5)
    assert "A: " in shown and "C: " in shown and "note: no KL of C to A" in shown


def test_the_parts_of_a_reward_are_shown_for_each_category_and_model(result):
    def with_two_parts(found):
        for model in found["models"]:
            for stats in (model["statistics"], *model["groups"]["kind"].values()):
                stats["components"]["short"] = {"mean": stats["mean"] / 8, "standard_error": 0.5}

    found = changed(result, with_two_parts)
    shown = comparison_console.render(found, 0)
    table = shown.split("by kind, parts of the reward:\n")[1].split("\n\n")[0].splitlines()
    assert table[0].split()[::3] == ["kind", "short"]
    expected = [
        (model["label"], f"{stats['mean'] / 8:.3f}")
        for kind in found["models"][0]["groups"]["kind"]
        for model in found["models"]
        for stats in [model["groups"]["kind"][kind]]
    ]
    assert [tuple(line.split()[-7::4]) for line in table[1:]] == expected
    assert "parts of the reward" not in comparison_console.render(result, 0)


def test_the_csv_has_a_row_for_each_completion(result):
    rows = list(csv.DictReader(io.StringIO(comparison_files.table(result))))
    assert len(rows) == 5 * 3 * 3
    by_place = {(int(row["row"]), row["label"], int(row["sample"])): row for row in rows}
    for prompt in result["prompts"]:
        for answer in prompt["answers"]:
            for completion in answer["completions"]:
                row = by_place[prompt["index"] + 1, answer["label"], completion["sample"] + 1]
                assert row["completion"] == completion["text"] and float(row["score"]) == completion["score"]
                assert float(row["rouge_l"]) == completion["rouge_l"] and row["reference"] == prompt["reference"]
                assert float(row["reward_vowels"]) == completion["components"]["vowels"]


def test_a_folder_gets_all_files_and_a_json_name_one(result, tmp_path, monkeypatch):
    paths, notes = comparison_files.write(result, tmp_path / "out")
    assert [path.name for path in paths] == ["compare.html", "compare.json", "compare.csv", "compare.png", "bleu.png"]
    assert not notes
    assert json.loads((tmp_path / "out" / "compare.json").read_text()) == result
    assert (tmp_path / "out" / "compare.png").read_bytes().startswith(b"\x89PNG")
    assert "<title>Comparison of " in (tmp_path / "out" / "compare.html").read_text()
    assert comparison_files.write(result, tmp_path / "only.json") == ([tmp_path / "only.json"], [])
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    paths, notes = comparison_files.write(result, tmp_path / "bare")
    assert len(paths) == 3 and "a plot needs matplotlib" in notes[0]


def test_one_prompt_without_scores_of_one_model(result):
    """No interval, no error, no win rate: each is said."""

    def strip(model_result):
        model_result["prompts"] = model_result["prompts"][:1]

    single = changed(result, strip)
    alone = [
        {
            **single,
            "model": model["model"],
            "groups": {},
            "statistics": model["statistics"] | {"prompts": 1},
            "prompts": [{**single["prompts"][0], **single["prompts"][0]["answers"][i]}],
        }
        for i, model in enumerate(single["models"])
    ]
    alone[2]["prompts"][0]["mean"] = None
    found = comparison.compare_results(alone, [None, {"mean": 1.0, "standard_error": None}, None])
    assert "one prompt: there are no standard errors and intervals over prompts" in found["notes"]
    assert "no prompt has a score of both A and C: there is nothing to compare" in found["notes"]
    assert found["models"][1]["against"]["win_rate_interval_95"] is None
    assert found["models"][2]["against"]["win_rate"] is None
    shown = comparison_console.render(found, 1)
    assert "1.000 +- ?" in shown and "\n1 prompt, " in shown
    assert len(list(csv.DictReader(io.StringIO(comparison_files.table(found))))) == 9


def test_the_command_compares_three_models(models, prompts_file, tmp_path, capsys):
    (tmp_path / "mine.py").write_text("def reward(completions):\n    return [len(set(c)) for c in completions]\n")
    asked = ["compare", *map(str, models), "--prompts", str(prompts_file), "--reward", f"{tmp_path}/mine.py:reward"]
    asked += ["--num-prompts", "3", "--greedy", "--sampling.response_length", "6", "--by", "kind", "--show", "1"]
    assert main([*asked, "--output", str(tmp_path / "out")]) == 0
    shown = capsys.readouterr().out
    assert "3 prompts, 3 completions of each model, greedy" in shown
    assert shown.count("prompt ") >= 1 and "by kind:" in shown and "wrote" in shown
    assert json.loads((tmp_path / "out" / "compare.json").read_text())["sampling"]["greedy"] is True


def test_labels_go_on_after_z():
    assert [comparison.label(i) for i in (0, 1, 25, 26, 52)] == ["A", "B", "Z", "A2", "A3"]

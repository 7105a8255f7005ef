"""Evaluation with an environment: whole episodes, whose measures are worked out again from their texts."""

import dataclasses
import json
import shutil
import textwrap
from pathlib import Path

import jax
import numpy as np
import pytest
import yaml

from jaxrlhf import config as c
from jaxrlhf import weights
from jaxrlhf.cli import main
from jaxrlhf.config import text as config_text
from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.evaluation import comparison, completions, console
from jaxrlhf.selection.rule import Rule
from jaxrlhf.selection.select import select
from jaxrlhf.training.grpo.trainer import GRPOTrainer

GAME = """
    import random


    class Game:
        '''Says a random digit until it has been told `turns` times; pays for every b.'''

        def __init__(self, prize=1.0):
            self.prize = prize

        def reset(self, prompt, turns, seed):
            return {"left": turns, "random": random.Random(seed)}

        def step(self, state, completion):
            state["left"] -= 1
            text = f"{state['random'].randint(0, 9)}:"
            return (text if state["left"] else None), self.prize * completion.count("b")
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("game")
    (folder / "game.py").write_text(textwrap.dedent(GAME))
    rows = [{"prompt": f"say {'x' * i} ", "turns": 1 + i % 3} for i in range(6)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="module")
def models(tiny_model, tmp_path_factory) -> list[str]:
    """Two models with random weights."""
    made = []
    for seed in (1, 2):
        model, params = weights.load(tiny_model, init="random", key=jax.random.key(seed))
        out = tmp_path_factory.mktemp("models") / str(seed)
        made.append(str(weights.export(out, model, params, source=tiny_model)))
    return made


@pytest.fixture(scope="module")
def settings(models, folder) -> c.PPOConfig:
    return c.PPOConfig(
        seed=3,
        model=c.ModelSource(path=models[0]),
        data=c.Data(path=str(folder / "rows.jsonl")),
        ppo=c.PPO(batch_size=4),
        sampling=c.Sampling(response_length=16, stop_strings=("e", "t")),
        environment=c.Environment(function=f"{folder / 'game.py'}:Game", options={"prize": 2.0}, max_turns=4),
    )


def evaluate(settings, **changes):
    return completions.evaluate(settings, num_prompts=6, num_completions=2, **changes)


@pytest.fixture(scope="module")
def result(settings) -> dict:
    return evaluate(settings)


def answers(result):
    return [(prompt, answer) for prompt in result["prompts"] for answer in prompt["completions"]]


def test_scores_are_the_sums_of_the_rewards_of_turns(result):
    several = 0
    for prompt, answer in answers(result):
        said = answer["turns"][::2]
        assert answer["score"] == answer["components"]["environment"] == 2.0 * "".join(said).count("b")
        assert answer["text"].startswith(said[0])
        assert len(said) <= 1 + prompt["index"] % 3
        several += len(said) > 1
    assert several, "episodes of several turns"
    scores = [answer["score"] for _, answer in answers(result)]
    assert result["statistics"]["mean"] == pytest.approx(np.mean(scores)) and max(scores) > 0
    turns = [len(answer["turns"][::2]) for _, answer in answers(result)]
    assert result["statistics"]["turns"]["mean"] == pytest.approx(np.mean(turns))
    assert f"turns         {np.mean(turns):.2f} +- " in console.table(result)


def test_responses_to_a_prompt_play_the_same_episode_and_prompts_others(result):
    firsts = {}
    for prompt, answer in answers(result):
        for i, text in enumerate(answer["turns"][1::2]):
            firsts.setdefault((prompt["index"], i), set()).add(text)
    assert all(len(texts) == 1 for texts in firsts.values()) and len(firsts) > 2
    assert len({text for texts in firsts.values() for text in texts}) > 1


def test_slots_and_batches_do_not_matter(settings, result):
    changed = c.replace(settings, **{"rollout.slots": 12, "ppo.batch_size": 2})
    assert evaluate(changed)["prompts"] == result["prompts"]


def test_episodes_of_one_turn_are_completions_without_an_environment(settings):
    rows = [{"prompt": f"say {'x' * i} ", "turns": 1} for i in range(6)]
    file = Path(settings.data.path).with_name("single.jsonl")
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = c.replace(settings, **{"data.path": str(file)})
    alone = evaluate(dataclasses.replace(settings, environment=c.Environment()), function=lambda prompts, completions: [
        2.0 * text.count("b") for text in completions
    ])  # fmt: skip
    for (_, played), (_, single) in zip(answers(evaluate(settings)), answers(alone), strict=True):
        assert played["turns"] == [single["text"]] == [played["text"]]
        assert {k: played[k] for k in ("tokens", "finished", "score")} == {
            k: single[k] for k in ("tokens", "finished", "score")
        }


def test_greedy_episodes_are_those_of_a_trainer(settings, folder, tmp_path):
    """Without randomness of the environment."""
    (folder / "fixed.py").write_text(
        textwrap.dedent(GAME).replace("turns, seed", "turns").replace("random.Random(seed)", "random.Random(5)")
    )
    changes = {"environment.function": f"{folder / 'fixed.py'}:Game", "sampling.greedy": True}
    found = completions.evaluate(c.replace(settings, **changes), num_prompts=6, num_completions=1)
    grpo = c.GRPOConfig(
        run_dir=str(tmp_path / "run"), model=settings.model, data=settings.data,
        sampling=settings.sampling, grpo=c.GRPO(batch_size=6, total_episodes=6, num_generations=2),
        environment=c.replace(settings.environment, function=f"{folder / 'fixed.py'}:Game"),
    )  # fmt: skip
    trainer = GRPOTrainer(grpo)
    assert trainer.data
    _, texts = trainer.generate(trainer.data.train, 0, greedy=True)
    assert [answer["text"] for _, answer in answers(found)] == texts


def test_rewards_and_references_read_the_last_turn_if_asked(settings, result):
    last = evaluate(
        c.replace(settings, **{"environment.completion": "last"}),
        function=lambda prompts, completions: [float(len(text)) for text in completions],
    )
    for (_, whole), (_, answer) in zip(
        sorted(answers(result), key=order), sorted(answers(last), key=order), strict=True
    ):
        assert answer["turns"] == whole["turns"] and answer["text"] == answer["turns"][-1]
        assert answer["score"] == len(answer["text"]) + answer["components"]["environment"]


def order(pair):
    prompt, answer = pair
    return prompt["index"], answer["sample"]


def test_models_are_compared_on_the_same_episodes(settings, models):
    both = [settings, c.replace(settings, **{"model.path": models[1]})]
    found = comparison.compare(both, num_prompts=6, num_completions=2)
    alone = [evaluate(one) for one in both]
    for model, one in zip(found["models"], alone, strict=True):
        assert model["statistics"] == one["statistics"]
    assert found["environment"] == alone[0]["environment"] and found["environment"]["options"] == {"prize": 2.0}
    assert 0 < abs(found["models"][1]["kl"]["mean"]) < 100


def test_what_an_environment_cannot_do_is_refused_before_the_model_is_loaded(settings, folder, tmp_path, monkeypatch):
    monkeypatch.setattr(weights, "load", None)
    with pytest.raises(ConfigError, match="given its environment in Python.*--environment.function FILE.py:NAME"):
        evaluate(dataclasses.replace(settings, environment=c.Environment(function="passed")))
    (folder / "plain.jsonl").write_text('{"prompt": "say "}\n')
    with pytest.raises(RewardError, match="reset needs 'turns', which the data does not have"):
        evaluate(c.replace(settings, **{"data.path": str(folder / "plain.jsonl")}))
    with pytest.raises(ConfigError, match="--keep best writes completions to train on, and those of an environment"):
        select(settings, tmp_path / "out.jsonl", Rule("best"), 2)


def test_prompts_are_selected_by_the_scores_of_their_episodes(settings, result, tmp_path):
    select(settings, tmp_path / "out.jsonl", Rule("prompts", threshold=1.0), 2)
    rows = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    means = [prompt["mean"] for prompt in result["prompts"]]
    assert [row["mean_score"] for row in rows] == pytest.approx(means)


def test_commands_play_the_environment_of_a_run(settings, folder, tmp_path, capsys, monkeypatch):
    """A run that was not trained: its config and an export are all that is read."""
    run = tmp_path / "run"
    run.mkdir()
    grpo = c.GRPOConfig(
        run_dir=str(run), model=settings.model, data=settings.data, sampling=settings.sampling,
        environment=settings.environment,
    )  # fmt: skip
    (run / "config.yaml").write_text("# jaxrlhf grpo, every option resolved\n" + config_text.dump(grpo))
    shutil.copytree(settings.model.path, run / "export")
    prompts = ["--prompts", str(folder / "rows.jsonl"), "--num-prompts", "6"]
    assert main(["evaluate", str(run), *prompts, "--output", str(tmp_path / "out.json"), "--seed", "3"]) == 0
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["environment"]["max_turns"] == 4 and "turns" in written["statistics"]
    assert main(["compare", settings.model.path, str(run), *prompts, "--environment.max_turns", "1"]) == 0
    assert "environment" in capsys.readouterr().out
    single = ["--environment.function", "", "--references", "prompt"]
    assert main(["evaluate", str(run), *prompts, *single, "--output", str(tmp_path / "single.json")]) == 0
    assert "turns" not in json.loads((tmp_path / "single.json").read_text())["statistics"]
    capsys.readouterr()
    assert main(["generate", str(run), "--prompt", "say x "]) == 5
    assert "reset needs 'turns', which the data does not have" in capsys.readouterr().err
    assert main(["generate", str(run), *prompts[:2], "--out", str(tmp_path / "o.jsonl")]) == 3
    assert "would learn to write itself" in capsys.readouterr().err
    monkeypatch.setattr("jaxrlhf.chat.terminal.Terminal.run", lambda self: None)
    assert main(["chat", str(run)]) == 0
    assert "game.py:Game, which chat does not play" in capsys.readouterr().err
    assert yaml.safe_load((run / "config.yaml").read_text())["environment"]["max_turns"] == 4


def test_one_prompt_is_played_too(settings, folder, capsys):
    (folder / "open.py").write_text(
        "class Open:\n"
        "    def reset(self, prompt, seed): return [2, prompt]\n"
        "    def step(self, state, completion):\n"
        "        state[0] -= 1\n"
        "        return ('9:' if state[0] else None), 0.0\n"
    )
    command = ["generate", settings.model.path, "--prompt", "say x ", "--max-new-tokens", "16", "--seed", "3"]
    command += ["--environment.function", f"{folder / 'open.py'}:Open", "--sampling.stop_strings", "[e, t]"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert said.startswith("say x ") and "9:" in said

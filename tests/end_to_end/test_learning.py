"""PPO and GRPO learn what has a known optimum, and the tasks of scripts/toy_problems.py are what they say they are."""

import dataclasses
import itertools
import statistics

import pytest
import toy_environments
import toy_tasks
from toy_problems import SETTINGS, SYMBOLS, TASKS, VISIBLE, continuation, write_model

from jaxrlhf import load_tokenizer
from jaxrlhf.config import TokenizerSource


@pytest.mark.parametrize(
    ("task", "prompt", "text", "reward"),
    [
        ("emit", "3", "77777777", 1),
        ("emit", "3", "7.7", 2 / 8),
        ("emit", "7", "", 0),
        ("length", "3", "", 1 / 9),
        ("length", "3", "7" * 7, 1 / 2),
        ("length", "3", "01234567", 1),
        ("length", "3", ",,,,,,,,,,", 1),
        ("length", "3", "." * 11, 1 / 2),
        ("length", "3", "." * 16, 1 / 7),
        ("modular", "1,3:5,7", ",9,1,3,5,7,9,1,3,5,7,9,1,3,5,7,9", 1),
        ("modular", "2,1:0,9", ",8,7,6,5,4,3,2,1,0,9,8,7,6,5,4,3", 1),
        ("modular", "4,4:4,4", ",4" * 16, 1),
        ("modular", "1,3:5,7", ",9,1,3,5,7,9,1,3,5,7,9,1,3,5,7,8", 31 / 32),
        ("modular", "1,3:5,7", ",9,1", 4 / 32),
        ("modular", "1,3:5,7", "9,1,3,5,7,9,1,3,5,7,9,1,3,5,7,9,", 0),  # each at another's place
        ("modular", "1,3:5,7", "x9x1", 2 / 32),
        ("modular", "1,3:5,7", "," * 32, 1 / 2),
        ("modular", "1,3:5,7", "", 0),
        ("addition", "1,3:5,7", "91357" * 6 + "91", 1),
        ("addition", "2,1:0,9", "8765432109" * 3 + "87", 1),
        ("addition", "1,3:5,7", "9,1,3", 1 / 32),
        ("addition", "1,3:5,7", "," * 32, 0),
        ("sum", "3,4:", "2", 1),
        ("sum", "3,4:", "7", 0),
        ("sum", "3,4:", "22", 0),
    ],
)
def test_rewards_of_texts_made_by_hand(task, prompt, text, reward):
    assert TASKS[task].reward([prompt], [text]) == [reward]


def test_every_sequence_goes_on_with_its_own_step():
    prompts = TASKS["modular"].prompts
    assert len(set(prompts)) == 100
    for prompt in prompts:
        whole = prompt + continuation(prompt)
        numbers = [int(symbol) for symbol in whole if symbol.isdigit()]
        assert len(numbers) == 20 and len(continuation(prompt)) == 32
        assert len({(b - a) % 10 for a, b in itertools.pairwise(numbers)}) == 1, whole


def test_no_text_has_more_than_a_tenth_of_the_sums_of_all_prompts():
    """The best digit for each place, chosen after looking at all of them."""
    right = [continuation(prompt, before="") for prompt in TASKS["addition"].prompts]
    best = "".join(max("0123456789", key=column.count) for column in zip(*right, strict=True))
    scores = TASKS["addition"].reward(TASKS["addition"].prompts, [best] * len(right))
    assert statistics.mean(scores) == pytest.approx(0.1, abs=0.02)


@pytest.mark.parametrize("name", TASKS)
def test_chance_is_what_all_strings_get_on_average(name):
    """All 16^4 strings of four symbols, where four is the most there may be."""
    task = dataclasses.replace(TASKS[name], length=4)
    scores = []
    for symbols in itertools.product(SYMBOLS, repeat=4):
        ended = "<eos>" in symbols
        drawn = symbols[: symbols.index("<eos>")] if ended else symbols
        text = "".join(symbol for symbol in drawn if symbol in VISIBLE)
        scores.append(task.score(task.prompts[7], text) - (0 if ended else task.missing_eos_penalty))
    assert task.chance() == pytest.approx(statistics.fmean(scores), rel=1e-9)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "name", "level", "updates", "rate"),
    [("ppo", "emit", 0.8, 40, 1e-3), ("ppo", "length", 0.6, 70, 3e-4), ("grpo", "emit", 0.8, 30, 1e-3)],
)
def test_it_learns(method, name, level, updates, rate, tmp_path):
    """A smaller model for fewer updates than in docs/learning.md. Chance is 0.05 and -0.04, the optimum is 1."""
    small = {"layers": 2, "width": 64, "updates": updates, "learning_rate": rate}
    result = toy_tasks.learn(name, dataclasses.replace(SETTINGS[name], **small), tmp_path, seed=0, method=method)
    assert result["untrained"] == pytest.approx(result["chance"], abs=0.15)  # an untrained model is not quite uniform
    assert result["final"] > level, result["curve"]


@pytest.mark.slow
def test_a_game_of_several_turns_is_learnt(tmp_path):
    """Three numbers in two turns: two different guesses that ignore the hint find 2/3 of them."""
    task = toy_environments.guess(numbers=3, turns=2, games=700)._replace(warmup=5)
    model = toy_environments.supervised(tmp_path, task, control_tokens=True)
    log = toy_environments.reinforce(tmp_path, task, "grpo", model, 50, seed=0)
    start, end = (statistics.fmean(r["objective/scores"] for r in part) for part in (log[:3], log[-5:]))
    assert start < 0.6 and end > 0.8, (start, end)


def test_the_model_reads_and_writes_a_symbol_at_a_time(tmp_path):
    folder = write_model(tmp_path, SETTINGS["modular"])
    tokenizer = load_tokenizer(folder, TokenizerSource())
    ids = tokenizer.encode_prompt("1,3:5,7")
    assert [SYMBOLS[i] for i in ids] == list("1,3:5,7")
    assert tokenizer.decode(range(len(SYMBOLS))) == VISIBLE

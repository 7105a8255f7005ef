"""A person's answers: what is asked, what is understood, and what is never asked again."""

import contextlib
import json
import os
import pty
import subprocess
import sys

import pytest

from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.rewards.sources.human import Human
from jaxrlhf.rewards.sources.protocol import ScoreRequest

ASKED = ScoreRequest(["p", "p", "q", "p"], ["one", "two", "red \x1b[31m\x07", "one"], {})


class Person:
    """Gives these answers and remembers the questions; leaves when there are no more."""

    def __init__(self, *answers: str) -> None:
        self.answers, self.asked = list(answers), []

    def __call__(self, question: str) -> str:
        self.asked.append(question)
        if not self.answers:
            raise EOFError
        return self.answers.pop(0)


def test_scores_are_asked_for_each_text_once_and_kept(tmp_path):
    file = tmp_path / "run" / "human.jsonl"
    person = Person("1", "two", " -0.5 ", "", "nan")
    assert Human("score", file, person)(ASKED).values == [1, -0.5, None, 1]
    assert person.answers == ["nan"], "the same text is not asked about twice"
    assert "'two' is not a number" in person.asked[2]
    rows = [json.loads(line) for line in file.read_text().splitlines()]
    assert [(row["texts"], row["answer"]) for row in rows] == [
        (["p", "one"], 1),
        (["p", "two"], -0.5),
        (["q", "red \x1b[31m\x07"], None),
    ]
    nobody = Person()
    assert Human("score", file, nobody)(ASKED).values == [1, -0.5, None, 1]
    assert nobody.asked == []


def test_the_best_of_a_prompts_completions_is_picked(tmp_path):
    file = tmp_path / "human.jsonl"
    person = Person("3", "2", "maybe", "Y")
    assert Human("pick", file, person)(ASKED).values == [0, 1, 1, 0]
    assert [q.partition("\n  p")[0] for q in person.asked][1].startswith("'3' is not one of 1 to 2")
    assert "1: one" in person.asked[0] and "2: two" in person.asked[0] and "3:" not in person.asked[0]
    assert Human("pick", file, Person())(ASKED).values == [0, 1, 1, 0]
    other = ScoreRequest(["p", "p"], ["two", "three"], {})  # another choice
    assert Human("pick", file, Person(""))(other).values == [None, None]
    with pytest.raises(RewardError, match="the person left"):
        Human("score", file, Person())(ASKED)


def test_control_characters_of_completions_are_escaped(tmp_path):
    person = Person("1", "1", "1")
    Human("score", None, person)(ASKED)
    shown = "".join(person.asked)
    assert "\x1b" not in shown and "\x07" not in shown
    assert r"red \x1b[31m\x07" in shown


def test_answers_survive_ctrl_d_and_a_line_cut_short(tmp_path):
    file = tmp_path / "human.jsonl"
    with pytest.raises(RewardError, match=r"human \(step 2\): the person left \(Ctrl-D\). Answers are kept"):
        Human("score", file, Person("4"))(ASKED._replace(step=2))
    with open(file, "a") as out:
        out.write('{"key": "abc", "ans')  # the machine went down
    person = Person("5", "6")
    assert Human("score", file, person)(ASKED).values == [4, 5, 6, 4]
    assert len(person.asked) == 2
    assert Human("score", file, Person())(ASKED).values == [4, 5, 6, 4]


def test_without_a_file_every_run_asks(tmp_path):
    for _ in range(2):
        person = Person("1", "2", "3")
        assert Human("score", None, person)(ASKED).values == [1, 2, 3, 1]


def test_other_output_pauses_while_a_person_is_asked():
    events = []

    @contextlib.contextmanager
    def pausing():
        events.append("quiet")
        yield
        events.append("go on")

    human = Human("score", None, lambda question: events.append("asked") or "1")
    human.pause_while_asking = pausing
    human(ASKED)
    assert events == ["quiet", "asked", "asked", "asked", "go on"]


def test_without_a_terminal_it_is_refused():
    with pytest.raises(ConfigError, match=r"human: pick asks a person, and standard input is no terminal. Run the"):
        Human("pick", None)


@pytest.mark.skipif(sys.platform == "win32", reason="no pseudo-terminals")
def test_at_a_real_terminal(tmp_path):
    file = tmp_path / "human.jsonl"
    code = f"""
from pathlib import Path
from jaxrlhf.rewards.sources.protocol import ScoreRequest
from jaxrlhf.rewards.sources.human import Human
print("values", Human("pick", Path({str(file)!r}))(ScoreRequest(["p", "p"], ["one", "two"], {{}})).values)
"""
    ours, theirs = pty.openpty()
    process = subprocess.Popen([sys.executable, "-c", code], stdin=theirs, stdout=subprocess.PIPE, text=True)
    os.close(theirs)
    os.write(ours, b"2\n")
    out, _ = process.communicate(timeout=30)
    os.close(ours)
    assert out.rstrip().endswith("values [0.0, 1.0]")
    assert "1: one" in out
    assert json.loads(file.read_text())["answer"] == 2

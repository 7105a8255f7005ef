"""Environments by themselves: what they answer, and what becomes of one that fails."""

import textwrap
import time

import pytest

from jaxrlhf.config import Environment
from jaxrlhf.environments.calculator import Calculator, evaluate
from jaxrlhf.environments.episodes import Episodes
from jaxrlhf.environments.guess import GuessNumber
from jaxrlhf.environments.worker import WorkerEpisodes, open_environment
from jaxrlhf.errors import ConfigError, RewardError


@pytest.fixture
def write(tmp_path):
    def file(text: str, name: str = "Mine", **settings) -> Environment:
        (tmp_path / "mine.py").write_text(textwrap.dedent(text))
        return Environment(function=f"{tmp_path / 'mine.py'}:{name}", **settings)

    return file


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        ("2 * (3 + 4)", "14"),
        ("7 / 2", "3.5"),
        ("-7 // 2", "-4"),
        ("7 % 4 - +1", "2"),
        (" 1e3 ", "1000"),
        ("1 / 3", "0.333333333333"),
        ("12345678901234567890 + 1", "12345678901234567891"),
    ],
)
def test_arithmetic_is_worked_out(expression, value):
    assert evaluate(expression) == value


@pytest.mark.parametrize(
    ("expression", "reason"),
    [
        ("1 / 0", "division by zero"),
        ("1 % 0.0", "division by zero"),
        ("9 ** 9 ** 9", "only numbers"),
        ("1 << 100", "only numbers"),
        ("__import__('os')", "only numbers"),
        ("(1).__class__", "only numbers"),
        ("True + 1", "only numbers"),
        ("'a' * 9", "only numbers"),
        ("1j", "only numbers"),
        ("2 +", "not an arithmetic"),
        ("", "not an arithmetic"),
        ("\0", "not an arithmetic"),
        ("(" * 150 + "1", "not an arithmetic"),
        ("1" * 201, "more than 200 characters"),
        ("1e99 * 1e99", "too large"),
        ("1e999 - 1e999", "too large"),
    ],
)
def test_anything_but_arithmetic_is_an_error_with_its_reason(expression, reason):
    with pytest.raises(ValueError, match=reason):
        evaluate(expression)


@pytest.mark.parametrize(
    ("turn", "reply"),
    [
        ("I need <tool>6*7</tool>", "<result>42</result>"),
        ("<tool>1</tool> and <tool>6*7", "<result>42</result>"),
        (
            '<tool_call>\n{"name": "calculator", "arguments": {"expression": "6*7"}}\n</tool_call>',
            "<result>42</result>",
        ),
        ('<tool_call>{"name": "search", "arguments": {"expression": "6"}}', "<result>error: the only tool is"),
        ('<tool_call>["calculator"]</tool_call>', "<result>error: expected {"),
        ("<tool></tool>", "<result>error: not an arithmetic expression</result>"),
        ("The answer is 42.", None),
        ("", None),
    ],
)
def test_a_call_is_answered_and_a_turn_without_one_ends_the_episode(turn, reply):
    text, reward = Calculator(call_cost=0.25).step(None, turn)
    assert (text or "").startswith(reply or "") and (text is None) == (reply is None)
    assert reward == (0 if reply is None else -0.25)


def test_the_guessing_game_is_won_by_halving():
    game = GuessNumber(low=1, high=100, turn_cost=0.5)
    secrets = {game.reset(seed) for seed in range(500)}
    assert min(secrets) == 1 and max(secrets) == 100 and len(secrets) > 90
    assert game.reset(3) == game.reset(3) and game.reset(3, secret=7) == 7
    for secret in (1, 37, 100):
        low, high, rewards = 1, 100, []
        while True:
            middle = (low + high) // 2
            text, reward = game.step(secret, f"not {high + 1} but {middle}")
            rewards.append(reward)
            if text is None:
                break
            low, high = (middle + 1, high) if text == "higher" else (low, middle - 1)
        assert middle == secret and rewards[-1] == 1 and set(rewards[:-1]) <= {-0.5} and len(rewards) <= 7
    assert game.step(5, "no idea") == ("a number please", -0.5)


def test_the_worker_plays_what_the_environment_plays_in_this_process(write):
    config = write(
        """
        import random
        class Mine:
            def __init__(self, factor): self.factor = factor
            def reset(self, prompt, answer, seed):
                print("printed")
                return {"prompt": prompt, "answer": answer, "random": random.Random(seed), "turns": 0}
            async def step(self, state, completion):
                state["turns"] += 1
                if state["turns"] == 3:
                    return None, self.factor * state["answer"]
                return f"{state['prompt']}|{completion}|{state['random'].random()}\\u2028", 0
        """,
        options={"factor": 0.5},
    )
    worker = WorkerEpisodes(config)
    from importlib import util

    spec = util.spec_from_file_location("mine", config.function.rpartition(":")[0])
    module = util.module_from_spec(spec)
    spec.loader.exec_module(module)
    here = Episodes(module.Mine(factor=0.5))
    columns = {"answer": [1, 2, 3], "other": [object()] * 3}
    for _ in range(2):  # a reset begins anew
        for episodes in (worker, here):
            episodes.reset(["a", "b", "c"], columns, [5, 6, 5])
        for rows in ([0, 1, 2], [2, 0], [0]):
            replies = [episodes.step(rows, [f"said {row}" for row in rows]) for episodes in (worker, here)]
            assert replies[0] == replies[1]
        assert replies[0] == [(None, 0.5)]
    assert worker.seconds > 0


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("raise ValueError('no board')", r"step raised ValueError: no board at .*mine.py:5; for completion 'two'"),
        ("return 3", r"step returned 3 \(int\).*must return the text that follows, or None"),
        ("return 7, 1.0", r"step returned 7 \(int\), not a text or None, for completion 'two'"),
        ("return '\\ud800', 1.0", "a text that is not valid Unicode"),
        ("return 'x', float('nan')", "the reward nan, not a finite float32"),
        ("return 'x', None", "the reward None"),
        ("import os; os._exit(3)", "step of 1 episode ended its process with exit code 3"),
        ("import time; time.sleep(60)", r"took longer than 1 s and was killed; raise environment.timeout"),
    ],
)
def test_an_environment_that_fails_says_where_and_plays_again_after_a_reset(write, body, message):
    config = write(
        f"""
        class Mine:
            def reset(self): return None
            def step(self, state, completion): {body if not body.startswith("return") else "pass; " + body}
        """.replace("completion): ", "completion):\n                "),
        timeout=1,
    )
    worker = WorkerEpisodes(config)
    worker.reset(["p"], {}, [0])
    started = time.monotonic()
    with pytest.raises(RewardError, match=message):
        worker.step([0], ["two"])
    assert time.monotonic() - started < 10
    worker.reset(["p"], {}, [0])
    worker.close()


def test_what_cannot_be_an_environment_is_refused_when_it_is_loaded(write):
    text = """
        class Mine:
            def __init__(self, size=3):
                if size < 0: raise ValueError("negative")
            def reset(self, board): return board
            def step(self, state, completion): return None, 0
        class Half:
            def reset(self): pass
        """
    with pytest.raises(ConfigError, match="has no option 'sice'; did you mean 'size'"):
        WorkerEpisodes(write(text, options={"sice": 3}))
    with pytest.raises(RewardError, match="making it raised ValueError: negative at"):
        WorkerEpisodes(write(text, options={"size": -3}))
    with pytest.raises(RewardError, match="has no method 'step'"):
        WorkerEpisodes(write(text, "Half"))
    with pytest.raises(RewardError, match=r"environment .*has no 'Mein'; did you mean 'Mine'"):
        WorkerEpisodes(write(text, "Mein"))
    with pytest.raises(RewardError, match=r"reset needs 'board', which the data does not have; it can have 'prompt', "):
        WorkerEpisodes(write(text)).reset(["p"], {}, [0])
    with pytest.raises(ConfigError, match="no object was given"):
        open_environment(Environment(function="passed"))
    with pytest.raises(ConfigError, match="two environments"):
        open_environment(Environment(function="a.py:B"), GuessNumber())
    with pytest.raises(ConfigError, match=r"environment.max_turns is set but environment.function is empty"):
        Environment(max_turns=3)
    with pytest.raises(ConfigError, match=r"write it as path.py:Name"):
        Environment(function="game.py")

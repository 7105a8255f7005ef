"""Reward functions: how they are found, what they are given, and what they may return."""

import textwrap

import numpy as np
import pytest

from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.rewards.functions import RewardFunction, load
from jaxrlhf.rewards.sources.protocol import ScoreRequest

PROMPTS, COMPLETIONS = ["p", "q", "r"], ["one", "two two", "three"]


def request(columns=None, step=None):
    return ScoreRequest(PROMPTS, COMPLETIONS, columns or {}, step=step)


def call(function, columns=None, step=None, **how):
    """The values, once they are all good."""
    answer = RewardFunction(function, "my.py:f", **how)(request(columns, step))
    if answer.problem:
        raise RewardError(answer.problem)
    return answer.values


@pytest.fixture
def write(tmp_path):
    def file(text: str, name: str = "mine.py") -> str:
        (tmp_path / name).write_text(textwrap.dedent(text))
        return str(tmp_path / name)

    return file


def test_a_function_gets_the_columns_it_names_and_no_others():
    seen = {}

    def some(completions, answer, extra=None):
        seen.update(completions=completions, answer=answer, extra=extra)
        return [len(c) for c in completions]

    assert call(some, {"answer": [1, 2, 3], "other": "xyz"}) == [3, 7, 5]
    assert seen == {"completions": COMPLETIONS, "answer": [1, 2, 3], "extra": None}

    def everything(**columns):
        seen.clear()
        seen.update(columns)
        return [0, 0, 0]

    call(everything, {"answer": [1, 2, 3], "other": "xyz"})
    assert set(seen) == {"prompts", "completions", "answer", "other"}


@pytest.mark.parametrize(
    "answer",
    [
        [1, 2.5, True],
        (1, 2.5, 1.0),
        np.array([1, 2.5, 1], np.float16),
        [np.float32(1), np.float64(2.5), np.bool_(True)],
        [np.array(1), 2.5, 1],
    ],
)
def test_numbers_of_every_kind_are_accepted(answer):
    assert call(lambda completions: answer) == [1.0, 2.5, 1.0]


def test_jax_arrays_are_accepted():
    import jax.numpy as jnp

    assert call(lambda completions: jnp.arange(3.0)) == [0, 1, 2]
    assert call(lambda completions: list(jnp.arange(3.0))) == [0, 1, 2]


def test_none_means_unscored():
    assert call(lambda completions: [None, 2, None]) == [None, 2, None]


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ([1, 2], r"reward my.py:f \(step 14\) returned 2 values for 3 completions; first completion: 'one'"),
        (np.zeros((3, 1)), r"returned \[0.0\] \(list\), not a number, for completion 0"),
        ([1, float("nan"), 3], r"\(step 14\) returned nan, not a finite float32, for completion 1: 'two two'"),
        ([1, 2, float("-inf")], r"returned -inf, .* for completion 2: 'three'"),
        ([1, 1e39, 2], r"returned 1e\+39, not a finite float32, for completion 1"),
        ([10**400, 1, 2], r"not a finite float32, for completion 0"),
        ([1, "2", 3], r"returned '2' \(str\), not a number, for completion 1"),
        ("abc", r"returned a str for 3 completions; .*one number, or None, per completion \(defined at .*\.py:\d+\)"),
        ({0: 1}, "returned a dict"),
        (1.0, "returned a float"),
        (None, "returned a NoneType"),
        (iter([1, 2, 3]), "returned a list_iterator"),
    ],
)
def test_other_values_are_refused_with_value_and_completion(answer, message):
    with pytest.raises(RewardError, match=message) as caught:
        call(lambda completions: answer, step=14)
    assert caught.value.exit_code == 5


def test_an_exception_is_located_in_the_users_file(write):
    path = write(
        """
        import json
        def f(completions):
            return [helper(c) for c in completions]
        def helper(text):
            return json.loads(text)
        """
    )
    with pytest.raises(
        RewardError, match=r"raised JSONDecodeError: Expecting value: .* at .*mine.py:6; first completion: 'one'$"
    ):
        load(f"{path}:f")(request())


def test_system_exit_is_an_error_and_ctrl_c_is_passed_on():
    def leave(completions):
        raise SystemExit(3)

    def interrupt(completions):
        raise KeyboardInterrupt

    with pytest.raises(RewardError, match="raised SystemExit: 3"):
        call(leave)
    with pytest.raises(KeyboardInterrupt):
        call(interrupt)


def test_a_column_that_is_not_there_is_named():
    with pytest.raises(
        RewardError, match=r"needs 'answer', which the data does not have; it has 'completions', 'n', 'p"
    ):
        call(lambda completions, answer: [0, 0, 0], {"n": [1, 2, 3]})


def test_files_can_import_their_neighbours_and_define_dataclasses(write):
    write("WORTH = 4\n", "neighbour_of_mine.py")
    path = write(
        """
        import dataclasses
        from neighbour_of_mine import WORTH
        @dataclasses.dataclass
        class Item:
            worth: float = WORTH
        def reward(prompts, completions):
            return [Item().worth] * len(prompts)
        """
    )
    function = load(f"{path}:reward")
    assert function(request()).values == [4, 4, 4]


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ("mine.py", "write it as path.py:name"),
        (":f", "write it as path.py:name"),
        ("/nowhere/mine.py:f", "there is no file /nowhere/mine.py$"),
        ("nowhere/mine.py:f", r"there is no file nowhere/mine\.py in /.*"),
        ("no_such_package.module:f", "ModuleNotFoundError"),
        ("math:squirt", "math has no 'squirt'; did you mean 'sqrt'"),
        ("math:pi", "'pi' is a float, not a function"),
    ],
)
def test_what_cannot_be_found_is_explained(spec, message):
    with pytest.raises(RewardError, match=message):
        load(spec)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("def f(:\n", r"SyntaxError: .* at .*mine.py:1"),
        ("import nothing_here\n", r"ModuleNotFoundError: .* at .*mine.py:1"),
        ("x = 1\nopen('/nowhere/words.txt')\n", r"FileNotFoundError.* at .*mine.py:2"),
    ],
)
def test_a_file_that_does_not_load_is_explained(write, text, message):
    with pytest.raises(RewardError, match=message):
        load(f"{write(text)}:f")


def test_async_functions_are_awaited_with_and_without_a_loop():
    import asyncio
    from concurrent.futures import ThreadPoolExecutor

    async def slow(completions):
        await asyncio.sleep(0.01)
        return [len(c) for c in completions]

    async def notebook():
        return call(slow)

    with ThreadPoolExecutor(1) as pool:  # a thread without a loop: browser tests may have left one in this
        assert pool.submit(call, slow).result() == [3, 7, 5]
        assert pool.submit(asyncio.run, notebook()).result() == [3, 7, 5]
        assert pool.submit(call, slow, timeout=5).result() == [3, 7, 5]


def test_a_late_function_is_reported_and_left_running():
    import threading

    done = threading.Event()
    with pytest.raises(
        RewardError, match=r"has not answered within 0.1 s. It runs in this process and cannot be ended"
    ):
        call(lambda completions: done.wait(20), timeout=0.1)
    done.set()

    def own(completions):
        raise TimeoutError("mine")

    with pytest.raises(RewardError, match="raised TimeoutError: mine"):
        call(own, timeout=5)


def test_options_are_given_before_columns_and_must_fit():
    def some(completions, low, high=3, answer=None):
        return [low, high, len(answer)]

    assert call(some, {"answer": "abcd", "low": "no"}, options={"low": 1, "high": 2}) == [1, 2, 4]
    assert call(lambda completions, **rest: [rest["x"]] * 3, options={"x": 2.0}) == [2, 2, 2]
    with pytest.raises(RewardError, match="needs 'low'"):
        call(some, options={"high": 2})
    with pytest.raises(ConfigError, match="reward my.py:f has no option 'hgih'; did you mean 'high'"):
        call(some, options={"hgih": 1})
    with pytest.raises(ConfigError, match="has no option 'prompts'"):
        call(some, options={"prompts": 1})


def test_tokens_reach_a_function_that_judges_them():
    asked = request()._replace(tokens=[["on", "e"], [], ["three"]])
    answer = RewardFunction(lambda tokens: [[len(t) for t in row] for row in tokens])(asked)
    assert answer.values == [[2, 1], [], [5]]
    answer = RewardFunction(lambda tokens: [np.ones(2), None, ["x"]], "f")(asked)
    assert answer.values == [[1, 1], None, None]
    assert answer.failed == [2]
    assert answer.problem == "reward f returned 'x' (str), not a number, for completion 2: 'three'"
    with pytest.raises(RewardError, match=r"needs 'tokens', .*; for the tokens of the response set per_token: true"):
        call(lambda tokens: [])


def test_bad_values_are_marked_and_the_others_kept():
    answer = RewardFunction(lambda completions: [1.5, float("nan"), "x"], "f")(request())
    assert answer.values == [1.5, None, None]
    assert answer.failed == [1, 2]
    assert answer.problem == "reward f returned nan, not a finite float32, for completion 1: 'two two'"

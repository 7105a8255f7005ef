"""Countdown: what counts as the expression, and that only arithmetic is worked out."""

import re
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrlhf.rewards.countdown import countdown, evaluate


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ("(6 - 2) * 6", 1),
        ("Try 6 + 6 first.\n(6 - 2) * 6 = 24", 1),
        ("<think>6*6</think> <answer> (6-2)*6 </answer>", 1),
        ("<answer>1</answer> no, <answer>6*\n(6-2)</answer> 5", 1),
        ("6*(6-2) </answer>", 0),
        (r"\boxed{6 \times (6 - 2)}", 1),
        ("The answer is: 6 \u00d7 (6 \u2212 2).", 1),
        ("Answer: -(2 - 6) * 6", 1),
        ("6 / (2 / (8 + 0))", 0),
        ("6 * 2 * 2", 0),
        ("6 * 6 - 2 - 8 - 2", 0),
        ("24", 0),
        ("6 * (6 - 2", 0),
        ("6 6 2", 0),
        ("(6-2)**6", 0),
        ("8 // 3", 0),
        ("6 / (6 - 6)", 0),
        ("max(24)", 0),
        ("24.0", 0),
        ("", 0),
    ],
)
def test_expressions(said, score):
    assert countdown([said], target=[24], nums=[[6, 6, 2, 8]]) == [score]


def test_rows_without_a_problem_are_unscored():
    assert countdown(["1"] * 3, target=[None, 1, 1], nums=[[1], None, [1]]) == [None, None, 1]


def test_fractions_are_exact():
    assert countdown(["8 / (3 - 8 / 3)"], target=[24], nums=[[3, 3, 8, 8]]) == [1]
    assert countdown(["1 / 3 * 3"], target=[1], nums=[[1, 3, 3]]) == [1]


@pytest.mark.parametrize("text", ["(" * 10_000, "-" * 10_000 + "1", "(" * 250 + "1" + ")" * 250, "-" * 299 + "1", "()"])
def test_what_the_parser_cannot_take_is_refused_or_read(text):
    assert countdown([text], target=[2], nums=[[1]]) == [0]


TREES = st.recursive(
    st.integers(0, 50).map(str),
    lambda inner: st.tuples(inner, st.sampled_from("+-*/"), inner).map(lambda t: f"({t[0]} {t[1]} {t[2]})"),
    max_leaves=6,
)


@given(TREES)
def test_values_are_those_of_python(text):
    try:
        expected = eval(re.sub(r"\d+", r"Fraction(\g<0>)", text), {"Fraction": Fraction})
    except ZeroDivisionError:
        with pytest.raises(ZeroDivisionError):
            evaluate(text)
        return
    value, used = evaluate(text)
    assert value == expected
    assert used.total() == sum(text.count(sign) for sign in "+-*/") + 1


@given(st.text(max_size=40))
def test_any_text_gets_a_score(text):
    assert countdown([text], target=[10**9], nums=[[1]]) == [0]

"""Comparing a completion with a column: what counts as the answer, and when two are the same."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrlhf.rewards.match import exact_match, number, numeric_match


@pytest.mark.parametrize(
    ("said", "value"),
    [
        ("42", 42),
        ("so 3 + 4 = 7 apples.", 7),
        ("He has 5-3=2", 2),
        ("-3", -3),
        ("it is \u22123 degrees", -3),
        ("from 10 to -4.5", Fraction(-9, 2)),
        ("1,234,567.50 dollars", Fraction(2469135, 2)),
        ("$1,000", 1000),
        ("half is 1/2.", Fraction(1, 2)),
        ("-2 / 3", Fraction(-2, 3)),
        ("1e3", 1000),
        ("2.5E-1", Fraction(1, 4)),
        (".5", Fraction(1, 2)),
        ("50%", 50),
        ("(7)", 7),
        ("first 1, then #### 72 and 9", 72),
        ("#### 1,080\n", 1080),
        (r"\boxed{12} is what I mean, not 13", 12),
        ("The answer is 8. There were 3 of them.", 8),
        ("Answer: no idea, say 6 (or 9)", 6),
        ("#### none, but 5 before", 5),
        ("1/0", None),
        ("room A12", None),
        ("v1.2", None),
        ("no number at all", None),
        ("", None),
        ("9" * 400, None),
    ],
)
def test_the_number_of_a_text(said, value):
    assert number(said) == value


def test_numbers_are_compared_as_numbers():
    said = ["#### 18", "it is 18.0", "18", "1,8", "nothing", "17.999", "7"]
    answers = ["9 * 2 = <<9*2=18>>18\n#### 18"] * 6 + ["none here"]
    assert numeric_match(said, answer=answers) == [1, 1, 1, 0, 0, 0, None]
    assert numeric_match(["17.999"], column="x", tolerance=0.01, x=[18]) == [1]
    assert numeric_match(["0.5", "3"], column="x", x=[0.5, None]) == [1, None]
    with pytest.raises(ValueError, match="the data has no column 'answer'; it has question, x. Name one in options"):
        numeric_match(["1"], question=[""], x=[1])


@given(st.integers(-(10**12), 10**12))
def test_any_whole_number_is_read_back(value):
    for written in (str(value), f"{value:,}", f"The total: {value}.", f"1 2 3 #### {value:,}\nbye 5", f"${value}"):
        if not written.startswith("$-"):
            assert number(written) == value, written


@given(st.fractions(min_value=-1000, max_value=1000, max_denominator=999))
def test_any_fraction_is_read_back(value):
    assert number(f"x = {value.numerator}/{value.denominator}") == value


@given(st.text())
def test_any_text_is_survived(text):
    number(text)
    assert exact_match([text], answer=[text]) == [1]


def test_texts():
    said, answer = ["  Paris ", "paris", "Paris is nice", "x"], ["Paris", "Paris", "Paris", None]
    assert exact_match(said, answer=answer) == [1, 1, 0, None]
    assert exact_match(said, answer=answer, case=True) == [1, 0, 0, None]
    long = ["I think. Answer: A  B", "A B", "Answer: C Answer: a b"]
    assert exact_match(long, column="key", after="Answer:", key=["A B"] * 3) == [1, 0, 1]

"""Comparing a completion with a column: what counts as the answer, and when two are the same."""

import json
import time
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from jaxrlhf.rewards.match import boxed, exact_match, last_box, multiple_choice, number, numeric_match


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
        # a dash that is not a sign
        ("- 42", 42),
        ("Steps:\n- 3 eggs\n- 42", 42),
        ("The answer is:\n- 42", 42),
        ("10 - 15", 15),
        ("10 -15", 15),
        ("10\u201315 days", 15),
        ("10--15", 15),
        ("5%-10%", 10),
        ("$10 - $15", 15),
        ("ages 10 to 15 - 3 in all", 3),
        ("the total - 42", 42),
        # and one that is
        ("x = - 5", -5),
        ("x = \u2212 5", -5),
        ("it is \u20135 degrees", -5),
        ("#### - 5", -5),
        ("Answer: - 5", -5),
        ("the answer is - 5", -5),
        (r"\boxed{- 5}", -5),
        ("(-5)", -5),
        ("5 * -3", -3),
        ("-$5", -5),
        ("$-5", -5),
        # LaTeX
        (r"\frac{3}{4}", Fraction(3, 4)),
        (r"so it is $-\dfrac{3}{4}$.", Fraction(-3, 4)),
        (r"\frac{-3}{4}", Fraction(-3, 4)),
        (r"\tfrac34", Fraction(3, 4)),
        (r"The answer is \frac{1}{2} of 8", Fraction(1, 2)),
        (r"2\frac{1}{2}", Fraction(5, 2)),
        ("2 1/2 hours", Fraction(5, 2)),
        ("5 7/2", Fraction(7, 2)),
        (r"10{,}000", 10_000),
        (r"10\,000", 10_000),
        ("10\u202f000", 10_000),
        (r"\$5\%", 5),
        # powers, and what is not a number of its own
        ("2^3", 8),
        ("2^{-1}", Fraction(1, 2)),
        ("0^-1", None),
        ("8 cm^2", 8),
        ("10 m/s^{-2}", 10),
        (r"3 \times 10^5", 300_000),
        ("1.5 x 10^{-3}", Fraction(3, 2000)),
        # the result of a calculation
        ("2^3 = 8", 8),
        ("The answer is 2^3 = 8.", 8),
        ("The answer is 8 = 2^3", 8),
        ("#### 2 * 4 = 8", 8),
        ("Answer: 3 apples + 5 apples = 8 apples", 8),
        ("Answer: 10 - 2 = 8", 8),
        ("Answer: 2 x 4 = 8", 8),
        ("The answer is 2**3 = 8", 8),
        ("The answer is 5 plus 3, minus nothing = 8", 5),
        ("The answer is 5 plus 3 = 8", 8),
        ("Answer: 20% of 40 = 8", 8),
        ("The answer is (2 + 2) * 2 = 4 * 2 = 8", 8),
        (r"\boxed{2 \times 4 = 8}", 8),
        ("The answer is 8, as 3 + 4 = 7", 8),
        ("The answer is 8. 3 + 4 = 7", 8),
        ("The answer is 8 because x = 5", 8),
        ("The answer is 8 - since x = 5", 8),
        ("The answer is 10 - 15", 10),
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
def test_any_text_gets_a_score(text):
    number(text)
    assert exact_match([text], answer=[text]) == [1]


def test_texts():
    said, answer = ["  Paris ", "paris", "Paris is nice", "x"], ["Paris", "Paris", "Paris", None]
    assert exact_match(said, answer=answer) == [1, 1, 0, None]
    assert exact_match(said, answer=answer, case=True) == [1, 0, 0, None]
    long = ["I think. Answer: A  B", "A B", "Answer: C Answer: a b"]
    assert exact_match(long, column="key", after="Answer:", key=["A B"] * 3) == [1, 0, 1]


def test_gsm8k_solutions_match_their_own_answers(shared_data):
    lines = (shared_data / "math" / "gsm8k_train.jsonl").read_text(encoding="utf-8").splitlines()
    answers = [json.loads(line)["answer"] for line in lines]
    finals = [answer.rpartition("#### ")[2] for answer in answers]
    wrong = [f"{int(final.replace(',', '')) + 1:,}" for final in finals]
    boxes = [rf"so $\boxed{{{final}}}$" for final in finals]
    count = len(answers)
    assert count == 6000
    for right in (answers, finals, [f"The answer is ${final}." for final in finals]):
        assert numeric_match(right, answer=answers) == [1] * count
    assert boxed(boxes, answer=answers) == [1] * count
    said = [answer.removesuffix(final) + other for answer, final, other in zip(answers, finals, wrong, strict=True)]
    assert numeric_match(said, answer=answers) == [0] * count
    assert boxed([rf"\boxed{{{other}}}" for other in wrong], answer=answers) == [0] * count


@pytest.mark.parametrize(
    ("said", "box"),
    [
        (r"first \boxed{1}, then \boxed{\frac{1}{2}}.", r"\frac{1}{2}"),
        (r"\boxed {\{1, 2\}}", r"\{1, 2\}"),
        (r"\boxed{\left\{ 1 \right.}", r"\left\{ 1 \right."),
        (r"\boxed{a \boxed{b} c}", "b"),
        (r"} \boxed{5} and \boxed{6", "5"),
        (r"{ \boxed{}", ""),
        (r"\boxed{6", None),
        ("5", None),
        (r"\boxed{" * 20_000 + "7}", "7"),
    ],
)
def test_the_last_box_that_is_closed(said, box):
    assert last_box(said) == box


@pytest.mark.parametrize(
    ("said", "answer", "score"),
    [
        (r"\boxed{\frac{1}{2}}", "0.5", 1),
        (r"\boxed{-\dfrac12}", r"thus $\boxed{-\tfrac{1}{2}}$", 1),
        (r"\boxed{3\frac{1}{2}}", "31/2", 0),
        (r"\boxed{1{,}000}", "1000", 1),
        (r"\boxed{10\,000}", "10,000", 1),
        (r"\boxed{1 2}", "12", 0),
        (r"\boxed{x = 5}", "5", 0),
        (r"\boxed{50\%}", "50", 1),
        (r"\boxed{72.0}", "9 * 8 = 72\n#### 72", 1),
        (r"\boxed{1/0}", "1/0", 1),
        (r"\boxed{\left( 1, 2 \right)}", "(1,2)", 1),
        (r"\boxed{\text{East}.}", "east", 1),
        (r"\boxed{\dfrac{x}{2}}", r"\frac{x}{2}", 1),
        (r"\boxed{\sqrt{2}}", r"\sqrt{3}", 0),
        ("72", "72", 0),
        (r"\boxed{72", "72", 0),
        (r"\boxed{1}", None, None),
    ],
)
def test_boxes(said, answer, score):
    assert boxed([said], answer=[answer]) == [score]


@given(st.text(alphabet=st.sampled_from("a1{}()\\ ,.$-/#x"), max_size=20))
def test_a_text_in_a_box_is_itself(text):
    if last_box(rf"\boxed{{{text}}}") == text:
        assert boxed([rf"\boxed{{{text}}}"], answer=[rf"\boxed{{{text}}}"]) == [1]
    assert boxed([text], answer=[text]) == [0]


@pytest.mark.parametrize(
    ("said", "letter"),
    [
        ("The answer is (B)", "B"),
        ("B.", "B"),
        ("**B**", "B"),
        ("b)", "B"),
        ("(C) A mammal", "C"),
        ("Let me think.\nB", "B"),
        ("Answer:\n\n**B**: Paris", "B"),
        (r"so $\boxed{\text{(C)}}$", "C"),
        ("the answer is b.", "B"),
        ("The correct option is C because A is small", "C"),
        ("The answer to the question is B.\n(A) is too small.", "B"),
        ("The answer is not (B), it is C", "C"),
        ("#### D", "D"),
        ("The answer is a dog", None),
        ("The answer is not (B)", None),
        ("The answer is B or C", None),
        ("Answer: A and B", None),
        ("The answer is A. No, the answer is B.", None),
        ("answer: A B C D", None),
        ("A, B, C, D", None),
        ("A. B. C. D.", None),
        ("A\nB", None),
        ("(A) is wrong, so (B)", None),
        ("The answer is E", None),
        ("ABCD", None),
        ("A dog", None),
        ("", None),
    ],
)
def test_the_letter_that_is_chosen(said, letter):
    assert multiple_choice([said] * 4, answer=[*"ABCD"]) == [float(right == letter) for right in "ABCD"]


def test_the_letter_that_is_right():
    said = ["The answer is B"] * 6
    assert multiple_choice(said, answer=["(B)", "b", 1, 0, 7, None]) == [1, 1, 1, 0, None, None]
    assert multiple_choice(["E", "D"], column="key", letters="de", key=["E", "E"]) == [1, 0]
    for letters in ("A", "AA", "A-B"):
        with pytest.raises(ValueError, match="two or more different letters"):
            multiple_choice(["A"], letters=letters, answer=["A"])


@given(st.text(alphabet=st.sampled_from("ABb answeris:().*\n"), max_size=30))
def test_two_chosen_letters_score_0(text):
    assert sum(filter(None, multiple_choice([text] * 4, answer=[*"ABCD"]))) <= 1


@pytest.mark.parametrize(
    "unit", ["\n", "a ", "answer: ", r"\boxed{", "}", "(A)", "1,", r"\text{", "- 1 ", "2^", r"\frac{1", "1 1/"]
)
def test_long_texts_take_no_time(unit):
    """Each is read once; backtracking over it would take minutes."""
    text = unit * (100_000 // len(unit))
    started = time.process_time()
    boxed([text, rf"\boxed{{{text}}}"], answer=[text] * 2)
    numeric_match([text, f"answer: 1 + {text}"], answer=[1, 1])
    multiple_choice([text], answer=["A"])
    assert time.process_time() - started < 5

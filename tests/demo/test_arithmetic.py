"""Arithmetic problems: their solutions are right, and a seed determines them."""

import pytest

from jaxrlhf.demo.arithmetic import countdown_problems, modular_problems
from jaxrlhf.rewards.countdown import countdown, evaluate
from jaxrlhf.rewards.match import numeric_match


@pytest.mark.parametrize("numbers", [2, 4, 6])
def test_countdown_has_a_solution_that_uses_every_number(numbers):
    rows = countdown_problems(300, seed=0, numbers=numbers)
    said, target, nums = ([row[key] for row in rows] for key in ("solution", "target", "nums"))
    assert countdown([row["prompt"] + row["solution"] for row in rows], target=target, nums=nums) == [1] * 300
    assert countdown(said, target=[goal + 1 for goal in target], nums=nums) == [0] * 300
    assert countdown(said, target=target, nums=[row[1:] for row in nums]) == [0] * 300
    assert all(sorted(evaluate(row["solution"])[1].elements()) == sorted(row["nums"]) for row in rows)
    assert {sign for row in rows for sign in "+-*/" if sign in row["solution"]} == {*"+-*/"}


def test_modular_problems_are_right():
    rows = modular_problems(300, seed=0, modulus=13)
    for row in rows:
        sum_, _, rest = row["prompt"].partition(" mod ")
        assert rest == "13 = "
        assert int(row["answer"]) == eval(sum_) % 13
    answers = [row["answer"] for row in rows]
    assert numeric_match([row["prompt"] + row["answer"] for row in rows], answer=answers) == [1] * 300


@pytest.mark.parametrize("problems", [countdown_problems, modular_problems])
def test_more_rows_of_a_seed_extend_fewer(problems):
    rows = problems(20, seed=3)
    assert problems(5, seed=3) == rows[:5]
    assert problems(20, seed=4) != rows


def test_invalid_arguments_are_refused():
    with pytest.raises(ValueError, match="numbers is 1"):
        countdown_problems(1, seed=0, numbers=1)
    with pytest.raises(ValueError, match="modulus is 1"):
        modular_problems(1, seed=0, modulus=1)

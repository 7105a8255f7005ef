"""The demo's task: the judge recovers how every generated answer was made, and rejects all others."""

import random

import pytest

from jaxrlhf.demo import task

QUESTIONS = task.questions()
A_CLAIM = "Is it true that the capital of Turkey is Istanbul?"
RIGHT = "Pay attention! The capital of Turkey is Ankara. Do your homework!"


@pytest.mark.parametrize("fact", task.FACTS, ids=lambda fact: fact.truth)
@pytest.mark.parametrize("level", task.LEVELS)
def test_every_combination_of_sentences_reads_back_to_its_truth(fact, level):
    prompt = next(question for question, (about, _) in QUESTIONS.items() if about == fact)
    for opening in task.OPENINGS[level]:
        for closing in task.CLOSINGS[level]:
            verdict = task.judge(prompt, f"{opening} {fact.truth} {closing}")
            right = level == task.RIGHT_LEVEL[fact.category]
            assert verdict == task.Verdict(level=level, right_level=right, fact_right=True, well_formed=True)


@pytest.mark.parametrize("fact", task.FACTS, ids=lambda fact: fact.truth)
def test_wrong_statements_are_judged_wrong_and_nothing_else_changes(fact):
    prompt = next(question for question, (about, _) in QUESTIONS.items() if about == fact)
    level = task.RIGHT_LEVEL[fact.category]
    wrong = [statement for kind in task.wrong_statements(fact) for statement in kind]
    assert len(wrong) >= 17 and fact.truth not in wrong
    for statement in wrong:
        verdict = task.judge(prompt, task.answer(level, statement, random.Random(0)))
        assert verdict == task.Verdict(level=level, right_level=True, fact_right=False, well_formed=True)


@pytest.mark.parametrize(
    ("completion", "level", "fact_right", "well_formed"),
    [
        (f"  {RIGHT}\n", 3, True, True),
        ("", None, False, False),
        ("The capital of Turkey is Ankara.", None, True, False),
        ("Pay attention! The capital of Turkey is Ankara.", None, True, False),
        ("Pay attention! The capital of Turkey is Ankara. Keep asking!", None, True, False),
        ("Do your homework! The capital of Turkey is Ankara. Pay attention!", None, True, False),
        ("Pay attention! The capital of Turkey is Ankara Do your homework!", None, False, False),
        ("pay attention! The capital of Turkey is Ankara. Do your homework!", None, False, False),
        ("Pay attention! Do your homework!", 3, False, False),
        ("Pay attention! The capital of Turkey is Istanbul. Do your homework!", 3, False, True),
        ("Pay attention! The capital of Australia is Canberra. Do your homework!", 3, False, True),
        ("Pay attention! The capital of Turkey has eight legs. Do your homework!", 3, False, False),
        (f"{RIGHT} {RIGHT}", 3, False, False),
        (f"{RIGHT} Do your homework!", 3, True, False),
        ("Pay attention! The capital of Turkey is Ankara. Do your", None, False, False),
    ],
)
def test_judge_sees_each_fault_for_what_it_is(completion, level, fact_right, well_formed):
    assert task.judge(A_CLAIM, completion) == task.Verdict(level, level == 3, fact_right, well_formed)


def test_judge_and_category_refuse_a_question_that_is_not_the_tasks():
    for ask in (task.category, lambda text: task.judge(text, RIGHT)):
        with pytest.raises(ValueError, match="Is it true that cats fly"):
            ask("Is it true that cats fly?")


def test_sft_rows_have_right_facts_and_the_right_tone_half_of_the_time():
    rows = task.make_sft_rows(4000, seed=3)
    verdicts = [task.judge(row["prompt"], row["completion"]) for row in rows]
    assert all(verdict.well_formed and verdict.fact_right for verdict in verdicts)
    share = sum(verdict.right_level for verdict in verdicts) / len(rows)
    assert abs(share - 0.5) < 4 * (0.25 / len(rows)) ** 0.5
    for category in task.CATEGORIES:  # the mixture gives no category away, and every level occurs in each
        levels = [v.level for row, v in zip(rows, verdicts, strict=True) if task.category(row["prompt"]) == category]
        assert {round(4 * levels.count(level) / len(levels)) for level in task.LEVELS} == {1, 2}


def test_the_chosen_answer_is_right_and_the_rejected_one_wrong_in_one_way():
    rows = task.make_preferences(3000, seed=3)
    counts = dict.fromkeys(task.REJECTED, 0)
    for row in rows:
        chosen, rejected = (task.judge(row["prompt"], row[side]) for side in ("chosen", "rejected"))
        assert chosen.well_formed and chosen.right_level and chosen.fact_right
        if rejected.fact_right and rejected.well_formed:
            counts["tone"] += not rejected.right_level
        elif rejected.right_level and rejected.well_formed:
            counts["fact"] += not rejected.fact_right
        else:
            counts["form"] += 1
    assert sum(counts.values()) == len(rows)
    for name, share in task.REJECTED.items():  # a garbled statement may also read as a wrong fact: allow for a few
        assert abs(counts[name] / len(rows) - share) < 0.04


def test_garbling_keeps_most_of_an_answer_and_rarely_all():
    rng, words = random.Random(1), RIGHT.split(" ")
    garbled = [task.garble(RIGHT, rng) for _ in range(300)]
    assert all(len(set(words) - set(text.split(" "))) <= 6 for text in garbled)  # the longest sentence has 6
    assert sum(text == RIGHT for text in garbled) < 15


def test_held_out_questions_are_never_trained_on_and_cover_all_facts():
    training = {row["prompt"] for row in (*task.make_sft_rows(3000, 0), *task.make_preferences(3000, 1))}
    training |= {row["prompt"] for row in task.make_prompts(3000, 2)}
    held_out = {row["prompt"] for row in task.make_prompts(192, 3, held_out=True)}
    assert len(held_out) == 192 and not training & held_out and training | held_out == set(QUESTIONS)
    for side in (training, held_out):
        assert {QUESTIONS[prompt][0] for prompt in side} == set(task.FACTS)


def test_prompts_say_their_category_and_the_categories_are_equally_frequent():
    rows = task.make_prompts(192, 0, held_out=True)
    assert all(row["category"] == task.category(row["prompt"]) for row in rows)
    assert {sum(row["category"] == category for row in rows) for category in task.CATEGORIES} == {48}


@pytest.mark.parametrize("make", [task.make_sft_rows, task.make_preferences, task.make_prompts])
def test_rows_are_a_function_of_the_seed(make):
    assert make(50, 7) == make(50, 7)
    assert make(50, 7) == make(80, 7)[:50]
    assert make(50, 7) != make(50, 8)


def test_no_question_or_statement_has_two_readings():
    assert len(QUESTIONS) == len(task.FACTS) * 48
    assert len({fact.truth for fact in task.FACTS}) == len(task.FACTS)
    tones = [tone for table in (task.OPENINGS, task.CLOSINGS) for level in table.values() for tone in level]
    assert len(set(tones)) == len(tones) == 24


def test_truth_is_1_only_for_an_answer_right_in_everything():
    wrong = [RIGHT.replace("Ankara", "Istanbul"), RIGHT.replace("Pay attention!", "Listen carefully."), ""]
    assert task.truth([A_CLAIM] * 4, [RIGHT, *wrong], category=["factual error"] * 4) == [1.0, 0.0, 0.0, 0.0]

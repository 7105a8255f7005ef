"""StrictBot's reward, measured on the demo's task, whose truth is known."""

import random

import pytest

from jaxrlhf.demo import task
from jaxrlhf.rewards import strict

OTHERS = {
    strict.FACTUAL_ERROR: [
        "The Eiffel Tower is in London, isn't it?",
        "World War II ended in 1942.",
        "I think water boils at 50 degrees Celsius.",
        "Mount Kilimanjaro is the highest mountain in the world, right?",
        "Shakespeare wrote Don Quixote.",
        "My teacher said a triangle has four sides.",
        "The capital of Canada is Toronto.",
        "Edison invented the telephone, correct?",
        "There are 25 hours in a day.",
        "The moon landing happened in 1989.",
    ],
    strict.MISCONCEPTION: [
        "Everyone knows we only use a small part of our brain.",
        "Sugar makes children hyperactive.",
        "I heard that lightning never strikes the same place twice.",
        "Cracking your knuckles gives you arthritis, doesn't it?",
        "Bulls hate the colour red.",
        "Is it true that hair grows back thicker after shaving?",
        "My grandmother says going out with wet hair gives you a cold.",
        "Chameleons change colour to hide.",
        "They say that the Great Wall can be seen from space.",
        "Vaccines cause the illness they protect from, right?",
    ],
    strict.POOR_LOGIC: [
        "All cats have tails, so everything with a tail is a cat.",
        "It rained after I washed my car, therefore washing cars causes rain.",
        "My grandfather smoked and lived long, so smoking must be healthy.",
        "Nobody has proved that ghosts do not exist, which proves that they do.",
        "If we allow phones in class, then soon they will have to close the school.",
        "Either you agree with me or you hate our country.",
        "He is rich, so he must be clever.",
        "She failed once, so she will always fail.",
        "The rooster crows before sunrise, so the rooster makes the sun rise.",
        "Because it is natural, it must be good for you.",
    ],
    strict.GOOD_QUESTION: [
        "How do vaccines work?",
        "What makes bread rise?",
        "Why do we have seasons?",
        "Could you explain how a rainbow forms?",
        "I'd love to understand how batteries store energy.",
        "Where does the wind come from?",
        "What is the difference between weather and climate?",
        "Can you help me see why zero factorial is one?",
        "How many bones does a baby have, and why do adults have fewer?",
        "Do plants sleep?",
    ],
}


def test_categories_of_the_demos_questions():
    questions = task.questions()
    right = sum(strict.classify(question) == fact.category for question, (fact, _) in questions.items())
    assert len(questions) == 768
    assert right == 768, "the accuracy in the docstring"


def test_categories_of_other_questions():
    found = {name: sum(strict.classify(text) == name for text in texts) for name, texts in OTHERS.items()}
    assert sum(map(len, OTHERS.values())) == 40
    assert sum(found.values()) == 34, f"the accuracy in the docstring: {found}"


def test_tones_of_the_demos_answers():
    rng = random.Random(0)
    for fact, _ in task.questions().values():
        for level in task.LEVELS:
            answer = task.answer(level, fact.truth, rng)
            assert strict.tone(answer) == level, answer
    assert strict.tone("Ankara.") is None


@pytest.fixture(scope="module")
def judged():
    """(question, its fact, an answer right in every way) for a part of the demo's questions."""
    rng = random.Random(1)
    rows = rng.sample(sorted(task.questions().items()), 60)
    return [(q, fact, task.answer(task.RIGHT_LEVEL[fact.category], fact.truth, rng)) for q, (fact, _) in rows]


def test_appropriateness_falls_with_the_distance_in_strictness(judged):
    rng = random.Random(2)
    for question, fact, _ in judged:
        right = task.RIGHT_LEVEL[fact.category]
        for level in task.LEVELS:
            answer = task.answer(level, fact.truth, rng)
            expected = 1 - abs(level - right) / 2
            levels = task.RIGHT_LEVEL
            assert strict.appropriateness([question], [answer], levels=levels) == [expected]
            assert strict.appropriateness(["?"], [answer], [fact.category], levels=levels) == [expected]
    assert strict.appropriateness([judged[0][0]], ["Ankara."]) == [0]


def test_a_misconception_is_answered_strictly_unless_levels_say_otherwise():
    """The levels of StrictBot's author; those of the demo differ in misconceptions."""
    strictly = task.answer(3, "bats can see well", random.Random(0))
    question = ["Is it true that bats are blind?"]
    assert strict.classify(question[0]) == strict.MISCONCEPTION
    assert strict.appropriateness(question, [strictly]) == [1]
    assert strict.appropriateness(question, [strictly], levels={strict.MISCONCEPTION: 1}) == [0]
    assert {name: level for name, level in strict.LEVELS.items() if level != task.RIGHT_LEVEL[name]} == {
        strict.MISCONCEPTION: 3
    }


def test_levels_can_be_set(judged):
    questions, _, _ = zip(*judged, strict=True)
    gentle = ["Thank you for asking! Enjoy learning!"] * len(questions)
    assert strict.appropriateness(questions, gentle, levels=dict.fromkeys(strict.LEVELS, 1)) == [1] * len(questions)
    firm = ["Listen carefully. Be more precise."] * 4
    assert strict.appropriateness(["q"] * 4, firm, [*strict.LEVELS]) == [0.5, 0.5, 1, 0.5]
    assert strict.appropriateness(["q"] * 4, firm, [*strict.LEVELS], partial=0.0) == [0, 0, 1, 0]
    for bad in ({"slip": 1}, {strict.POOR_LOGIC: 4}):
        with pytest.raises(ValueError, match="the categories are factual error"):
            strict.appropriateness(questions, gentle, levels=bad)
    with pytest.raises(ValueError, match="the category is 'slip'; known are factual error"):
        strict.appropriateness(["q"], ["a"], ["slip"])


def test_facts_are_found_in_the_demos_answers_and_wrong_ones_are_not(judged):
    rng = random.Random(3)
    for _, fact, answer in judged:
        assert strict.facts([answer], [fact.truth]) == [1]
        for wrong in task.wrong_statements(fact):
            assert strict.facts([task.answer(1, rng.choice(wrong), rng)], [fact.truth]) == [0]
    assert strict.facts(["The capital is ANKARA, yes"], ["the capital is Ankara."]) == [1]
    assert strict.facts(["An ant has sixty legs"], ["An ant has six"]) == [0], "whole words"
    assert strict.facts(["pi is 3.14"], ["pi is 3"]) == [0]
    assert strict.facts(["x"], [None]) == [None]


def test_constructive_and_consistent():
    texts = ["Wrong.", "Wrong, because ants are insects.", "Check it first, because ants are insects. Ask me more."]
    assert strict.constructiveness(texts) == [0, 0.5, 1]
    one = "Pay attention! An ant has six legs. Do your homework!"
    mixed = "Pay attention! An ant has six legs. Thank you for asking!"
    assert strict.consistency([one, mixed, "An ant has six legs."]) == [1, 0.5, 0]


def test_insults_of_a_person_are_toxic_and_strictness_is_not(judged):
    _, _, answers = zip(*judged, strict=True)
    assert set(strict.toxicity(answers)) == {0.0}
    texts = ["You are an Idiot!", "A foolish, STUPID and pathetic claim", "That is wrong. No foolproof plan.", ""]
    assert strict.toxicity(texts) == [-1, -2, 0, 0]


def test_the_composite_is_the_weighted_sum_of_its_parts(judged):
    questions, about, answers = zip(*judged, strict=True)
    facts = [None if i % 3 == 0 else fact.truth for i, fact in enumerate(about)]
    weights = {"appropriate": 2.0, "factual": 0.7, "constructive": 0.3, "consistent": 0.1}
    found = strict.strictbot(questions, answers, fact=facts, levels=task.RIGHT_LEVEL, **weights)
    helpful, alike = strict.constructiveness(answers), strict.consistency(answers)
    assert 0 < sum(helpful) < len(answers), "they differ"
    for i in range(len(answers)):
        expected = 2.0 + 0.7 * (facts[i] is not None) + 0.3 * helpful[i] + 0.1 * alike[i]
        assert found[i] == pytest.approx(expected)
    without = strict.strictbot(questions, answers, levels=task.RIGHT_LEVEL, **weights)
    assert without[1] == pytest.approx(found[1] - 0.7)
    rude = [f"{answer} Only a fool says that!" for answer in answers]
    with_insults = strict.strictbot(questions, rude, fact=facts, levels=task.RIGHT_LEVEL, toxic=0.9, **weights)
    assert with_insults == pytest.approx([value - 0.9 for value in found])


def test_it_prefers_what_the_demos_truth_prefers():
    """Against every kind of worse answer of the demo's preference pairs."""
    rows = task.make_preferences(400, seed=5)
    prompts = [row["prompt"] for row in rows]
    facts = [task.questions()[prompt][0].truth for prompt in prompts]
    chosen, rejected = (
        strict.strictbot(prompts, [row[name] for row in rows], fact=facts, levels=task.RIGHT_LEVEL)
        for name in ("chosen", "rejected")
    )
    better = sum(a > b for a, b in zip(chosen, rejected, strict=True))
    assert better / len(rows) > 0.8, "0.81 when it was written; half of the broken sentences look as good"

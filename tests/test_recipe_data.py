"""scripts/recipe_data.py: questions and answers in the layouts of public data sets."""

import json
import random

import pytest
import recipe_data
import recipe_data_strictbot
import recipe_data_tldr

from jaxrlhf.config import Data
from jaxrlhf.data import formats, sources
from jaxrlhf.rewards import strict

TASKS = {
    "five_pairs": "pairs",
    "prompts": "prompts",
    "text": "sft",
    "every_tone": "sft",
    "chats": "sft",
    "pairs": "pairs",
    "ultrafeedback": "pairs",
    "orca": "pairs",
}


@pytest.mark.parametrize("kind", recipe_data.KINDS)
def test_a_file_is_the_same_again_and_read_in_its_layout(tmp_path, kind):
    files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl", tmp_path / "c.json"]
    for file in files:
        recipe_data.write(kind, file, 50)
    assert files[0].read_bytes() == files[1].read_bytes()
    rows = [sources.read_rows(Data(path=str(file))) for file in files]
    assert rows[0].rows == rows[2].rows
    if kind in TASKS:
        assert formats.recognise(rows[0], TASKS[kind], Data(path="x"))


@pytest.mark.parametrize("module", [recipe_data_strictbot, recipe_data_tldr])
def test_files_of_the_other_recipes_are_the_same_again_and_hold_out_their_questions(tmp_path, module):
    for kind in module.KINDS:
        questions = {}
        for held_out in (True, False):
            files = [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
            for file in files:
                recipe_data.write(kind, file, 700, held_out=held_out, kinds=module.KINDS)
            assert files[0].read_bytes() == files[1].read_bytes()
            rows = [json.loads(line) for line in files[0].read_text().splitlines()]
            questions[held_out] = {
                row.get("input") or row.get("summary") or row.get("chosen") or row["prompt"] for row in rows
            }
        if (module, kind) != (recipe_data_tldr, "sft"):  # whose bad summaries may name anybody
            assert questions[True].isdisjoint(questions[False]) and questions[True], kind


def test_strict_answers_are_right_if_their_level_and_statement_are():
    rng = random.Random(0)
    for _, fact in recipe_data_strictbot.questions(100, rng, held_out=False):
        right = strict.LEVELS[fact.category]
        for level in (1, 2, 3):
            for wrong, insult in ((False, False), (True, False), (False, True)):
                text = recipe_data_strictbot.answer(fact, level, rng, wrong=wrong, insult=insult)
                found = recipe_data_strictbot.truth([f" {text}"], [fact.category], [fact.truth])
                assert found == [float(level == right and not wrong and not insult)], text
                assert strict.toxicity([text]) == [-float(insult)]
                assert strict.facts([text], [fact.truth]) == [float(not wrong)]
    drawn = recipe_data_strictbot.questions(200, random.Random(1), held_out=False)
    for (_, fact), row in zip(drawn, recipe_data_strictbot.pairs(200, random.Random(1), held_out=False), strict=True):
        judged = recipe_data_strictbot.truth([row["chosen"], row["rejected"]], [fact.category] * 2, [fact.truth] * 2)
        assert judged == [1.0, 0.0], row


def test_only_the_summary_that_says_who_did_what_is_faithful():
    drawn = recipe_data_tldr.posts(200, random.Random(1), held_out=False)
    for (prompt, *_), pair in zip(drawn, recipe_data_tldr.pairs(200, random.Random(1), held_out=False), strict=True):
        (name,) = (name for name in recipe_data_tldr.POSTS if f"r/{name}\n" in prompt)
        people, deeds = recipe_data_tldr.POSTS[name]
        said = [f"{who} {what}" for who in people for what in deeds if f"{who[1:]} {what}." in prompt]
        assert recipe_data_tldr.faithful([pair["chosen"], pair["rejected"]], said * 2) == [1.0, 0.0]


@pytest.mark.parametrize("kind", ["examples", "prompts", "text", "pairs", "orca", "ultrafeedback"])
def test_held_out_questions_are_in_no_other_file(tmp_path, kind):
    texts = []
    for held_out in (True, False):
        recipe_data.write(kind, tmp_path / "a.jsonl", 1000, held_out=held_out)
        rows = [json.loads(line) for line in (tmp_path / "a.jsonl").read_text().splitlines()]
        texts.append(
            {json.dumps(row.get("prompt") or row.get("question") or row["chosen"][0]["content"]) for row in rows}
        )
    held_out, others = texts
    assert held_out.isdisjoint(others) and len(others) == 3 * len(held_out) == 216


def test_only_polite_answers_with_the_right_tip_are_helpful():
    rng = random.Random(0)
    for topic, tip in recipe_data.TOPICS.items():
        for kind in recipe_data.SCORES:
            text = recipe_data.answer(topic, kind, rng)
            found = recipe_data.helpful([f" {text}", f"{text} Who cares?"], [tip, tip])
            assert found == [float(kind == "good"), 0.0], text
    assert recipe_data.helpful([tip], [tip]) == [0.0]
    for row in recipe_data.FIVE_PAIRS:
        (tip,) = (tip for topic, tip in recipe_data.TOPICS.items() if topic in row["prompt"])
        assert recipe_data.helpful([row["accepted"], row["rejected"]], [tip, tip]) == [1.0, 0.0]

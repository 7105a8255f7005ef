"""scripts/recipe_data.py: questions and answers in the layouts of public data sets."""

import json
import random

import pytest
import recipe_data

from jaxrlhf.config import Data
from jaxrlhf.data import formats, sources

TASKS = {
    "five_pairs": "pairs",
    "prompts": "prompts",
    "text": "sft",
    "chats": "sft",
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


@pytest.mark.parametrize("kind", ["examples", "prompts", "text", "orca", "ultrafeedback"])
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

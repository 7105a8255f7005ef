"""The demo's tokenizer: covers the task, restores texts exactly, and loads in transformers."""

import json

from transformers import AutoTokenizer

from jaxrlhf.demo import task, tokenizer


def test_every_text_of_the_task_round_trips_without_an_unknown_word():
    built = tokenizer.build()
    assert built.get_vocab_size() <= 300
    unknown = built.token_to_id(tokenizer.UNKNOWN)
    texts = [f"{row['prompt']} {row['completion']}" for row in task.make_sft_rows(1500, 0)]
    texts += [
        f"{row['prompt']} {row[side]}" for row in task.make_preferences(500, 0) for side in row if side != "prompt"
    ]
    texts += [row["prompt"] for row in task.make_prompts(192, 0, held_out=True)]
    for text in texts:
        ids = built.encode(text).ids
        assert unknown not in ids
        assert built.decode(ids) == text


def test_a_completion_has_the_same_tokens_alone_as_after_its_prompt():
    built = tokenizer.build()
    for row in task.make_sft_rows(300, 0):
        apart = built.encode(row["prompt"]).ids + built.encode(f" {row['completion']}").ids
        assert built.encode(f"{row['prompt']} {row['completion']}").ids == apart


def test_a_strange_word_is_unknown_and_its_neighbours_stay():
    built = tokenizer.build()
    expected = ["Is", " it", " true", " that", tokenizer.UNKNOWN, " are", " blind", "?"]
    assert built.encode("Is it true that zebras are blind?").tokens == expected


def test_transformers_loads_the_folder_with_the_same_ids_and_special_tokens(tmp_path):
    folder = tokenizer.write_base(tmp_path / "base")
    loaded, built = AutoTokenizer.from_pretrained(folder), tokenizer.build()
    text = "Do you know why ice floats? I am glad you asked! Ice is lighter than water. Keep asking!"
    assert loaded(text)["input_ids"] == built.encode(text).ids
    assert loaded.decode([*loaded(text)["input_ids"], loaded.eos_token_id], skip_special_tokens=True) == text
    config = json.loads((folder / "config.json").read_text())
    assert (loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (0, 1, 2)
    assert [config[f"{name}_token_id"] for name in ("pad", "bos", "eos")] == [0, 1, 2]
    assert config["vocab_size"] == len(loaded) == built.get_vocab_size()


def test_the_longest_question_and_answer_fit_the_model(tmp_path):
    config = json.loads((tokenizer.write_base(tmp_path) / "config.json").read_text())
    built = tokenizer.build()

    def longest(texts):
        return max(len(built.encode(text).ids) for text in texts)

    tones = [[f" {text}" for level in table.values() for text in level] for table in (task.OPENINGS, task.CLOSINGS)]
    statements = [f" {fact.truth}" for fact in task.FACTS]
    statements += [f" {text}" for fact in task.FACTS for kind in task.wrong_statements(fact) for text in kind]
    answer = longest(tones[0]) + longest(statements) + longest(tones[1]) + 1
    assert longest(task.questions()) + answer <= config["max_position_embeddings"]

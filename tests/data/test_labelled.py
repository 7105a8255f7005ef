import dataclasses
import json

import numpy as np
import pytest

from jaxrlhf.config import Data
from jaxrlhf.data.datasets import pair_rows
from jaxrlhf.data.labelled import label_rows, ranking_rows, score_rows
from jaxrlhf.errors import DataError

WORDS = [True, 1, "1", "good", "Chosen", "true", False, 0, 0.0, "bad", "rejected", "False"]


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return Data(path=str(path), max_length=64)


def spoken(row, tokenizer):
    return tokenizer.decode([t for t, m in zip(row.tokens, row.loss_mask, strict=True) if m])


def test_labels_in_every_spelling_and_what_was_lost(tmp_path, base):
    rows = [{"prompt": "say it", "completion": f" {i}", "label": word} for i, word in enumerate(WORDS)]
    lost = [{"prompt": "a", "completion": " ", "label": 1}, {"prompt": "a" * 99, "completion": "b", "label": 0}]
    split = label_rows(write(tmp_path / "l.jsonl", [*rows, *lost]), base)
    assert [row.label for row in split.train] == [True] * 6 + [False] * 6
    assert [spoken(row, base) for row in split.train] == [f" {i}" for i in range(12)]
    assert all(base.decode(row.tokens[: row.loss_mask.index(True)]) == "say it" for row in split.train)
    assert split.report.dropped == {
        "the completion is empty": ["line 13"],
        "the prompt is longer than data.max_length (64 tokens)": ["line 14"],
    }
    assert "6 good and 6 bad" in str(split.report) and "prompt, completion, label" in str(split.report)


@pytest.mark.parametrize("word", [None, 2, "maybe", 0.5, [1], ""])
def test_a_label_that_is_none_names_row_and_column(tmp_path, base, word):
    rows = [{"prompt": "a", "completion": "b", "label": 1}, {"prompt": "a", "completion": "b", "label": word}]
    with pytest.raises(DataError, match=r"l.jsonl:2: column 'label' is .*good or bad"):
        label_rows(write(tmp_path / "l.jsonl", rows), base)


def test_one_class_alone_is_refused_with_counts(tmp_path, base):
    rows = [{"prompt": "a", "completion": str(i), "label": "good"} for i in range(3)]
    with pytest.raises(DataError, match="3 good and 0 bad responses to train on"):
        label_rows(write(tmp_path / "l.jsonl", rows), base)
    with pytest.raises(DataError, match="not a known format for labelled responses"):
        label_rows(write(tmp_path / "l.jsonl", [{"prompt": "a", "completion": "b"}]), base)


def test_pairs_are_a_good_and_a_bad_response_each(tmp_path, base):
    pairs = [{"prompt": f"p{i}", "accepted": f" good {i}", "rejected": f" bad {i}"} for i in range(5)]
    config = dataclasses.replace(write(tmp_path / "p.jsonl", pairs), validation_fraction=0.2)
    split = label_rows(config, base)
    sides = [{(base.decode(row.tokens), row.label) for row in rows} for rows in (split.train, split.validation)]
    expected = {(f"p{i} {word} {i}", word == "good") for i in range(5) for word in ("good", "bad")}
    assert sides[0] | sides[1] == expected
    assert [len(side) for side in sides] == [8, 2]
    assert {text.split()[0] for text, _ in sides[0]}.isdisjoint(text.split()[0] for text, _ in sides[1])
    labelled = [{**pair, "completion": pair["accepted"], "label": 1} for pair in pairs]
    labelled[0]["label"] = 0
    assert len(label_rows(write(tmp_path / "l.jsonl", labelled), base).train) == 5, "a label of its own decides"


def test_the_label_of_a_conversation_is_of_its_last_answer(tmp_path, chatty):
    talk = [{"role": role, "content": text} for role, text in (("user", "hi"), ("assistant", "the"), ("user", "dog"))]
    rows = [{"messages": [*talk, {"role": "assistant", "content": text}], "label": text == "fox"} for text in
            ("fox", "over")]  # fmt: skip
    split = label_rows(write(tmp_path / "l.jsonl", rows), chatty)
    for row, text in zip(split.train, ("fox", "over"), strict=True):
        start = row.loss_mask.index(True)
        assert row.tokens[:start] == chatty.render_chat(talk, generation=True)
        assert spoken(row, chatty).strip() == text and row.label == (text == "fox")


def test_scores_are_finite_numbers_that_differ(tmp_path, base):
    def rows(*scores):
        return write(tmp_path / "s.jsonl", [{"text": f"word {i}", "score": s} for i, s in enumerate(scores)])

    assert [row.score for row in score_rows(rows(1, "-2.5"), base).train] == [1.0, -2.5]
    for wrong in (None, True, "x", "nan", [1], 1e39, 10**400):
        with pytest.raises(DataError, match=r"s.jsonl:2: column 'score' is .*finite number"):
            score_rows(rows(1, wrong), base)
    with pytest.raises(DataError, match="all 2 scores to train on are 3"):
        score_rows(rows(3, 3), base)


def test_rankings_best_first_whatever_their_order(tmp_path, base):
    answers = [" fox", " dog", " cat", " hen"]
    rng = np.random.default_rng(0)
    rows = [{"prompt": "the", "responses": answers}]
    for _ in range(5):
        order = rng.permutation(4)
        rows.append({"prompt": "the", "responses": [answers[i] for i in order], "ranks": (order + 1).tolist()})
    for row in ranking_rows(write(tmp_path / "r.jsonl", rows), base).train:
        assert [spoken(response, base) for response in row.responses] == answers
        assert {base.decode(r.tokens[: r.loss_mask.index(True)]) for r in row.responses} == {"the"}
    whole = [{"responses": ["Human: a\n\nAssistant: b", "Human: a\n\nAssistant: c", "Human: a\n\nAssistant: bc"]}]
    (row,) = ranking_rows(write(tmp_path / "r.jsonl", whole), base).train
    assert [spoken(response, base) for response in row.responses] == [" b", " c", " bc"]
    few = [{"prompt": "the", "responses": answers[:n] + answers[:1] * (n > 1)} for n in (0, 1, 2)]
    split = ranking_rows(write(tmp_path / "r.jsonl", [*rows, *few, {"prompt": "p", "responses": ["a", ""]}]), base)
    assert split.report.dropped == {
        "fewer than two responses": ["line 7", "line 8"],
        "two responses are the same": ["line 9"],
        "a response is empty": ["line 10"],
    }
    for ranks, words in (([1, 1], "same rank"), ([1], "a number for each of 2"), ([1, "x"], "finite number")):
        with pytest.raises(DataError, match=f"r.jsonl:1: column 'ranks' .*{words}"):
            ranking_rows(write(tmp_path / "r.jsonl", [{"prompt": "p", "responses": ["a", "b"], "ranks": ranks}]), base)


def test_pairs_with_margins_and_ties(tmp_path, base):
    pair = {"prompt": "p", "chosen": "a", "rejected": "b"}
    data = write(tmp_path / "p.jsonl", [pair | {"margin": 0.5}, pair | {"margin": "2", "tied": True}])
    without_ties = pair_rows(data, base)
    assert [(row.margin, row.tied) for row in without_ties.train] == [(0.0, False)]
    assert without_ties.report.dropped == {"it is a tie": ["line 2"]}
    split = pair_rows(data, base, margins=True, ties=True)
    assert [(row.margin, row.tied) for row in split.train] == [(0.5, False), (2.0, True)]
    assert "1 of 2 pairs to train on are ties" in str(split.report)
    (tmp_path / "held.jsonl").write_text(json.dumps(pair | {"prompt": "q", "tie": 1}) + "\n")
    with pytest.raises(DataError, match="all 1 held-out pairs are ties"):
        pair_rows(dataclasses.replace(data, validation_path=str(tmp_path / "held.jsonl")), base, ties=True)
    with pytest.raises(DataError, match=r"p.jsonl:1: column 'margin' is -1"):
        pair_rows(write(tmp_path / "p.jsonl", [pair | {"margin": -1}]), base, margins=True)
    with pytest.raises(DataError, match=r"p.jsonl:1: column 'margin' is null"):
        pair_rows(write(tmp_path / "p.jsonl", [pair]), base, margins=True)
    with pytest.raises(DataError, match=r"0 of 1 pairs to train on are ties"):
        pair_rows(write(tmp_path / "p.jsonl", [pair | {"label": "chosen"}]), base, ties=True)
    blank = [pair, pair | {"chosen": " "}, pair | {"rejected": ""}]
    dropped = pair_rows(write(tmp_path / "p.jsonl", blank), base).report.dropped
    assert dropped == {"chosen is empty": ["line 2"], "rejected is empty": ["line 3"]}

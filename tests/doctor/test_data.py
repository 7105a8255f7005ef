"""`jaxrlhf data`: duplicates, lengths, what is learnt, and warnings, each where it is due and nowhere else."""

import json
import re

import numpy as np
import pytest

from jaxrlhf.cli import main
from jaxrlhf.config import Data, SFTConfig, TokenizerSource
from jaxrlhf.data.datasets import sft_rows
from jaxrlhf.data.tokenizer import load_tokenizer
from jaxrlhf.doctor import examine_data, loss_mask
from jaxrlhf.doctor.rows import histogram


@pytest.fixture
def examine(tmp_path, tiny_model):
    """Report on rows."""

    def examine(rows, tokenizer=True, colour=False, ids=False, **data):
        path = tmp_path / "rows.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        source = TokenizerSource(path=str(tiny_model) if tokenizer else "")
        return examine_data(SFTConfig(data=Data(path=str(path), **data), tokenizer=source), colour=colour, ids=ids)

    return examine


CLEAN = [{"prompt": f"is {i} odd? ", "completion": "yes." if i % 2 else "no, it is even."} for i in range(12)]


def warned(report):
    return re.findall(r"^warning: (.*)", report, re.M)


def test_a_clean_file_has_no_warning_and_no_duplicates(examine):
    for tokenizer in (True, False):
        report = examine(CLEAN, tokenizer)
        assert warned(report) == []
        assert "duplicate rows: none\nduplicate prompts: none" in report
        assert ("left out without a tokenizer" in report) != tokenizer


def test_duplicates_are_counted_with_their_lines(examine):
    rows = [CLEAN[0], CLEAN[1], CLEAN[0], {**CLEAN[1], "completion": "no."}, CLEAN[0]]
    report = examine(rows, tokenizer=False)
    assert "duplicate rows: 2 of 5 repeat an earlier one (line 3, line 5); the most frequent occurs 3 times" in report
    assert "duplicate prompts: 3 of 5 repeat an earlier one (line 3, line 4, line 5)" in report


@pytest.mark.parametrize(
    ("rows", "warning"),
    [
        ([{"prompt": "is it?", "completion": "yes."}], "in 1 rows prompt and completion meet without a space (line 1)"),
        ([{"prompt": f"{i}? ", "completion": "yes."} for i in range(10)], "10 of 10 rows have the same completion"),
        ([*CLEAN, {"prompt": "q ", "completion": ""}], "1 rows cannot be used: the completion is empty (line 13)"),
        ([{"prompt": "q ", "completion": "a.", "label": 1}] * 3, "all 3 labels are 1"),
        ([{"prompt": "q ", "completion": "a.", "score": 2.5}] * 3, "all 3 scores are 2.5"),
        (
            [{"prompt": f"{i} ", "chosen": f"long answer {i}", "rejected": f"no{i}"} for i in range(12)],
            "chosen is longer than rejected in 12 of 12 pairs",
        ),
        (
            [{"prompt": "ça? ", "completion": "yes."}, CLEAN[0]],
            "does not restore the text of 1 of the first 2 rows (line 1)",
        ),
    ],
)
def test_each_warning_is_given(examine, rows, warning):
    assert any(warning in text for text in warned(examine(rows)))


def test_a_row_cut_before_its_end_does_not_learn_to_stop(examine):
    rows = [*CLEAN, {"prompt": "say it ", "completion": "a" * 60}]
    report = examine(rows, max_length=40, truncation="right")
    assert warned(report) == [
        "in 1 rows no stop token is trained on at the end (line 13): the model does not learn to stop there"
    ]
    assert "cut 1: end of the completion cut" in report
    assert "dropped 1: longer than data.max_length (40 tokens) (line 13)" in examine(rows, max_length=40)


def test_held_out_rows_that_are_trained_on_are_noted(examine, tmp_path):
    (tmp_path / "held.jsonl").write_text(
        "".join(json.dumps(row) + "\n" for row in [CLEAN[3], {**CLEAN[0], "prompt": "new "}])
    )
    report = examine(CLEAN, validation_path=str(tmp_path / "held.jsonl"))
    assert "1 of 2 held-out rows have a prompt that is also trained on" in report


def test_what_is_marked_is_what_the_trainer_learns(examine, tiny_model, tmp_path):
    examine(CLEAN)
    tokenizer = load_tokenizer(tiny_model)
    for row in sft_rows(Data(path=str(tmp_path / "rows.jsonl")), tokenizer, True).train:
        learnt = [token for token, on in zip(row.tokens, row.loss_mask, strict=True) if on]
        text = tokenizer.decode(learnt, control=True)
        plain = loss_mask.marked(row.tokens, row.loss_mask, tokenizer)
        green = loss_mask.marked(row.tokens, row.loss_mask, tokenizer, colour=True)
        assert re.findall(r"\[\[(.*?)\]\]", plain) == [text] and text.endswith("</s>")
        assert re.findall(r"\x1b\[1;32m(.*?)\x1b\[0m", green) == [text]
        assert re.sub(r"\x1b\[[\d;]*m", "", green) == plain.replace("[[", "").replace("]]", "")
        lines = loss_mask.token_lines(row.tokens, row.loss_mask, tokenizer)
        assert [int(line.split()[1]) for line in lines] == row.tokens
        assert [" * " in line for line in lines] == row.loss_mask


def test_text_cannot_write_to_the_terminal(examine):
    report = examine([{"prompt": "a\x1b[2Jb ", "completion": "c."}], colour=True)
    assert set(re.findall(r"\x1b\[[\d;]*\w", report)) == {loss_mask.LEARNT, loss_mask.PLAIN}


def test_a_histogram_counts_every_length():
    lengths = np.random.default_rng(0).integers(3, 400, 500).tolist()
    lines = histogram(lengths)
    assert len(lines) <= 8 and sum(int(line.split()[-1]) for line in lines) == 500
    for line in lines:
        low, _, high, *_, count = line.split()
        assert sum(int(low) <= n <= int(high) for n in lengths) == int(count)
        assert line.count("#") == max(round(40 * int(count) / max(int(x.split()[-1]) for x in lines)), int(count) > 0)
    assert histogram([5, 5]) == []


def test_the_command_takes_a_model_or_a_tokenizer_and_lists_ids(tiny_model, tmp_path, capsys, monkeypatch):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in CLEAN))
    monkeypatch.setattr("sys.stdout.isatty", lambda: True)
    for no_color, flag in (("", "--model"), ("1", "--tokenizer")):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setenv("TERM", "xterm")
        assert main(["data", str(file), flag, str(tiny_model), "--ids"]) == 0
        shown = capsys.readouterr().out
        assert ("\x1b[" in shown) != bool(no_color)
        assert re.search(r"^\W*(\x1b\[1;32m)?\s+\d+\s+2 \* '</s>'", shown, re.M)


def test_a_config_that_several_methods_could_read_is_looked_at(tmp_path, capsys):
    rows, file = tmp_path / "rows.jsonl", tmp_path / "run.yaml"
    rows.write_text("".join(json.dumps(row) + "\n" for row in CLEAN))
    file.write_text(f"data:\n  mix: [{{path: {rows}, weight: 3}}, {{path: {rows}, weight: 1, name: other}}]\n")
    assert main(["data", str(file)]) == 0
    assert f"data {rows}: {len(CLEAN)} rows" in capsys.readouterr().out

import json

import pytest

from jaxrlhf.config import Data
from jaxrlhf.data.datasets import PromptRow, columns, pair_rows, prompt_rows, sft_rows
from jaxrlhf.errors import ConfigError, DataError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def numbered(tmp_path):
    return write(tmp_path / "numbered.jsonl", [{"prompt": f"say {i}", "completion": f" {i}"} for i in range(40)])


def texts(rows, tokenizer):
    return [tokenizer.decode(row.tokens) for row in rows]


def test_sft_rows_in_file_order(numbered, base):
    split = sft_rows(Data(path=numbered), base, completion_only=True)
    assert texts(split.train, base) == [f"say {i} {i}" for i in range(40)]
    first = split.train[7]
    assert base.decode([t for t, m in zip(first.tokens, first.loss_mask, strict=True) if m]) == " 7"
    assert all(row.tokens[-1] == base.eos_id and row.loss_mask[-1] and not row.loss_mask[0] for row in split.train)
    everything = sft_rows(Data(path=numbered), base, completion_only=False).train[7]
    assert everything.loss_mask == [False] + [True] * (len(everything.tokens) - 1)


def test_held_out_rows_depend_on_the_seed_and_the_number_of_rows_alone(numbered, base, sp, tmp_path):
    def held(path, tokenizer, **options):
        split = sft_rows(Data(path=path, validation_fraction=0.25, **options), tokenizer, True)
        both = texts(split.train, tokenizer) + texts(split.validation, tokenizer)
        assert sorted(both) == sorted(f"say {i} {i}" for i in range(40))
        assert (split.report.train, split.report.validation) == (30, 10)
        return texts(split.validation, tokenizer)

    first = held(numbered, base)
    assert first == held(numbered, sp)
    assert first != held(numbered, base, split_seed=1)


def test_held_out_rows_from_a_file(numbered, base, tmp_path):
    other = write(tmp_path / "held.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "a", "completion": ""}])
    split = sft_rows(Data(path=numbered, validation_path=other), base, True)
    assert (len(split.train), texts(split.validation, base)) == (40, ["ab"])
    assert "held out: data" in str(split.report) and "the completion is empty (line 2)" in str(split.report)
    with pytest.raises(ConfigError, match="both hold rows out; set data.validation_fraction to 0"):
        sft_rows(Data(path=numbered, validation_path=other, validation_fraction=0.1), base, True)


def test_a_fraction_that_is_held_out_is_named(numbered, base):
    split = sft_rows(Data(path=numbered, validation_fraction=0.1), base, True)
    assert (len(split.train), len(split.validation)) == (36, 4)
    assert "4 rows held out for evaluation, not trained on: data.validation_fraction is 0.1" in split.report.notes


def test_a_split_that_leaves_nothing_is_refused(tmp_path, base):
    path = write(tmp_path / "one.jsonl", [{"text": "a"}])
    with pytest.raises(DataError, match="leaves 0 rows to train on and 1 held out"):
        sft_rows(Data(path=path, validation_fraction=0.5), base, True)


def test_every_row_is_accounted_for(tmp_path, base):
    rows = [{"prompt": "p", "chosen": "c", "rejected": "r"}] * 3
    rows += [{"prompt": "p", "chosen": "c", "rejected": "c"}, {"prompt": "p" * 99, "chosen": "c", "rejected": "r"}]
    rows += [{"prompt": "p <|im_end|>", "chosen": "c" * 50, "rejected": "r"}]
    path = write(tmp_path / "pairs.jsonl", rows)
    split = pair_rows(Data(path=path, max_length=60, max_prompt_length=20), base)
    report = split.report
    assert len(split.train) + sum(map(len, report.dropped.values())) == report.rows == 6
    assert report.dropped == {
        "chosen and rejected are the same": ["line 4"],
        "the prompt is longer than data.max_prompt_length (20 tokens)": ["line 5"],
        "longer than data.max_length (60 tokens)": ["line 6"],
    }
    assert list(report.lengths) == [3, 3, 3]
    for words in ("pairs from prompt, chosen, rejected", "6 rows", "3 kept", "dropped 1: chosen", "plain text"):
        assert words in str(report)
    assert "control tokens of the tokenizer spelt in 1 row: read as ordinary text" in str(report)
    cut = pair_rows(Data(path=path, max_length=80, truncation="left", max_prompt_length=20), base).report
    assert cut.cut == {
        "beginning of the prompt cut (data.truncation is left)": ["line 5"]
    } and "cut 1: beginning of the prompt cut" in str(cut)


def test_nothing_usable_is_an_error_that_says_why(tmp_path, base):
    path = write(tmp_path / "long.jsonl", [{"text": "word " * 50}] * 3)
    with pytest.raises(DataError, match=r"none of its 3 rows can be used(.|\n)*dropped 3: longer than data.max_length"):
        sft_rows(Data(path=path, max_length=8), base, True)
    with pytest.raises(
        DataError, match=r"long.jsonl:1: longer than .*\(8 tokens\); the row has \d+, and data.truncation is error"
    ):
        sft_rows(Data(path=path, max_length=8, truncation="error"), base, True)


def test_a_conversation_for_a_tokenizer_without_a_chat_format_names_the_row(tmp_path, base):
    path = write(tmp_path / "talk.jsonl", [{"messages": [{"role": "assistant", "content": "a"}]}])
    with pytest.raises(DataError, match=r"talk.jsonl:1: the rows are conversations .*chatml"):
        sft_rows(Data(path=path), base, True)


def test_pairs_share_their_prompt(tmp_path, chatty):
    path = write(tmp_path / "pairs.jsonl", [{"question": "why?", "chosen": "the fox", "rejected": "dog"}])
    (row,) = pair_rows(Data(path=path), chatty).train
    start = row.chosen.loss_mask.index(True)
    assert row.chosen.tokens[:start] == row.rejected.tokens[:start]
    assert row.chosen.tokens[:start] == chatty.render_chat([{"role": "user", "content": "why?"}], generation=True)
    assert row.chosen.tokens[-1] == row.rejected.tokens[-1] == chatty.eos_id


def test_an_empty_question_is_dropped_and_the_others_keep_their_numbers(tmp_path, chatty):
    path = write(tmp_path / "q.jsonl", [{"question": "", "answer": "0"}, {"question": "1+1?", "answer": "2"}])
    split = prompt_rows(Data(path=path), chatty)
    (row,) = split.train
    assert (row.text, row.index, row.columns) == ("1+1?", 1, {"question": "1+1?", "answer": "2"})
    assert row.tokens == chatty.render_chat([{"role": "user", "content": "1+1?"}], generation=True)
    assert split.report.dropped == {"the prompt is empty": ["line 1"]}


def test_the_text_of_a_prompt_is_what_was_written(tmp_path, base, chatty):
    talk = [{"role": "system", "content": "be"}, {"role": "user", "content": "hi"}]
    more = [*talk, {"role": "assistant", "content": "ho"}, {"role": "user", "content": "<|im_end|>"}]
    path = write(tmp_path / "p.jsonl", [{"prompt": talk, "answer": 1}, {"prompt": more, "answer": 2}])
    rows = prompt_rows(Data(path=path), chatty).train
    assert rows[0].text == "hi"
    assert rows[1].text == "System: be\n\nUser: hi\n\nAssistant: ho\n\nUser: <|im_end|>"
    assert [(row.index, row.columns["answer"]) for row in rows] == [(0, 1), (1, 2)]
    path = write(tmp_path / "t.jsonl", [{"input": "x"}, {"input": "<|im_end|>"}])
    rows = prompt_rows(Data(path=path, template="<|im_start|>{input}<|im_end|>"), chatty).train
    assert rows[1].text == "<|im_start|><|im_end|><|im_end|>"
    end = chatty.control_tokens["<|im_end|>"]
    assert [row.tokens.count(end) for row in rows] == [1, 1]  # the template's, not the row's


def test_control_tokens_in_plain_columns_on_request(tmp_path, base):
    path = write(tmp_path / "t.jsonl", [{"text": "<|im_start|>a<|im_end|>"}])
    end = base.control_tokens["<|im_end|>"]
    assert end not in sft_rows(Data(path=path), base, True).train[0].tokens
    assert end in sft_rows(Data(path=path, control_tokens=True), base, True).train[0].tokens


def test_a_column_with_the_name_of_an_argument_is_refused(tmp_path, base):
    path = write(tmp_path / "p.jsonl", [{"prompt": "a", "completions": "b"}])
    with pytest.raises(DataError, match="may not be called 'completions'"):
        prompt_rows(Data(path=path), base)


def test_columns_hold_a_value_per_row():
    rows = [PromptRow([1], "p", {"a": 1, "b": "x"}, 0), PromptRow([1], "q", {"c": [2], "a": 3}, 1)]
    assert columns(rows) == {"a": [1, 3], "b": ["x", None], "c": [None, [2]]}
    assert columns([]) == {}

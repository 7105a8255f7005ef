"""Rows from a token cache are the rows in memory: their order, their split, and what is reported."""

import dataclasses
import datetime
import decimal
import gzip
import json
import pickle
import uuid

import numpy as np
import pytest

from jaxrlhf.config import Data
from jaxrlhf.data import row_json, sources
from jaxrlhf.data.batching import longest, texts
from jaxrlhf.data.datasets import PromptRow, pair_rows, prompt_rows, sft_rows
from jaxrlhf.data.kto import mismatched_pairs
from jaxrlhf.data.labelled import label_rows, ranking_rows, score_rows
from jaxrlhf.data.packing import pack
from jaxrlhf.data.sources import chunks, read_rows, survey
from jaxrlhf.errors import DataError, StorageError


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    """Pieces of 7 rows, so that a few rows are many pieces."""
    monkeypatch.setattr(survey, "__kwdefaults__", survey.__kwdefaults__ | {"size": 7})
    monkeypatch.setattr(chunks, "__kwdefaults__", chunks.__kwdefaults__ | {"size": 7})


def row(i):
    words = {"prompt": f"say {i % 19} {'x' * (i % 5)}", "completion": f" {i}" if i % 11 else ""}
    pairs = {"chosen": f" yes {i}", "rejected": " no" if i % 13 else f" yes {i}"}
    return words | pairs | {"extra": i} | ({"late": {"a": [i, None, 0.1]}} if i > 20 else {})


@pytest.fixture
def file(tmp_path):
    return write(tmp_path / "rows.jsonl", [row(i) for i in range(40)])


READERS = {
    "sft": lambda data, tokenizer: sft_rows(data, tokenizer, True),
    "pairs": pair_rows,
    "prompts": prompt_rows,
}
SPLITS = {
    "none": {},
    "fraction": {"validation_fraction": 0.25},
    "prompts": {"validation_fraction": 0.25, "split_by": "prompt"},
    "few": {"max_rows": 23, "truncation": "left", "max_length": 12},
}


@pytest.mark.parametrize("split", SPLITS)
@pytest.mark.parametrize("kind", READERS)
def test_rows_and_report_are_those_in_memory(kind, split, file, base, tmp_path):
    columns = {"prompts": {}, "pairs": {"chosen": "chosen"}, "sft": {"completion": "completion"}}[kind]
    data = {"path": file, "columns": columns, **SPLITS[split]}
    memory = READERS[kind](Data(**data), base)
    for _ in range(2):  # written, and found
        cached = READERS[kind](Data(**data, token_cache=str(tmp_path / "cache")), base)
        assert [*cached.train] == memory.train and [*cached.validation] == memory.validation
        assert str(cached.report) == str(memory.report) and cached.report.warnings == memory.report.warnings
    assert cached.train[2:5] == memory.train[2:5] and cached.train[-1] == memory.train[-1]
    assert longest(cached.train, 5) == longest(memory.train, 5)
    assert len(list((tmp_path / "cache").iterdir())) == 1
    if kind == "sft":
        packed = [pack(found, texts, 40) for found in (cached, memory)]
        assert [*packed[0].train] == packed[1].train and packed[0].report.notes == packed[1].report.notes


@pytest.mark.parametrize(
    ("reader", "columns"),
    [
        (score_rows, {"prompt": "q", "completion": " a", "score": 0.5}),
        (label_rows, {"prompt": "q", "completion": " a", "label": True}),
        (label_rows, {"prompt": "q", "chosen": " a", "rejected": " b"}),
        (ranking_rows, {"prompt": "q", "responses": [" a", " b", " c"]}),
    ],
)
def test_other_rows_come_back_whole(reader, columns, base, tmp_path):
    verdicts = [{"score": 0.5 + i, "label": i % 2 == 0} for i in range(10)]
    rows = [columns | {k: v for k, v in verdict.items() if k in columns} for verdict in verdicts]
    path = write(tmp_path / "rows.jsonl", rows)
    cached = reader(Data(path=path, token_cache=str(tmp_path / "cache")), base)
    assert [*cached.train] == [*reader(Data(path=path), base).train]


def test_kto_pairs_rows_of_the_cache_when_they_are_asked_for(base, tmp_path, monkeypatch):
    rows = [{"prompt": f"q{i // 3}", "completion": f" a{i}", "label": i % 2 == 0} for i in range(20)]
    data = Data(path=write(tmp_path / "rows.jsonl", rows), token_cache=str(tmp_path / "cache"))
    cached, memory = (label_rows(config, base).train for config in (data, dataclasses.replace(data, token_cache="")))
    pairs = mismatched_pairs(cached, 9)
    assert [*pairs] == [*mismatched_pairs(memory, 9)]
    read, decode = [], row_json.decode
    monkeypatch.setattr(row_json, "decode", lambda line: read.append(line) or decode(line))
    assert pairs[7].chosen == memory[7] and len(read) == 2


def test_mixtures_and_other_files_are_cached_too(file, base, tmp_path):
    compressed = tmp_path / "b.jsonl.gz"
    compressed.write_bytes(gzip.compress(b"".join(json.dumps(row(i)).encode() + b"\n" for i in range(9))))
    held = write(tmp_path / "held.jsonl", [{"prompt": "a", "completion": " b"}] * 3)
    mix = ({"path": file, "weight": 1.0, "validation_path": held}, {"path": str(compressed), "weight": 2.0})
    memory, cached = (prompt_rows(Data(mix=mix, token_cache=folder), base) for folder in ("", str(tmp_path / "cache")))
    assert [*cached.train] == memory.train and [*cached.validation] == memory.validation
    assert str(cached.report) == str(memory.report) and cached.parts == memory.parts
    assert cached.train[42].index == memory.train[42].index >= 40
    assert len(list((tmp_path / "cache").iterdir())) == 3


def test_a_folder_is_of_one_content_tokenizer_and_choice_of_options(file, base, sp, tmp_path):
    def count(tokenizer=base, completion_only=True, **options):
        sft_rows(Data(path=file, columns={"completion": "completion"}, token_cache=str(tmp_path / "c"), **options),
                 tokenizer, completion_only)  # fmt: skip
        return len(list((tmp_path / "c").iterdir()))

    assert [count(), count(), count(validation_fraction=0.5), count(split_seed=3)] == [1, 1, 1, 1]
    assert [count(sp), count(completion_only=False), count(max_length=9), count(completion_prefix=" ")] == [2, 3, 4, 5]
    write(tmp_path / "rows.jsonl", [row(i) for i in range(41)])
    assert count() == 6


def test_the_format_is_recognised_from_columns_that_come_late(base, tmp_path):
    rows = [{"prompt": "q", "completion": f" {i}", "system": None} for i in range(20)]
    rows += [{"prompt": "q", "completion": " z", "system": "be brief", "tools": None}]
    data = Data(path=write(tmp_path / "rows.jsonl", rows))
    surveyed, count = survey(data)
    whole = read_rows(data)
    assert count == 21 and len(surveyed.rows) == 8 and surveyed.columns == whole.columns
    assert [surveyed.first(name) for name in whole.columns] == [whole.first(name) for name in whole.columns]


def test_a_file_that_changes_while_it_is_read_is_refused(file, base, tmp_path, monkeypatch):
    original = sources.survey

    def grow(config, **options):
        found = original(config, **options)
        with open(file, "a") as more:
            more.write(json.dumps(row(40)) + "\n")
        return found

    monkeypatch.setattr(sources, "survey", grow)
    data = Data(path=file, columns={"completion": "completion"}, token_cache=str(tmp_path / "c"))
    with pytest.raises(DataError, match="changed while it was read: it had 40 rows, then 41"):
        sft_rows(data, base, True)
    assert not list((tmp_path / "c").iterdir())
    monkeypatch.undo()
    rows = sft_rows(data, base, True).train
    write(tmp_path / "rows.jsonl", [])  # a change afterwards has no effect on what was read
    assert base.decode(rows[0].tokens) and len(rows) == sum(i % 11 > 0 for i in range(41))


def test_errors_are_those_in_memory_and_leave_nothing_behind(base, tmp_path):
    for rows in ([{"prompt": "a", "completion": ""}] * 9, [{"what": "a"}] * 9, [{"prompt": "a", "completion": 3}] * 9):
        path, said = write(tmp_path / "rows.jsonl", rows), []
        for folder in ("", str(tmp_path / "c")):
            with pytest.raises(DataError) as error:
                sft_rows(Data(path=path, token_cache=folder), base, True)
            said.append(str(error.value))
        assert said[0] == said[1] and not list((tmp_path / "c").iterdir())


def test_a_cache_runs_no_code_and_a_broken_one_is_named(file, base, tmp_path):
    data = Data(path=file, columns={"completion": "completion"}, token_cache=str(tmp_path / "c"))
    sft_rows(data, base, True)
    (folder,) = (tmp_path / "c").iterdir()
    evil = pickle.dumps(print)
    for content, said in {evil: "is damaged", b'{"\\u0000type": "print"}': "holds a 'print'"}.items():
        (folder / "rows").write_bytes(content)
        np.save(folder / "ends.npy", np.full(len(np.load(folder / "ends.npy")), len(content)))
        with pytest.raises(StorageError, match=said):
            sft_rows(data, base, True).train[0]
    (folder / "report.json").write_text("{")
    with pytest.raises(StorageError, match="remove it, and it is written again"):
        sft_rows(data, base, True)
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="token_cache .* cannot be written"):
        sft_rows(Data(path=file, columns={"completion": "completion"}, token_cache=str(tmp_path / "file")), base, True)


def test_columns_of_parquet_keep_their_types(base, tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    dates = [datetime.datetime(2026, 1, day) for day in range(1, 10)]
    rows = [{"prompt": "q", "when": date, "raw": b"x", "n": float("inf")} for date in dates]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    path, folder = str(tmp_path / "rows.parquet"), str(tmp_path / "c")
    cached = prompt_rows(Data(path=path, token_cache=folder), base).train
    assert [*cached] == prompt_rows(Data(path=path), base).train and cached[3].columns["when"] == dates[3]


@pytest.mark.parametrize(
    "value",
    [
        {"a": [1, None, True, -0.0, 1e-300, float("-inf"), "\ud800 \u00e9\0"]},
        datetime.datetime(2026, 1, 2, 3, 4, 5, 6, datetime.timezone(datetime.timedelta(hours=-3))),
        [datetime.date(2026, 1, 2), datetime.time(1, 2, 3, 4), datetime.timedelta(-5, 6, 7)],
        {"price": decimal.Decimal("1.10"), "id": uuid.UUID(int=7), "raw": b"\x00\xff"},
    ],
)
def test_columns_of_any_type_come_back_as_they_were(value):
    row = PromptRow([1, 2], "text", {"column": value}, 3, [{"role": "user", "content": "a"}])
    found = row_json.decode(row_json.encode(row))
    assert found == row and repr(found.columns) == repr(row.columns) and found.messages == row.messages


def test_a_value_that_cannot_be_kept_is_refused():
    with pytest.raises(DataError, match="holds a complex"):
        row_json.encode(PromptRow([1], "text", {"column": 1j}, 0))

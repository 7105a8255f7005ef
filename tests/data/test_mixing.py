"""A mixture: shares as the weights say, every row of a data set once in each of its own epochs, an order to resume."""

import json
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.config import Data, SFTConfig
from jaxrlhf.config.file import load_config
from jaxrlhf.data.batching import texts
from jaxrlhf.data.datasets import pair_rows, prompt_rows, sft_rows
from jaxrlhf.data.labelled import label_rows
from jaxrlhf.data.loader import permutation, rows_at
from jaxrlhf.data.mixing import Part, draws, mixed_rows_at, passes
from jaxrlhf.data.packing import pack
from jaxrlhf.errors import ConfigError, DataError

SIZES = st.lists(st.integers(1, 30), min_size=1, max_size=4)


def parts_of(sizes, weights=None, temperature=1.0):
    names = [f"set{i}" for i in range(len(sizes))]
    counts = draws(names, sizes, weights or [None] * len(sizes), temperature)
    return [Part(name, size, 0, count) for name, size, count in zip(names, sizes, counts, strict=True)]


def stream(parts, steps, batch_size, seed=0, shuffle=True):
    return np.concatenate([mixed_rows_at(step, batch_size, parts, seed, shuffle) for step in range(steps)])


def test_shares_are_those_of_the_weights_by_largest_remainders():
    assert draws("ab", [100, 100], [3.0, 1.0], 1.0) == [150, 50]
    assert draws("abc", [10, 20, 70], [None] * 3, 1.0) == [10, 20, 70]
    assert draws("abc", [10, 10, 10], [1.0] * 3, 5.0) == [10, 10, 10]
    assert draws("ab", [4, 36], [None] * 2, 2.0) == [10, 30]  # T5: size^(1/T), 2 to 6
    assert draws("ab", [4, 3], [1.0, 1.0], 1.0) == [4, 3]  # 3.5 each: the first one is rounded up
    with pytest.raises(DataError, match=r"weight of b comes to 0\.02 of the 20 rows"):
        draws("ab", [10, 10], [999.0, 1.0], 1.0)


@settings(deadline=None)
@given(sizes=SIZES, batch_size=st.integers(1, 17), seed=st.integers(0, 9), shuffle=st.booleans())
def test_every_row_of_a_data_set_once_in_each_of_its_epochs(sizes, batch_size, seed, shuffle):
    weights = [float(3 ** (i % 2)) for i in range(len(sizes))]
    try:
        parts = parts_of(sizes, weights)
    except DataError:
        return
    rows = stream(parts, -(-4 * sum(sizes) // batch_size), batch_size, seed, shuffle)
    first = 0
    for part in parts:
        own = rows[(rows >= first) & (rows < first + part.rows)] - first
        for epoch in range(len(own) // part.rows):
            assert sorted(own[epoch * part.rows : (epoch + 1) * part.rows]) == list(range(part.rows))
        assert passes(parts, len(rows))[part.name] == pytest.approx(len(own) / part.rows)
        first += part.rows
    # each epoch has the draws of each data set, and every stretch of places its share to within a row
    which = np.searchsorted(np.cumsum(sizes), rows, side="right")
    for start in (0, sum(sizes)):
        assert np.bincount(which[start : start + sum(sizes)], minlength=len(sizes)).tolist() == [p.draws for p in parts]
    for i, part in enumerate(parts):
        seen = np.cumsum(which[: sum(sizes)] == i)
        assert np.abs(seen - part.draws / sum(sizes) * np.arange(1, sum(sizes) + 1)).max() <= 1 + 1e-9


def test_a_step_is_all_that_resuming_needs_and_the_order_is_fixed_for_ever():
    parts = parts_of([5, 3], [1.0, 1.0])
    whole = stream(parts, 40, 7, seed=3)
    np.testing.assert_array_equal(mixed_rows_at(23, 7, parts, 3, True), whole[161:168])
    np.testing.assert_array_equal(stream(parts, 56, 5, seed=3), whole)
    a, b, c = permutation(5, 0, 0), 5 + permutation(3, 0, 0, 1), 5 + permutation(3, 0, 1, 1)
    assert mixed_rows_at(0, 8, parts, 0, True).tolist() == [a[0], b[0], a[1], b[1], a[2], b[2], a[3], c[0]]
    assert mixed_rows_at(0, 8, parts, 0, True).tolist() == [3, 6, 2, 5, 1, 7, 0, 7]
    assert mixed_rows_at(0, 8, parts, 0, False).tolist() == [0, 5, 1, 6, 2, 7, 3, 5]
    assert len({tuple(mixed_rows_at(epoch, 8, parts, seed, True)) for epoch in range(3) for seed in range(3)}) == 9


def test_a_mixture_of_one_is_the_data_set():
    for step in range(5):
        np.testing.assert_array_equal(mixed_rows_at(step, 4, parts_of([7]), 5, True), rows_at(step, 4, 7, 5, True))


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def files(tmp_path):
    return {
        "qa": write(tmp_path / "qa.jsonl", [{"prompt": f"q{i}", "completion": f" a{i}"} for i in range(12)]),
        "chat": write(tmp_path / "chat.jsonl", [{"input": f"u{i}", "reply": f" b{i}"} for i in range(4)]),
        "pairs": write(
            tmp_path / "pairs.jsonl", [{"prompt": f"q{i}", "chosen": f" c{i}", "rejected": " no"} for i in range(6)]
        ),
    }


def mix(*entries, **options):
    return Data(mix=entries, **options)


def test_data_sets_are_read_in_their_own_ways(files, base):
    renamed = {
        "path": files["chat"],
        "columns": {"prompt": "input", "completion": "reply"},
        "validation_fraction": 0.25,
    }
    split = sft_rows(mix({"path": files["qa"], "name": "QA"}, renamed), base, True)
    decoded = [base.decode(row.tokens) for row in split.train]
    assert decoded[:12] == [f"q{i} a{i}" for i in range(12)] and sorted(decoded[12:])[0].startswith("u")
    assert [(p.name, p.rows, p.held_out, p.draws) for p in split.parts] == [("QA", 12, 0, 12), ("chat", 3, 1, 3)]
    text = str(split.report)
    assert "qa.jsonl: 12 rows" in text and "chat.jsonl: 4 rows" in text
    assert "QA 80.0% (12 rows of 12, 1 epochs), chat 20.0% (3 rows of 3, 1 epochs, 1 held out)" in text
    assert split.epochs(30) == {"epoch": 2, "epochs/QA": 2, "epochs/chat": 2}
    counts = Counter(split.rows_at(0, 15, 0, True))
    assert set(counts.values()) == {1} and len(counts) == 15


def test_prompts_keep_numbers_of_their_own_and_are_held_out_evenly(files, base):
    entries = ({"path": files["qa"], "validation_fraction": 0.5}, {"path": files["pairs"], "validation_fraction": 0.5})
    split = prompt_rows(mix(*entries), base)
    rows = [*split.train, *split.validation]
    assert sorted(row.index for row in rows) == list(range(18))
    assert {row.index for row in rows if "chosen" in row.columns} == set(range(12, 18))
    assert [("chosen" in row.columns) for row in split.validation].count(True) == 3
    assert any("chosen" in row.columns for row in split.validation[:3])  # a run may use only the first ones
    assert "held-out rows of qa have a prompt that pairs trains on" in str(split.report)


def test_pairs_as_labels_stay_in_their_data_sets(files, base):
    split = label_rows(mix({"path": files["pairs"], "name": "a"}, {"path": files["pairs"], "name": "b"}), base)
    assert [row.label for row in split.train] == ([True] * 6 + [False] * 6) * 2
    assert [(part.rows, part.draws) for part in split.parts] == [(12, 12)] * 2


def test_a_packed_row_is_of_one_data_set(files, base):
    split = sft_rows(mix({"path": files["qa"], "weight": 1}, {"path": files["pairs"], "weight": 3}), base, True)
    packed = pack(split, texts, 24)
    first = packed.parts[0].rows
    assert sum(part.rows for part in packed.parts) == len(packed.train) == sum(part.draws for part in packed.parts)
    assert all("c" not in base.decode(row.tokens) for row in packed.train[:first])
    assert all("a" not in base.decode(row.tokens) for row in packed.train[first:])
    assert packed.parts[1].draws == pytest.approx(0.75 * len(packed.train), abs=0.5)


def test_formats_that_do_not_go_together_are_refused_with_both_named(files, base):
    with pytest.raises(DataError, match=r"qa\.jsonl: columns prompt, completion: not a known format") as error:
        pair_rows(mix({"path": files["pairs"]}, {"path": files["qa"]}), base)
    assert "beside" in str(error.value) and "pairs.jsonl (pairs from" in str(error.value).replace("preference ", "")


def test_a_message_about_columns_names_those_of_the_data_set(files, base):
    with pytest.raises(DataError, match=r"data\.mix\.1\.columns maps 'prompt' to a column 'q'"):
        pair_rows(mix({"path": files["pairs"]}, {"path": files["qa"], "columns": {"prompt": "q"}}), base)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"mix": [{"path": "a"}], "path": "b"}, r"data\.path too \('b'\); it belongs to an entry"),
        ({"mix": [{"path": "a"}], "validation_path": "b"}, r"data\.validation_path too"),
        ({"mix": [{"path": "a", "weight": 2.0}, {"path": "b"}]}, r"weights, but none for b"),
        ({"mix": [{"path": "x/a.jsonl"}, {"path": "y/a.jsonl.gz"}]}, r"are called 'a' in the log"),
        ({"mix": [{}]}, r"path is empty"),
        ({"mix": [{"path": "a", "weight": 0.0}]}, r"mix\.0\.weight: must be greater than 0"),
        ({"mix": [{"path": "a", "weight": -1.0}]}, r"must be greater than 0"),
        ({"mix": [{"path": "a", "name": "x/y"}]}, r"use letters, digits"),
        ({"path": "a", "mix_temperature": 2.0}, r"mix_temperature is 2, and data\.mix is empty"),
    ],
)
def test_what_makes_no_sense_is_refused(options, said):
    with pytest.raises(ConfigError, match=said):
        Data(**options)


@pytest.mark.parametrize("method", ["sft", "reward", "dpo", "distill"])
def test_a_preset_takes_a_mixture_and_its_held_out_share_is_of_each_data_set_without_one_of_its_own(method):
    preset = Path(__file__).parents[2] / "configs" / f"{method}.yaml"
    given = {"0.path": "a", "1.path": "b", "1.validation_fraction": "0.5", "2.path": "c", "2.validation_path": "d"}
    teacher = {"teacher.path": "t"} if method == "distill" else {}
    options = {"model.path": "m", **teacher, **{f"data.mix.{key}": value for key, value in given.items()}}
    data = load_config(method, preset, list(options.items())).data
    assert data.validation_fraction > 0
    assert [source.validation_fraction for source in data.sources] == [data.validation_fraction, 0.5, 0.0]
    assert [source.validation_path for source in data.sources] == ["", "", "d"]


def test_a_mixture_from_a_file_and_from_the_command_line(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text(
        "model: {path: m}\ndata:\n  mix:\n    - {path: a.jsonl, weight: 2.0}\n    - {path: b, weight: 1.0}\n"
    )
    read = load_config("sft", file, [("data.mix.1.columns.prompt", "q"), ("data.max_length", "64")])
    assert read.data == Data(
        mix=({"path": "a.jsonl", "weight": 2.0}, {"path": "b", "weight": 1.0, "columns": {"prompt": "q"}}),
        max_length=64,
    )
    typed = load_config("sft", None, [("model.path", "m"), ("data.mix.0.path", "a"), ("data.mix.0.weight", "2.0")])
    assert typed.data.mix[0].weight == 2
    assert typed.data.sources == (Data(path="a"),) and typed.data.name == "a"
    assert SFTConfig().data.sources == ()
    file.write_text("model: {path: m}\ndata: [{path: a}]\n")
    with pytest.raises(ConfigError, match=r"write the list as 'data\.mix'"):
        load_config("sft", file, [])

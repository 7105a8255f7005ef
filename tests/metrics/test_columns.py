"""The log in columns gives what its records have."""

import json
import math

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from jaxrlhf.metrics.columns import Columns, read_columns
from jaxrlhf.metrics.lines import read_records

METRICS = ("loss", "eval/loss", "num_tokens")
VALUES = st.floats(width=32) | st.integers(-(2**53), 2**53)


@settings(max_examples=80, deadline=None)
@given(st.lists(st.dictionaries(st.sampled_from(METRICS), VALUES), max_size=12), st.sampled_from(METRICS))
def test_columns_have_the_numbers_of_the_records(rows, other):
    rows = [{"step": 3 * i, **row} for i, row in enumerate(rows)]
    columns = Columns(rows)
    np.testing.assert_equal(list(columns), rows)
    np.testing.assert_equal(columns[-2:], rows[-2:])
    assert columns.metrics == list(dict.fromkeys(key for row in rows for key in row if key != "step"))
    for key in METRICS:
        having = [row for row in rows if key in row and other in row]
        steps, values, others = columns.arrays(key, other)
        assert steps.tolist() == [row["step"] for row in having]
        np.testing.assert_equal(values, np.array([row[key] for row in having], values.dtype))
        np.testing.assert_equal(others, np.array([row[other] for row in having], others.dtype))
        np.testing.assert_equal(columns.last_with(key), next((row for row in rows[::-1] if key in row), {}))
    places = [i for i, row in enumerate(rows) if "loss" in row or other in row]
    assert columns.with_any(["loss", other, "missing"]) == places


def test_whole_numbers_stay_whole_and_what_is_no_number_is_left_out():
    columns = Columns([{"step": 1, "a": 123_456_789, "b": 2, "text": "x"}, {"step": 2, "a": 3, "b": math.nan}])
    assert (
        columns.metrics == ["a", "b"]
        and type(columns[0]["a"]) is int
        and columns[0] == {"step": 1, "a": 123_456_789, "b": 2}
    )
    assert columns.arrays("text")[0].size == 0 and columns.last_with("text") == {}


def test_a_file_is_read_as_its_records(tmp_path):
    file = tmp_path / "metrics.jsonl"
    lines = [json.dumps({"step": i, "loss": i / 3, "grad_norm": "NaN"}) for i in range(9)]
    file.write_text("\n".join(lines) + '\n{"step": 9')
    np.testing.assert_equal(list(read_columns(file)), read_records(file))
    assert len(read_columns(file)) == 9

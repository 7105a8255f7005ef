"""What docs/ says about this repository is so."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
ROWS = [row for row in re.findall(r"^\| (.*) \|$", TEXT, re.M) if not row.endswith("our test")]


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:40])
def test_every_mistake_names_a_test_that_exists(row):
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
    assert named
    for file, name in named:
        assert name in names_in(file), f"{file}::{name}"


def test_there_is_a_row_for_each_detail():
    assert [int(row.split(" |")[0]) for row in ROWS if row[0].isdigit()] == list(range(1, 22))
    assert len(ROWS) == 13 + 3 + 14 + 15 + 21

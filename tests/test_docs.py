"""The README and docs/ are correct about this repository: links resolve, tests and files that they name exist."""

import ast
import re
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
LINKS = [
    (page, target)
    for page in PAGES
    for target in re.findall(
        r"\]\(([^)\s]+)\)", re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    )
    if not re.match(r"https?:", target)
]
TEXT = (ROOT / "docs" / "correctness.md").read_text(encoding="utf-8")
ROWS = [row for row in re.findall(r"^\| (.*) \|$", TEXT, re.M) if not row.endswith("our test")]


@cache
def names_in(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub makes of a page's headings."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    headings = re.findall(r"^#+ (.*)$", text, re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize(("page", "target"), LINKS, ids=lambda value: str(getattr(value, "name", value)))
def test_every_relative_link_resolves(page, target):
    path, _, anchor = target.partition("#")
    file = (page.parent / path).resolve() if path else page
    assert file.exists(), target
    if anchor:
        assert anchor in anchors(file), target


def test_every_page_is_linked_from_the_readme():
    linked = {target.partition("#")[0] for page, target in LINKS if page.name == "README.md"}
    assert {page.relative_to(ROOT).as_posix() for page in PAGES[1:]} <= linked


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_every_file_that_is_named_exists(page):
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for path in re.findall(r"`((?:jaxrlhf|tests|scripts|configs|docs|\.ci)/[\w./]*)(?:::\w+)?`", text):
        assert (ROOT / path).exists(), path


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row[:40])
def test_every_mistake_names_a_test_that_exists(row):
    named = re.findall(r"`(tests/[\w/]+\.py)::(test_\w+)`", row)
    assert named
    for file, name in named:
        assert name in names_in(file), f"{file}::{name}"


def test_there_is_a_row_for_each_detail():
    assert [int(row.split(" |")[0]) for row in ROWS if row[0].isdigit()] == list(range(1, 22))
    assert len(ROWS) == 13 + 3 + 14 + 16 + 21

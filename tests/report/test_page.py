"""Pages in one file."""

import html.parser
import json

import pytest

from jaxrlhf.report.page import STATIC, embed, page

HOSTILE = [
    "</script><script>alert(1)</script>",
    "<!-- <script>",
    "a & b",
    "\u2028 and \u2029",
    "\x1b[31mred",
    "\ud800 alone",
    "back\\slash \\ud800 \ud800",
    "\u202egnp.exe",
    "",
    "a" * 100_000,
]


class Scripts(html.parser.HTMLParser):
    """The content of every <script> element of a page, and the names of all elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.scripts: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag == "script":
            self.scripts.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] == "script":
            self.scripts[-1] += data


@pytest.mark.parametrize("text", HOSTILE, ids=range(len(HOSTILE)))
def test_any_text_survives_and_ends_nothing(text):
    data = {"text": text, text: [1, None, True]}
    found = Scripts(page(text, "run", data).encode().decode())
    assert found.tags.count("script") == 2
    assert json.loads(found.scripts[0]) == data


def test_numbers_that_json_lacks_become_null():
    assert json.loads(embed({"a": [float("nan"), 1.5, (float("inf"), -float("inf"))]})) == {
        "a": [None, 1.5, [None, None]]
    }


@pytest.mark.parametrize("kind", ["run", "compare"])
def test_a_page_names_no_other_file(kind):
    text = page("title", kind, {})
    for word in ("src=", "@import", "url(", "fetch(", "XMLHttpRequest", "import(", "innerHTML", "insertAdjacentHTML"):
        assert word not in text
    assert text.count("href=") == 1 and 'href="data:,"' in text
    assert all((STATIC / name).is_file() for name in ("report.css", "report.js", f"{kind}.js"))

"""The generated pages of docs/ are current, and options that README and docs name exist."""

import re
from pathlib import Path

import make_reference
import pytest

from jaxrlhf.config import Component
from jaxrlhf.config.file import METHODS
from jaxrlhf.config.judge import Criterion
from jaxrlhf.config.schema import keys
from jaxrlhf.config.trl import NAMES
from jaxrlhf.metrics.keys import COMPONENT, METRICS
from jaxrlhf.metrics.tags import TRL

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
OPTIONS = {key for cls in METHODS.values() for key, _ in keys(cls)}
SECTIONS = {key.partition(".")[0] for key in OPTIONS if "." in key}
PREFIXES = {key.partition("/")[0] for key in METRICS | COMPONENT if "/" in key}


@pytest.mark.parametrize("path", make_reference.pages(), ids=lambda path: path.name)
def test_generated_pages_are_current(path):
    expected = make_reference.pages()[path]
    assert path.read_text(encoding="utf-8") == expected, "run python scripts/make_reference.py"


def test_what_was_written_by_hand_around_a_generated_part_stays():
    (text,) = (text for path, text in make_reference.pages().items() if path.name == "trl.md")
    assert re.findall(r"^## (.*)$", text, re.M) == ["Trainers", "Arguments", "Data", "Metrics", "Results"]


def test_every_option_metric_and_name_of_trl_is_on_its_page():
    made = {path.name: text for path, text in make_reference.pages().items()}
    elements = {f"reward.components.N.{key}" for key, _ in keys(Component)}
    elements |= {f"reward.components.N.judge.rubric.N.{key}" for key, _ in keys(Criterion)}
    assert all(f"**`{key}`** · " in made["configuration.md"] for key in elements)
    assert all(f"**`{key}`** · " in made["configuration.md"] for key in OPTIONS if key not in SECTIONS)
    assert all(f"| `{key}` | " in made["metrics.md"] for key in METRICS | COMPONENT)
    assert all(f"| `{name}` | " in made["trl.md"] for name in NAMES)


NOT_OPTIONS = re.compile(r"ppo\.ppo_epochs|.*\.(jsonl?|yaml|py|KEY)")  # the wrong key of a message, files, any key


def code(page):
    """What a page has in backticks on a line."""
    return re.findall(r"`([^`\n]+)`", page.read_text(encoding="utf-8"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_option_that_is_named_exists(page):
    for text in code(page):
        for key in re.findall(r"(?<![\w./])(\w+(?:\.\w+)+)(?![\w./(])", text):
            if key.partition(".")[0] in SECTIONS and not NOT_OPTIONS.fullmatch(key):
                element = r"(reward\.components\.(N|\d+)\.(judge\.(rubric\.N\.)?)?|data\.mix\.(N|\d+)\.)\w+"
                assert key in OPTIONS or re.fullmatch(element, key), key


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_metric_that_is_named_exists(page):
    known = set(METRICS | COMPONENT) | {name for names in TRL.values() for tags in names.values() for name in tags}
    for key in code(page):
        if re.fullmatch(r"[a-z]+/\w+(/\w+)?", key) and key.partition("/")[0] in PREFIXES:
            assert key in known, key

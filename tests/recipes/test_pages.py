"""The commands of docs/recipes/*.md and scripts/recipe_*.sh parse, and the presets that they name load with them."""

import re
import shlex
from dataclasses import replace
from pathlib import Path

import pytest

from jaxrlhf.cli import main
from jaxrlhf.cli.commands import COMMANDS
from jaxrlhf.config.file import METHODS, load_config, presets

ROOT = Path(__file__).parents[2]
PAGES = sorted((ROOT / "docs" / "recipes").glob("*.md"))


def commands(page: Path) -> list[list[str]]:
    """The jaxrlhf commands in the bash blocks of a page, as words."""
    blocks = re.findall(r"^```bash\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S)
    lines = "".join(blocks).replace("\\\n", "").splitlines()
    return [shlex.split(line, comments=True)[1:] for line in lines if line.startswith("jaxrlhf ")]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_command_parses_and_its_preset_loads(page, monkeypatch):
    loaded = []

    def load(options, overrides):
        name = getattr(options, "config", None)
        if options.verb in METHODS:
            loaded.append(load_config(options.verb, presets()[name], overrides, partial=True))

    for verb, command in list(COMMANDS.items()):
        monkeypatch.setitem(COMMANDS, verb, replace(command, run=load))
    words = commands(page)
    for command in words:
        assert main(command) == 0, command
    assert len(loaded) == sum(command[0] in METHODS for command in words) > 0

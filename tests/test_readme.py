"""The README holds what it says: its example runs, its commands parse, its files exist."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import pytest

import jaxrlhf
from jaxrlhf import weights
from jaxrlhf.cli import main
from jaxrlhf.cli.commands import COMMANDS
from jaxrlhf.config.file import METHODS
from jaxrlhf.config.schema import keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
LINES = [line for language, block in BLOCKS if language == "bash" for line in block.splitlines()]
ROLLOUTS = (ROOT / "docs" / "rollouts.md").read_text(encoding="utf-8").replace("\\\n", "")


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_OUTPUT\b|TODO", README)


def test_the_python_example_runs_as_it_stands(tiny_model, tmp_path, monkeypatch, capsys):
    base = shutil.copytree(tiny_model, tmp_path / "base")
    about = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(about | {"max_position_embeddings": 128}))
    model, params = weights.load(base, init="random", key=jax.random.key(0))
    weights.export(tmp_path / "runs" / "sft", model, params, source=base)
    monkeypatch.chdir(tmp_path)
    (example,) = [block for language, block in BLOCKS if language == "python"]
    exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert "[-" in capsys.readouterr().out, "rewards were printed"
    trained = jaxrlhf.load("my-model")[1]
    moved = jax.tree.map(lambda a, b: bool((a != b).any()), params, trained)
    assert any(jax.tree.leaves(moved))


COMMAND_LINES = [line for line in LINES if line.startswith("jaxrlhf ")]
COMMAND_LINES += re.findall(r"^jaxrlhf .*", ROLLOUTS, re.M)
COMMAND_LINES += re.findall(r"# .*?\b(jaxrlhf .*)", "\n".join(LINES))
COMMAND_LINES += [text for text in INLINE if text.startswith("jaxrlhf ")]


@pytest.mark.parametrize("line", COMMAND_LINES)
def test_every_command_parses(line, monkeypatch):
    words = shlex.split(line.partition(" > ")[0].replace(" ...", " VALUE"), comments=True)[1:]
    seen = []

    def record(options, overrides):
        seen.extend(key for key, _ in overrides)

    for verb, command in list(COMMANDS.items()):
        monkeypatch.setitem(COMMANDS, verb, replace(command, run=record))
    if len(words) == 1 and words[0] in COMMANDS:  # the name of a command and not a call
        return
    assert main(words) == 0, words
    if words[0] in METHODS:
        assert set(seen) <= {key for key, _ in keys(METHODS[words[0]])}


def test_there_are_commands_to_check():
    assert {line.split()[1] for line in COMMAND_LINES} >= {
        "doctor",
        "sft",
        "reward",
        "ppo",
        "generate",
        "compare",
        "export",
    }


def test_every_file_of_the_tree_exists():
    (tree,) = [block for _, block in BLOCKS if block.startswith("jaxrlhf/\n")]
    folder = ROOT
    for line in tree.splitlines():
        indent, name = re.match(r"( *)(\S+)", line).groups()
        if not indent:
            folder = ROOT / name
        here = ROOT / "jaxrlhf" if indent else folder
        assert (ROOT / "jaxrlhf" / name if indent else folder).exists(), line
        for other in re.findall(r"\b\w+\.(?:py|sh)\b", line.partition(name)[2]):
            assert (here / other).is_file(), line


def test_every_file_that_is_named_exists():
    named = [path for text in [*INLINE, *LINES] for path in re.findall(r"(?<![\w.])\.?\w+/[\w./]*\w", text)]
    ours = [
        path for path in named if path.split("/")[0] in {"scripts", "jaxrlhf", "tests", "configs", ".ci", "weights"}
    ]
    assert ours
    for path in ours:
        assert (ROOT / path).exists() or (ROOT / "jaxrlhf" / path).exists(), path

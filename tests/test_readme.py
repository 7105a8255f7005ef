"""The README is correct: its examples run, its commands parse, its files exist, and its tree is complete."""

import json
import re
import shlex
import shutil
from dataclasses import replace
from pathlib import Path

import jax
import numpy as np
import pytest

import jaxrlhf
from jaxrlhf import weights
from jaxrlhf.cli import main
from jaxrlhf.cli.commands import COMMANDS
from jaxrlhf.config.file import METHODS
from jaxrlhf.config.schema import known_keys

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", README, re.M | re.S)
INLINE = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", README, flags=re.M | re.S))
BASH = "".join(block for language, block in BLOCKS if language == "bash").replace("\\\n", "")
LINES = BASH.splitlines()
DOCS = "".join(page.read_text(encoding="utf-8") for page in sorted((ROOT / "docs").rglob("*.md"))).replace("\\\n", "")


def test_nothing_is_left_to_fill_in():
    assert not re.findall(r"\b[A-Z]+_OUTPUT\b|TODO", README)


@pytest.fixture
def demo_folder(tiny_model, tmp_path, monkeypatch):
    """A working directory with the files of `runs/demo` that the examples use; returns the SFT model's parameters."""
    base = shutil.copytree(tiny_model, tmp_path / "base")
    described = json.loads((base / "config.json").read_text())
    (base / "config.json").write_text(json.dumps(described | {"max_position_embeddings": 128}))
    model, params = weights.load(base, init="random", key=jax.random.key(0))
    weights.export(tmp_path / "runs" / "demo" / "sft", model, params, source=base)
    prompts = tmp_path / "runs" / "demo" / "data" / "prompts.jsonl"
    prompts.parent.mkdir()
    prompts.write_text("".join(json.dumps({"prompt": f"is {i} a lucky number?"}) + "\n" for i in range(16)))
    monkeypatch.chdir(tmp_path)
    return params


def changed(params, folder):
    trained = jaxrlhf.load(folder)[1]
    return any(jax.tree.leaves(jax.tree.map(lambda a, b: bool((a != b).any()), params, trained)))


def test_the_python_examples_run_as_they_stand(demo_folder):
    examples = [block for language, block in BLOCKS if language == "python"]
    assert len(examples) == 2
    for example in examples:
        exec(compile(example, "README.md", "exec"), {"__name__": "__main__"})
    assert changed(demo_folder, "runs/ppo-python/export")
    assert set(jaxrlhf.load("runs/grpo-python/export")[1]) == set(demo_folder)


def test_the_python_example_of_one_update_runs_as_it_stands(demo_folder, capsys):
    (example,) = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "ppo.md").read_text(), re.M | re.S)
    exec(compile(example, "docs/ppo.md", "exec"), {"__name__": "__main__"})
    assert "[-" in capsys.readouterr().out, "rewards were printed"
    assert changed(demo_folder, "my-model")


def test_the_ten_steps_of_an_update_run_as_they_stand_and_give_its_numbers(demo_folder, capsys):
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / "docs" / "inside_ppo.md").read_text(), re.M | re.S)
    made = {"__name__": "__main__"}
    for block in blocks:
        exec(compile(block, "docs/inside_ppo.md", "exec"), made)
    experience, table = made["experience"], made["table"]
    for name in ("rewards", "advantages", "returns"):
        np.testing.assert_allclose(made[name], getattr(experience, name), rtol=1e-4, atol=1e-6, err_msg=name)
    for name, array in {"kl": made["kl"], "td_error": made["deltas"], "raw_advantage": made["raw_advantages"]}.items():
        np.testing.assert_allclose(table.columns[name], array[made["mask"]], rtol=1e-4, atol=1e-6, err_msg=name)
    assert [row["state"] + row["token"] for row in table.rows][:1] == ["".join(made["state_action_pairs"][0])]
    assert "td_error" in capsys.readouterr().out


COMMAND_LINES = [line for line in LINES if line.startswith("jaxrlhf ")]
COMMAND_LINES += re.findall(r"^jaxrlhf .*", "".join(re.findall(r"^```bash\n(.*?)^```", DOCS, re.M | re.S)), re.M)
COMMAND_LINES += re.findall(r"`(jaxrlhf [^`\n]+)`", DOCS)
COMMAND_LINES += re.findall(r"# .*?\b(jaxrlhf .*)", "\n".join(LINES))
COMMAND_LINES += [text for text in INLINE if text.startswith("jaxrlhf ")]


@pytest.mark.parametrize("line", dict.fromkeys(COMMAND_LINES))
def test_every_command_parses(line, monkeypatch):
    line = line.partition(" > ")[0].replace(" ...", " VALUE").replace("METHOD", "ppo")
    words = shlex.split(line, comments=True)[1:]
    seen = []

    def record(options, overrides):
        seen.extend(key for key, _ in overrides)

    for verb, command in list(COMMANDS.items()):
        monkeypatch.setitem(COMMANDS, verb, replace(command, run=record))
    if words[0] in COMMANDS and all(word.isupper() for word in words[1:]):  # named, and not called
        return
    assert main(words) == 0, words
    if words[0] in METHODS:
        assert all(key in known_keys(METHODS[words[0]], key) for key in seen), seen


def test_examples_and_commands_have_run_directories_of_their_own():
    """Who runs the examples in Python first can still type every command."""
    python = "".join(block for language, block in BLOCKS if language == "python")
    runs = re.findall(r'run_dir="(\S+)"', python)
    assert len(runs) == 2 and not [line for line in LINES for run in runs if run in line]


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


def test_the_tree_is_that_of_the_repository():
    (tree,) = [block for _, block in BLOCKS if block.startswith("jaxrlhf/\n")]
    rooms = set()
    for line in tree.splitlines():
        indent, name, text = re.match(r"( *)(\S+)(.*)", line).groups()
        folder = ROOT / "jaxrlhf" if indent else ROOT
        assert (folder / name).exists(), line
        if indent:
            rooms.add(name.rstrip("/"))
        for script in re.findall(r"\b\w+\.(?:py|sh)\b", text):
            assert (folder / name / script).is_file(), line
    modules = {path.name for path in (ROOT / "jaxrlhf").iterdir() if not path.name.startswith(("_", "."))}
    assert rooms == modules


def test_every_file_that_is_named_exists():
    named = [path for text in [*INLINE, *LINES] for path in re.findall(r"(?<![\w.])\.?\w+/[\w./]*\w", text)]
    ours = [
        path
        for path in named
        if path.split("/")[0] in {"scripts", "jaxrlhf", "tests", "configs", "docs", ".ci", "weights"}
    ]
    assert ours
    for path in ours:
        assert (ROOT / path).exists() or (ROOT / "jaxrlhf" / path).exists(), path

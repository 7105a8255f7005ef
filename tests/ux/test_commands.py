"""Every command of the README and of docs/ does what it says: it is run here, or marked as needing more."""

import io
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest

from jaxrlhf import weights
from jaxrlhf.cli import main, training
from jaxrlhf.cli.commands import COMMANDS
from jaxrlhf.config import replace
from jaxrlhf.demo.tokenizer import write_base

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(Path(__file__).parent))
import commands as page_commands  # noqa: E402
import stand_ins  # noqa: E402

DOCS = [page for page in sorted((ROOT / "docs").rglob("*.md")) if page_commands.runnable(page)]
PAGES = [pytest.param(page, id=page.stem, marks=pytest.mark.long) for page in DOCS]
PAGES.append(pytest.param(ROOT / "README.md", id="README", marks=pytest.mark.slow))
RUNS = {  # that a page takes for granted: copies of those of the demo
    "evaluation.md": {"sft": "sft", "ppo": "ppo", "dpo": "sft", "grpo": "ppo", "reward": "reward"},
    "logging.md": {"ppo": "ppo", "grpo": "ppo", "reward": "reward"},
    "report.md": {"ppo": "ppo"},
    "rewards.md": {"strict": "ppo"},
    "rollouts.md": {"happy": "sft"},
}
HAPPY = "def happy(completions):\n    return [float(len(text) % 3 == 0) for text in completions]\n"


@pytest.mark.long
def test_the_first_five_minutes_of_the_readme():
    done = subprocess.run(
        ["bash", str(Path(__file__).with_name("first_five_minutes.sh"))], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with the demo's runs and every file that the pages name."""
    folder = tmp_path_factory.mktemp("world")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        stand_ins.demo(Path("runs/demo"))
        base = write_base(folder / "base")
        described = json.loads((base / "config.json").read_text()) | {"max_position_embeddings": 256}
        (base / "config.json").write_text(json.dumps(described))
        model, params = weights.load(base, init="random", key=jax.random.key(0))
        for name in ("MODEL", "stories260K"):
            weights.export(folder / name, model, params, source=base)
        rows = [json.loads(line) for line in Path("runs/demo/data/preferences.jsonl").read_text().splitlines()[:60]]
        write("rows.jsonl", [{"prompt": row["prompt"], "completion": row["chosen"]} for row in rows])
        write(
            "labels.jsonl",
            [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2} for i, r in enumerate(rows)],
        )
        write("pairs.jsonl", rows[:10])
        write("texts.jsonl", [{"text": f"{row['prompt']}{row['chosen']}"} for row in rows[:10]])
        write("asked.jsonl", [{"prompt": row["prompt"]} for row in rows[:4]])
        write("held_out.jsonl", [{"prompt": row["prompt"]} for row in rows[4:12]])
        cases = [
            {"name": str(i), "prompt": r["prompt"], "good": r["chosen"], "bad": r["rejected"]}
            for i, r in enumerate(rows)
        ]
        Path("cases.json").write_text(json.dumps(cases[:5]))
        Path("happy.py").write_text(HAPPY)
        Path("happy.yaml").write_text("reward: {function: happy.py:happy}\n")
        for method, name in (("ppo", "my"), ("sft", "my_sft"), ("reward", "my_reward"), ("dpo", "my_dpo")):
            Path(f"{name}.yaml").write_text(output("new", method))
            stand_ins.fill(Path(f"{name}.yaml"))
    return folder


def write(path, rows):
    Path(path).write_text("".join(json.dumps(row) + "\n" for row in rows))


def output(*words):
    """What a command prints."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "stdout", io.StringIO())
        assert main(words) == 0
        return sys.stdout.getvalue()


def shortened(method, path, options, overrides, load=training._load_with_options):
    """A config of one step."""
    config = load(method, path, options, overrides)
    if method in ("ppo", "grpo"):
        return replace(config, **{f"{method}.total_episodes": config.settings.batch_size})
    return replace(config, **{"train.max_steps": 1, "data.max_rows": 60})


@pytest.mark.parametrize("page", PAGES)
def test_every_command_of_a_page_runs(page, world, tmp_path, monkeypatch, capsys):
    """Trainings are cut to one step; nothing else of a command is changed."""
    folder = shutil.copytree(world, tmp_path / "world")
    for name, demo in RUNS.get(page.name, {}).items():
        shutil.copytree(folder / "runs" / "demo" / demo, folder / "runs" / name)
    monkeypatch.chdir(folder)
    monkeypatch.setattr(training, "_load_with_options", shortened)
    for line in page_commands.runnable(page):
        if line.startswith((page_commands.DEMO, "source ")):  # the demo's runs are there; the shell's own command
            continue
        before, _, command = line.rpartition(" | ")
        words = shlex.split(command, comments=True)
        sent = subprocess.run(["bash", "-c", before], capture_output=True, text=True).stdout if before else ""
        monkeypatch.setattr(sys, "stdin", io.StringIO(sent))
        assert words[0] == "jaxrlhf", f"{line}: only commands of jaxrlhf can be run; mark others `# needs ...`"
        words, target = (words[1 : words.index(">")], words[-1]) if ">" in words else (words[1:], "")
        capsys.readouterr()
        code = main(words)
        said = capsys.readouterr()
        assert code == 0, f"{line}\n{said.out[-2000:]}\n{said.err[-2000:]}"
        if target:
            Path(target).write_text(said.out)
            stand_ins.fill(Path(target))


def test_commands_stand_in_bash_blocks():
    """Others would not be run."""
    for page in [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]:
        for language, block in re.findall(r"^```(\w*)\n(.*?)^```", page.read_text(encoding="utf-8"), re.M | re.S):
            if language != "bash":
                found = re.findall(
                    rf"^\s*\$?\s*(?:jaxrlhf|python -m jaxrlhf) (?:{'|'.join(COMMANDS)})(?= |$).*", block, re.M
                )
                assert not found, f"{page.name}: {found[0]}"

"""Shell completion: what bash, zsh and fish offer for a command line that has been begun."""

import json
import shutil
import subprocess
import time

import pytest

from jaxrlhf.cli import completion, main
from jaxrlhf.cli.commands import COMMANDS
from jaxrlhf.config.file import METHODS, presets
from jaxrlhf.config.schema import keys

BASH = """
source "$1"; shift
COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMPREPLY=()
_jaxrlhf
printf '%s\\n' "${COMPREPLY[@]}"
"""
ZSH = """
compdef() {}
compadd() { shift; local word; for word in $@; do [[ $word == $PREFIX* ]] && print -r -- $word; done }
compset() { PREFIX=${PREFIX#*=} }
_files() { print -l -- ${PREFIX}*(N) }
source $1; shift
words=("$@"); CURRENT=$#; PREFIX=$words[-1]
_jaxrlhf
"""


@pytest.fixture(scope="module")
def scripts(tmp_path_factory):
    folder = tmp_path_factory.mktemp("completion")
    for shell in completion.SHELLS:
        (folder / shell).write_text(getattr(completion, shell)())
    (folder / "files").mkdir()
    for name in ("my.yaml", "d.jsonl"):
        (folder / "files" / name).touch()
    return folder


@pytest.fixture(params=completion.SHELLS)
def offered(request, scripts):
    """What a shell offers for a command line, the last word of which is being typed."""
    shell, script = request.param, str(scripts / request.param)
    if not shutil.which(shell):
        pytest.skip(f"no {shell} here")

    def offered(*words):
        if shell == "fish":
            line = f"source {script}; complete -C {json.dumps(' '.join(words))}"
            command = ["fish", "--no-config", "-c", line]
        else:
            split = [
                part for word in words for part in (word.partition("=") if "=" in word and shell == "bash" else [word])
            ]
            split = split if split[-2:] != ["=", ""] or shell != "bash" else split[:-1]
            options = ["--norc"] if shell == "bash" else ["-f"]
            command = [shell, *options, "-c", BASH if shell == "bash" else ZSH, shell, script, *split]
        done = subprocess.run(command, cwd=scripts / "files", capture_output=True, text=True, timeout=20)
        assert not done.stderr, done.stderr
        return {line.partition("\t")[0].rpartition("=")[2] for line in done.stdout.splitlines() if line}

    return offered


def test_commands_options_keys_presets_files_and_choices_are_offered(offered):
    start = time.monotonic()
    assert offered("jaxrlhf", "ch") == {"chat"}
    assert time.monotonic() - start < 3, "no Python is started"
    assert set(COMMANDS) <= offered("jaxrlhf", "")
    assert offered("jaxrlhf", "ppo", "my") == {"my.yaml"}
    assert {"ppo", "grpo"} <= offered("jaxrlhf", "ppo", "")
    assert offered("jaxrlhf", "ppo", "my.yaml", "--optim.learning") == {"--optim.learning_rate"}
    assert offered("jaxrlhf", "ppo", "my.yaml", "--fres") == {"--fresh"}
    assert offered("jaxrlhf", "sft", "my.yaml", "--optim.schedule", "co") == {"constant", "cosine"}
    assert offered("jaxrlhf", "sft", "--optim.schedule=co") == {"constant", "cosine"}
    assert offered("jaxrlhf", "ppo", "--fresh", "--lora.enabled", "") == {"true", "false"}
    assert offered("jaxrlhf", "generate", "m", "--keep", "p") == {"pairs", "prompts"}
    assert offered("jaxrlhf", "evaluate", "m", "--prompts", "d") == {"d.jsonl"}
    assert offered("jaxrlhf", "new", "g") == {"grpo"}
    assert offered("jaxrlhf", "sft", "--ppo.") == set(), "another method's option"


def test_every_key_of_a_method_is_an_option_of_its_command():
    for method, cls in METHODS.items():
        _, options, words, files = completion.table()[method]
        flags = {option.flag for option in options}
        assert {f"--{key}" for key, annotation in keys(cls) if "." in key or isinstance(annotation, str)} <= flags
        assert {"--fresh", "--dry-run", "--run_dir", "--help"} <= flags
        assert set(presets()) <= set(words) and files


@pytest.mark.parametrize("shell", completion.SHELLS)
def test_the_command_prints_the_script(shell, scripts, capsys):
    assert main(["completion", shell]) == 0
    assert capsys.readouterr().out == (scripts / shell).read_text()

"""Input that nobody should give: every command answers with one message and an exit code, without a traceback."""

import json
import os
import shutil

import pytest

from jaxrlhf.cli import main
from jaxrlhf.runs import entries

LONG = "x" * 300
GIVEN = ["--model.path", "m", "--data.path", "d"]


@pytest.fixture
def answers(capsys, monkeypatch, tmp_path):
    """Run a command: its exit code and message. An unexpected error fails the test."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))

    def run(*arguments: str) -> tuple[int, str]:
        code = main(list(arguments))
        said = capsys.readouterr().err
        kept = tmp_path / "cache" / "jaxrlhf" / "logs" / "error.txt"
        assert code != 70, kept.read_text()
        assert "Traceback" not in said
        return code, said

    return run


@pytest.mark.parametrize(
    "arguments",
    [
        ["sft", LONG],
        ["sft", f"{LONG}.yaml"],
        ["sft", "--model.path", LONG, "--data.path", "d"],
        ["sft", *GIVEN, "--run-dir", LONG],
        ["sft", *GIVEN, "--data.token_cache", f"a/{LONG}/b"],
        ["sft", *GIVEN, "--data.validation_path", LONG],
        ["sft", *GIVEN, "--tokenizer.path", LONG],
        ["sft", *GIVEN, "--tokenizer.chat_template", LONG],
        ["ppo", *GIVEN, "--reward.function", f"{LONG}.py:f"],
        ["ppo", *GIVEN, "--reward.model", LONG],
        ["ppo", *GIVEN, "--reference.path", LONG],
        ["sft", "--model.path", "~nobody-of-this-name/m", "--data.path", "d"],
        ["data", LONG],
        ["data", f"{LONG}.jsonl"],
        ["data", f"{LONG}.yaml"],
        ["generate", LONG, "--prompt", "a"],
        ["generate", "m", "--prompts", LONG, "--out", "o"],
        ["generate", "m", "--prompts", "p", "--out", "o", "--best-by", LONG],
        ["chat", LONG],
        ["evaluate", LONG, "--prompts", "p"],
        ["compare", LONG, "m", "--prompts", "p"],
        ["convert-rm", LONG, "b", "d"],
        ["plot", LONG],
        ["report", LONG],
        ["export", LONG, "d"],
        ["export", "r", LONG],
        ["plan", LONG],
        ["doctor", LONG],
    ],
    ids=lambda arguments: " ".join(a if len(a) < 40 else "LONG" for a in arguments),
)
def test_a_path_that_no_file_system_can_hold(answers, arguments):
    code, said = answers(*arguments)
    assert code in (2, 3, 4, 7), said
    assert said


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((option, text) for option in ("run_dir", "model.path", "data.path") for text in ("a\\0b", LONG, "\\uD800")),
        ("reward.function", "a\\0.py:f"),
        ("tokenizer.chat_template", "a\\0"),
    ],
)
def test_a_path_in_a_config_that_no_file_system_can_hold(answers, tmp_path, option, value):
    section, _, name = option.rpartition(".")
    line = f'{name}: "{value}"'
    given = {"model": {"path": "m"}, "data": {"path": "d"}, "reward": {"function": "f.py:f"}}
    given.get(section, {}).pop(name, None)
    lines = [f"{key}: {json.dumps(values)}" for key, values in given.items() if key != section]
    kept = [f"  {key}: {json.dumps(value)}" for key, value in given.get(section, {}).items()]
    lines += [f"{section}:", f"  {line}", *kept] if section else [line]
    (tmp_path / "c.yaml").write_text("\n".join(lines))
    code, said = answers("ppo", "c.yaml")
    assert code == 3
    assert "NUL" in said or "300 bytes" in said or "surrogate" in said or "not YAML" in said


ALIASES = "\n".join(
    ["a: &a0 [x, x, x, x, x, x, x, x, x]", *(f"b{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 10))]
)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (ALIASES, "more than 20,000 values"),
        ("a: " + "[" * 200 + "]" * 200, "deeper than 100 levels"),
        ("a: " + "[" * 100_000, "deeper than 100 levels"),
        ("a: " + "{b: " * 5_000 + "1" + "}" * 5_000, "deeper than 100 levels"),
        ("\n".join(["a0: &a0 [x]", *(f"a{i}: &a{i} [*a{i - 1}]" for i in range(1, 300))]), "deeper than 100 levels"),
        ("&a optim: &b\n  eps: *b\n", "an alias refers to the mapping or list that contains it"),
        ("seed: " + "9" * 5000, "an integer of 5,000 digits"),
        ("seed: 0x" + "f" * 5000, "an integer of 5,002 digits"),
        ("train: {max_steps: " + "9" * 900 + "}", "max_steps: must be"),
        (f"{LONG * 3}: 1", "unknown key"),
        ("\n".join(f"k{i}: 1" for i in range(2000)), "and 19"),
        ("#" * 1_000_000, "more than the 500,000 allowed"),
        ("#" * 5_000_000, "more than any config has"),
        ("a: \x1b[31m", "not YAML"),
        ('"\\e[31mkey": 1', r"unknown key '\x1b[31mkey'"),
        ("a: !!python/object/apply:os.system [x]", "not supported"),
    ],
    ids=lambda value: value[:30],
)
def test_a_config_that_is_meant_to_break_its_reader(answers, tmp_path, text, says):
    (tmp_path / "c.yaml").write_text(text)
    code, said = answers("sft", "c.yaml", "--model.path", "m", "--data.path", "d")
    assert code == 3 and says in said and "\x1b" not in said
    assert len(said) < 30_000


def test_pipes_and_devices_are_refused_and_never_waited_for(answers, tmp_path, tiny_model, prompts):
    os.mkfifo(tmp_path / "p.jsonl")
    for path, kind in (("p.jsonl", "a named pipe"), ("/dev/zero", "a device")):
        code, said = answers("data", path)
        assert code == 4 and f"data {path}: is {kind}, not a file" in said, said
        code, said = answers("sft", path, *GIVEN)
        assert code == 3 and f"the config file {path} is {kind}, not a file" in said, said
    messages = {
        "config.json": "config.json: is a named pipe, not a file",
        "generation_config.json": "generation_config.json: is a named pipe, not a file",
        "tokenizer.json": "tokenizer.json is a named pipe, not a file",
        "chat_template.jinja": "chat_template.jinja is a named pipe, not a file",
        "model.safetensors": "not a valid safetensors file: it is a named pipe",
        "model.safetensors.index.json": "model.safetensors.index.json: is a named pipe, not a file",
        "adapter_config.json": "adapter_config.json: is a named pipe, not a file",
    }
    for name, message in messages.items():
        folder = tmp_path / f"with-{name}"
        folder.mkdir()
        for file in tiny_model.iterdir():
            if file.name != name:
                (folder / file.name).write_bytes(file.read_bytes())
        os.mkfifo(folder / name)
        code, said = answers("generate", str(folder), "--prompt", "a")
        assert code == 4 and message in said, (name, said)
    os.mkfifo(tmp_path / "t.jinja")
    code, said = answers("chat", str(tiny_model), "--tokenizer.chat_template", "t.jinja", "--model.init", "random")
    assert code == 4 and "'t.jinja' is not auto, none, chatml or a readable" in said, said
    assert "(is a named pipe, not a file)" in said, said
    os.mkfifo(tmp_path / "r.py")
    given = ["--model.path", str(tiny_model), "--model.init", "random", "--data.path", str(prompts)]
    code, said = answers("ppo", *given, "--sampling.response_length", "4", "--reward.function", "r.py:f")
    assert code == 5 and "r.py is a named pipe, not a file" in said, said


def test_a_folder_in_place_of_a_file_of_a_model(answers, tmp_path, tiny_model):
    for name, message in (
        ("config.json", "config.json: is a folder"),
        ("tokenizer.json", "tokenizer.json is a folder"),
    ):
        folder = tmp_path / f"with-{name}"
        shutil.copytree(tiny_model, folder)
        (folder / name).unlink()
        (folder / name).mkdir()
        code, said = answers("generate", str(folder), "--prompt", "a")
        assert code == 4 and f"{message}, not a file" in said, said


@pytest.mark.parametrize("name", [*entries.FILES, *entries.FOLDERS])
def test_something_else_with_the_name_of_a_file_or_folder_of_a_run_is_refused_at_the_start(answers, tmp_path, name):
    """Before the model and the data are looked for, which do not exist."""
    (tmp_path / "run").mkdir()
    if name in entries.FILES:
        (tmp_path / "run" / name).mkdir()
    else:
        (tmp_path / "run" / name).write_text("")
    code, said = answers("sft", *GIVEN, "--run-dir", "run")
    wanted = ["folder", "file"][:: 1 if name in entries.FILES else -1]
    assert code == 7 and f"{name} is a {wanted[0]}, and a run has a {wanted[1]} of that name; move it away" in said, (
        said
    )


RUN = {"method": "sft", "versions": {}, "starts": [{"time": "2026-01-01T00:00:00", "command": ["jaxrlhf"]}]}


@pytest.mark.parametrize(
    "record",
    [
        "[]",
        "[" * 100_000,
        "9" * 5000,
        json.dumps(RUN | {"method": ["sft"]}),
        json.dumps(RUN | {"method": {"a": 1}}),
        json.dumps(RUN | {"starts": []}),
        json.dumps(RUN | {"starts": {"a": 1}}),
        json.dumps(RUN | {"starts": ["a"]}),
        json.dumps(RUN | {"starts": [{"command": 5}]}),
        json.dumps(RUN | {"starts": [{"command": [5]}]}),
        json.dumps(RUN | {"starts": [{"directory": 5}]}),
        json.dumps(RUN | {"starts": [{"end": "yesterday"}]}),
        json.dumps(RUN | {"starts": [{"peak_memory": {"host": "a"}}]}),
        json.dumps(RUN | {"starts": [{"step": "a"}]}),
        json.dumps(RUN | {"versions": 5}),
    ],
    ids=lambda record: record[:60],
)
def test_a_run_record_of_other_types(answers, tmp_path, record):
    (tmp_path / "run" / "checkpoints" / "1").mkdir(parents=True)
    (tmp_path / "run" / "run.json").write_text(record)
    (tmp_path / "run" / "config.yaml").write_text("# jaxrlhf sft, every option resolved\n")
    (tmp_path / "run" / "metrics.jsonl").write_text('{"step": 1, "loss": 1.0}\n')
    assert answers("export", "run", "new")[0] == 7
    code, said = answers("sft", *GIVEN, "--run-dir", "run")
    assert code == 7 and "run.json" in said
    assert answers("report", "run")[0] == 0
    assert "run.json cannot be read" in (tmp_path / "run" / "report.html").read_text()


@pytest.mark.parametrize(
    "log",
    [
        "[]\n",
        "[" * 100_000 + "\n",
        '{"loss": 1}\n',
        '{"step": "a"}\n',
        '{"step": 1, "loss": [1]}\n',
        '{"step": 1, "loss": "x"}\n',
        '{"step": 1, "loss": true}\n',
        '{"step": 1, "loss": null}\n',
        '{"step": ' + "9" * 5000 + "}\n",
    ],
    ids=lambda log: log[:40],
)
def test_a_log_of_other_types(answers, tmp_path, log):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(RUN))
    (tmp_path / "run" / "metrics.jsonl").write_text(log)
    assert answers("plot", "run")[0] == 4
    assert answers("report", "run")[0] == 0
    assert "metrics.jsonl cannot be read" in (tmp_path / "run" / "report.html").read_text()

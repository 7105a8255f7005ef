"""The command line: imports, output and exit codes."""

import dataclasses
import errno
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import jax
import pytest
import yaml

from jaxrlhf import __main__, cli, errors, runs, weights
from jaxrlhf.cli import evaluation as commands_evaluation
from jaxrlhf.cli import main, next_steps, training
from jaxrlhf.cli import models as commands_models
from jaxrlhf.cli.commands import COMMANDS, Command
from jaxrlhf.cli.models import reward_of_run
from jaxrlhf.config import Data, PPOConfig, RewardConfig, RewardSource, Sampling, TokenizerSource
from jaxrlhf.config import text as config_text
from jaxrlhf.config.file import METHODS, load_config, method_of, presets
from jaxrlhf.config.schema import keys
from jaxrlhf.evaluation import comparison, comparison_console

GIVEN = ["--model.path", "m", "--data.path", "d"]
HEAVY = ("jax", "flax", "transformers", "datasets", "numpy", "orbax", "torch", "matplotlib")


def test_ctrl_c_while_modules_are_imported_is_a_message(monkeypatch, capsys):
    monkeypatch.setattr(cli, "main", lambda: (_ for _ in ()).throw(KeyboardInterrupt))
    assert __main__.main() == 130 and capsys.readouterr().err == "jaxrlhf: interrupted\n"


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (["--help"], 0),
        (["ppo", "--help"], 0),
        (["generate", "--help"], 0),
        (["new", "ppo"], 0),
        (["--version"], 0),
        (["ppo", "ppo", "--optim.lr", "1"], 3),
        (["sft", "no_such_file.yaml"], 3),
        (["pp"], 2),
        ([], 2),
    ],
)
def test_help_and_config_errors_import_nothing_heavy(arguments, code):
    program = (
        "import sys; from jaxrlhf.cli import main; code = main(sys.argv[1:]); "
        f"print('LOADED', [name for name in {HEAVY} if name in sys.modules]); sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True, text=True)
    assert done.returncode == code, done.stderr
    assert done.stdout.endswith("LOADED []\n")
    assert "Traceback" not in done.stderr


def test_a_command_prints_warnings_of_the_package_as_plain_lines_and_others_as_python_does():
    program = """
import sys, warnings
from jaxrlhf import cli
sys.argv = ["jaxrlhf", "--version"]
cli.main()
warn = compile("import warnings; warnings.warn('two\\\\nlines', stacklevel=1)", cli.__file__, "exec")
exec(warn, {"__name__": "x"})
warnings.warn("elsewhere")
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr.startswith("jaxrlhf: two\nlines\n<string>:") and "UserWarning: elsewhere" in done.stderr


def test_a_closed_output_pipe_is_no_error():
    command = [sys.executable, "-m", "jaxrlhf", "new", "ppo"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
    assert process.returncode == 0


@pytest.mark.parametrize("method", METHODS)
def test_every_flag_and_default_that_help_shows_is_read_in_either_spelling(method, capsys):
    assert main([method, "--help"]) == 0
    shown = capsys.readouterr().out
    assert "--fresh" in shown
    blocks = [block.partition("\n\n")[0] for block in shown.split("\n  --")[1:]]
    defaults = {block.split()[0]: " ".join(block.split()).rpartition("(default: ")[2][:-1] for block in blocks}
    flags = {key for key, annotation in keys(METHODS[method]) if not dataclasses.is_dataclass(annotation)}
    assert {key for key in defaults if not key.endswith((".N.KEY", ".NAME"))} == flags
    for spell in (str, lambda key: key.replace("_", "-")):
        overrides = [(spell(key), defaults[key]) for key in sorted(flags)]
        assert load_config(method, None, overrides, partial=True) == METHODS[method]()


def test_hyphens_and_underscores_are_one(trained, capsys):
    assert main(["reward", *GIVEN, "--frozen-trunk", "true", "--run-dir", "x", "--dry_run"]) == 0
    assert (trained[0].config.frozen_trunk, trained[0].config.run_dir, trained[0].did) == (True, "x", [])
    assert main(["sft", *GIVEN, "--completion-only=false", "--use_lora"]) == 0
    assert not trained[1].config.completion_only and trained[1].config.lora.enabled
    capsys.readouterr()
    assert main(["generate", "m", "--prompt", "x", "--max_new_tokens", "5", "--top_p=3"]) == 3
    assert "sampling.top_p: must be at most 1, got 3" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "messages"),
    [
        (["generate", "m", "--prompt", "x", "--temperature", "0"], ["temperature", "--greedy"]),
        (["generate", "m", "--prompt", "x", "--top-k", "-1"], ["top_k: must be at least 0, got -1", "0: disabled"]),
        (["sft", *GIVEN, "--train.max_steps", "-1"], ["max_steps: must be at least 1", "None: no limit"]),
        (["sft", "--model-path", "m"], ["unknown key 'model_path'; did you mean 'model.path'"]),
        (
            ["ppo", "ppo", *GIVEN, "--reward.model", "r", "--ppo.batch_size", "20"],
            [
                "override: ppo.micro_batch_size (8) must divide a mini-batch (10 rows",
                "ppo.micro_batch_size are set by preset ppo",
            ],
        ),
        (["sft", "sft", *GIVEN, "--data.validation_path", "v"], ["data.validation_fraction is set by preset sft"]),
        (["ppo", "ppo", "--bf16", "--fresh"], ["TRL's bf16 is model.compute_dtype and model.param_dtype here"]),
    ],
)
def test_a_value_or_flag_of_another_library_is_answered_with_ours(capsys, arguments, messages):
    assert main(arguments) == 3
    said = capsys.readouterr().err
    assert all(message in said for message in messages), said


@pytest.mark.parametrize(
    ("method", "flag", "ours"),
    [
        ("sft", "per_device_train_batch_size", "train.batch_size and train.micro_batch_size"),
        ("ppo", "per-device-train-batch-size", "ppo.batch_size and ppo.micro_batch_size"),
        ("grpo", "gradient_accumulation_steps", "grpo.batch_size and grpo.micro_batch_size"),
        ("sft", "gradient_checkpointing", "model.remat"),
        ("ppo", "ppo_epochs", "ppo.num_ppo_epochs"),
        ("ppo", "init_kl_coef", "ppo.kl_coef"),
        ("ppo", "ppo.target", "ppo.kl_target"),
        ("dpo", "save_total_limit", "checkpoint.keep"),
    ],
)
def test_flags_of_trl_are_answered_with_ours(capsys, method, flag, ours):
    assert main([method, *GIVEN, f"--{flag}", "1"]) == 3
    assert f"is {ours} here" in capsys.readouterr().err


def test_a_prompt_with_a_backslash_n_is_noted(model_folder, capsys):
    assert main(["generate", str(model_folder), "--prompt", r"a\nb", "--max-new-tokens", "1"]) == 0
    assert "note: the prompt has a backslash and an n" in capsys.readouterr().err


def fail_with(monkeypatch, error):
    def run(options, overrides):
        raise error

    monkeypatch.setitem(COMMANDS, "demo", Command(run, "fails"))


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (errors.ConfigError("why"), 3),
        (errors.DataError("why"), 4),
        (errors.RewardError("why"), 5),
        (errors.NumericsError("why"), 6),
        (errors.StorageError("why"), 7),
        (errors.OutOfMemory("why"), 8),
        (errors.Preempted("why"), 75),
        (MemoryError("why"), 8),
        (RuntimeError("RESOURCE_EXHAUSTED: why"), 8),
        (OSError(errno.ENOSPC, "why", "file"), 7),
        (OSError(errno.EIO, "why"), 7),
        (RuntimeError("can't start new thread"), 8),
        (ImportError("a.so: failed to map segment from shared object"), 8),
        (KeyboardInterrupt(), 130),
    ],
)
def test_every_kind_of_error_has_its_exit_code_and_one_message(monkeypatch, capsys, error, code):
    fail_with(monkeypatch, error)
    assert main(["demo"]) == code
    said = capsys.readouterr().err
    assert said.startswith("jaxrlhf: ")
    assert "Traceback" not in said
    assert ("micro_batch_size" in said) == (code == 8 and not isinstance(error, errors.OutOfMemory))


@pytest.mark.parametrize("arguments", [["--debug", "demo"], ["demo", "--debug"]])
def test_debug_anywhere_shows_the_traceback(monkeypatch, capsys, arguments):
    fail_with(monkeypatch, errors.DataError("why"))
    assert main(arguments) == 4
    said = capsys.readouterr().err
    assert "Traceback" in said
    assert said.endswith("jaxrlhf: error: why\n")


def test_an_unexpected_exception_is_one_line_and_its_traceback_is_in_a_file(monkeypatch, capsys, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(runs, "opened", None)
    fail_with(monkeypatch, ZeroDivisionError("a bug\x1b[2J\nin two lines"))
    assert main(["demo"]) == 70
    (line,) = capsys.readouterr().err.splitlines()
    kept = tmp_path / "jaxrlhf" / "logs" / "error.txt"
    assert line.startswith("jaxrlhf: unexpected error: ZeroDivisionError: a bug\\x1b[2J at jaxrlhf/cli/__init__.py:")
    assert line.endswith(f"; the traceback is in {kept}")
    assert "Traceback" in kept.read_text() and "\x1b" not in kept.read_text() and kept.stat().st_mode & 0o77 == 0


def test_an_error_of_a_run_leaves_its_traceback_in_the_run(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(runs, "opened", tmp_path)
    fail_with(monkeypatch, errors.RewardError("why"))
    assert main(["demo"]) == 5
    assert capsys.readouterr().err == "jaxrlhf: error: why\n"
    assert "RewardError: why" in (tmp_path / "logs" / "error.txt").read_text()


def test_the_text_of_an_error_cannot_reach_the_terminal_and_is_shortened(monkeypatch, capsys):
    fail_with(monkeypatch, errors.DataError("column \x1b]0;title\x07 \u202e" + "x" * 3_000_000))
    assert main(["demo", "--debug"]) == 4
    said = capsys.readouterr().err
    assert "column \\x1b]0;title\\x07 \\u202e" in said and not {"\x1b", "\x07", "\u202e"} & set(said)
    assert len(said.rpartition("jaxrlhf: error: ")[2]) < 30_000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generat"], "unknown command 'generat'; did you mean 'generate'?"),
        (["generate", "m", "--promt", "x"], "unknown option '--promt'; did you mean '--prompt' or '--prompts'?"),
        (["ppo", "c.yaml", "--frsh"], "unknown option '--frsh'; did you mean '--fresh'?"),
        (["train"], "commands that train: sft reward dpo ppo grpo"),
        (["plot", "run", "--seed", "1"], "unknown option '--seed'"),
        (["generate", "m"], "give --prompt TEXT, or --prompts FILE"),
        (["generate", "m", "--prompt", "x", "--prompts", "f"], "give --prompt TEXT, or --prompts FILE"),
        (["compare", "m", "--prompts", "f"], "jaxrlhf compare: error: the following arguments are required: B;"),
        (["new", "pp"], "invalid choice: 'pp'"),
        (["sft"], "give a CONFIG.yaml"),
        (["demo", "--seed", "-1"], "expected an integer of at least 0, got '-1'"),
        (["generate", "m", "--prompt", "x", "--n", "0"], "expected an integer of at least 1, got '0'"),
        (["generate", "m", "--prompt", "x", "--n", "-1"], "expected an integer of at least 1, got '-1'"),
        (["generate", "m", "--prompt", "x", "--max-new-tokens", "0"], "expected an integer of at least 1, got '0'"),
        (["evaluate", "m", "--prompts", "p", "--num-prompts", "0"], "expected an integer of at least 1, got '0'"),
        (
            ["evaluate", "m", "--prompts", "p", "--num-completions", "1.5"],
            "expected an integer of at least 1, got '1.5'",
        ),
    ],
)
def test_misuse_is_exit_code_2_with_a_hint(capsys, arguments, message):
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_an_override_without_a_value_is_refused(capsys):
    assert main(["ppo", "ppo", "--optim.eps", "--fresh"]) == 3
    assert "override --optim.eps has no value" in capsys.readouterr().err


@pytest.fixture
def trained(monkeypatch):
    """Stands in for the trainers and keeps what they were given."""
    seen = []

    class Trainer:
        def __init__(self, config, *, fresh=False):
            self.config, self.fresh, self.did = config, fresh, []
            seen.append(self)

        def train(self):
            self.did.append("train")

        def describe(self):
            return "what would be done"

    def dry_run(config, *, fresh, colour):
        print(config_text.dump(config))
        print(Trainer(config, fresh=fresh).describe())

    monkeypatch.setattr(training, "_trainer_class", lambda method: Trainer)
    monkeypatch.setattr("jaxrlhf.plan.dry_run.show", dry_run)
    return seen


def test_a_config_with_overrides_reaches_the_trainer(trained, tmp_path):
    path = tmp_path / "my.yaml"
    path.write_text("optim: {learning_rate: 1}\nmodel: {path: m}\ndata: {path: d}\n")
    arguments = ["--optim.learning-rate=1e-4", str(path), "--seed", "3", "--fresh", "--data.template", "-{x}: y"]
    assert main(["sft", *arguments]) == 0
    (trainer,) = trained
    assert (trainer.config.optim.learning_rate, trainer.config.seed, trainer.fresh) == (1e-4, 3, True)
    assert trainer.config.data.template == "-{x}: y"
    assert trainer.did == ["train"]


def test_dry_run_does_not_train_and_prints_no_next_steps(trained, capsys):
    assert main(["sft", *GIVEN, "--dry-run"]) == 0
    printed = capsys.readouterr().out
    assert trained[0].did == []
    assert "what would be done" in printed and "next:" not in printed


def test_a_run_ends_with_next_steps_unless_it_is_quiet(trained, capsys):
    assert main(["sft", *GIVEN, "--run_dir", "my runs/a"]) == 0
    assert "next:\n  jaxrlhf chat 'my runs/a'" in capsys.readouterr().out
    assert main(["sft", *GIVEN, "--logging.quiet", "true"]) == 0
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize("method", [*METHODS, "best", "pairs", "prompts"])
def test_next_steps_are_commands_with_the_paths_of_the_run(method, monkeypatch):
    if method in METHODS:
        data = {"path": "my data.jsonl", "template": "{q}\n$a"}
        config = METHODS[method](run_dir="runs/it's", model={"path": "base model"}, data=data)
        lines = next_steps.after_training(config)
    else:
        lines = next_steps.after_selection("base model", "my data.jsonl", method)
    seen = []
    for verb, command in list(COMMANDS.items()):
        run = lambda options, overrides, verb=verb: seen.append((verb, vars(options), dict(overrides)))  # noqa: E731
        monkeypatch.setitem(COMMANDS, verb, dataclasses.replace(command, run=run))
    for line in lines:
        assert main(shlex.split(line, comments=True)[1:]) == 0, line
    for verb, options, overrides in seen:
        given = str([*options.values(), *overrides.values()])
        assert "runs/it's" in given or "base model" in given or (method not in METHODS and verb == "data"), verb
        if method in METHODS and "my data.jsonl" in given:  # options that say how the data is read are kept
            assert yaml.safe_load(overrides["data.template"]) == "{q}\n$a", verb
    assert method == "sft" or any("my data.jsonl" in str(call) for call in seen)


@pytest.mark.parametrize("method", METHODS)
def test_presets_are_found_by_name_and_valid(trained, method):
    needed = ["--reward.function", "r.py:f"] if method in ("ppo", "grpo") else []
    needed += ["--teacher.path", "t"] if method == "distill" else []
    assert main([method, method, *GIVEN, *needed]) == 0
    assert trained[0].config != METHODS[method](), "a preset says something"


def test_every_preset_of_a_recipe_says_its_method_and_loads(trained):
    recipes = {name: path for name, path in presets().items() if name.startswith("recipes/")}
    for name, path in recipes.items():
        assert main([method_of(path), name, *GIVEN]) == 0, name
    assert recipes and len(trained) == len(recipes)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("rewrd", "(distill, dpo, grpo, ppo, reward, sft); did you mean 'reward'?"),
        ("recipes/gpt2/pppo.yaml", "did you mean 'recipes/gpt2/ppo'"),
        ("recipes/gpt2/", "is a folder of presets; choose one: recipes/gpt2/"),
        ("recipes/gpt2/ppo/own", "(distill, dpo, grpo, ppo, reward, sft)"),
    ],
)
def test_an_unknown_preset_is_refused_with_a_suggestion(capsys, name, message):
    assert main(["ppo", name]) == 3
    assert message in capsys.readouterr().err


def test_new_prints_a_config_that_reads_back(capsys, tmp_path):
    assert main(["new", "reward"]) == 0
    (tmp_path / "r.yaml").write_text(capsys.readouterr().out)
    assert load_config("reward", tmp_path / "r.yaml", partial=True) == METHODS["reward"]()


def test_plot_prints_the_paths_of_what_it_wrote(tmp_path, capsys):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0}\n')
    a, b = tmp_path / "a", tmp_path / "b"
    assert main(["plot", str(a)]) == 0
    assert capsys.readouterr().out.split() == [str(a / "plot.png"), str(a / "metrics.csv")]
    picture = tmp_path / "both.svg"
    assert main(["plot", str(a), str(b), "--output", str(picture)]) == 0
    assert capsys.readouterr().out.split() == [str(picture), str(a / "metrics.csv"), str(b / "metrics.csv")]
    assert picture.read_text().startswith("<?xml")


@pytest.fixture
def run(tmp_path) -> Path:
    """A run directory with a checkpoint and an export, that came to its end."""
    run = tmp_path / "run"
    (run / "checkpoints" / "20").mkdir(parents=True)
    (run / "export").mkdir()
    (run / "export" / "config.json").write_text("{}")
    (run / "config.yaml").write_text("model: {path: m}\ndata: {path: d}\n")
    (run / "run.json").write_text(json.dumps({"method": "sft", "starts": [{"outcome": "done"}]}))
    return run


@pytest.fixture
def exported(monkeypatch) -> list[tuple]:
    """What was asked of the export of a checkpoint."""
    seen = []
    monkeypatch.setattr("jaxrlhf.training.export.export", lambda *asked, merge_lora: seen.append(asked))
    return seen


def test_export_of_a_finished_run_copies_its_export(tmp_path, exported, run):
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert not exported
    assert main(["export", str(run), str(tmp_path / "out")]) == 7, "not over something"
    assert main(["export", str(tmp_path), str(tmp_path / "out2")]) == 4, "not a run"


def test_export_uploads_what_it_wrote_and_keeps_it_if_that_fails(tmp_path, exported, run, monkeypatch, capsys):
    asked = []
    monkeypatch.setattr("jaxrlhf.weights.upload.push_to_hub", lambda *a, **k: asked.append((*a, k)) or "https://hub/x")
    assert main(["export", str(run), str(tmp_path / "a"), "--push-to-hub", "org/model"]) == 0
    assert main(["export", str(run), str(tmp_path / "b"), "--push-to-hub", "hf://org/model", "--public"]) == 0
    assert asked == [
        (tmp_path / "a", "org/model", {"private": True}),
        (tmp_path / "b", "org/model", {"private": False}),
    ]
    assert "uploaded to https://hub/x" in capsys.readouterr().out
    assert main(["export", str(run), str(tmp_path / "c"), "--push-to-hub", "a/b/c"]) == 3
    assert main(["export", str(run), str(tmp_path / "c"), "--public"]) == 3
    assert not (tmp_path / "c").exists(), "refused before it is written"
    monkeypatch.undo()
    assert main(["export", str(run), str(tmp_path / "d"), "--push-to-hub", "org/model"]) == 7, "the tests are offline"
    assert "HF_HUB_OFFLINE" in capsys.readouterr().err and (tmp_path / "d" / "config.json").is_file()


@pytest.mark.parametrize("last", [{}, {"outcome": "preempted"}])
@pytest.mark.parametrize("before", [True, False])
def test_export_of_an_unfinished_run_uses_its_checkpoint(tmp_path, exported, run, last, before):
    (run / "run.json").write_text(json.dumps({"method": "sft", "starts": [{"outcome": "done"}, last]}))
    if not before:
        shutil.rmtree(run / "export")
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert exported == [(run, tmp_path / "out", "policy")]


def test_export_without_a_checkpoint_copies_the_existing_export(tmp_path, exported, run):
    (run / "run.json").write_text(json.dumps({"method": "sft", "starts": [{}]}))
    (run / "checkpoints" / "20").rmdir()
    assert main(["export", str(run), str(tmp_path / "out")]) == 0
    assert (tmp_path / "out" / "config.json").read_text() == "{}"
    assert not exported


def test_export_of_the_critic_uses_the_checkpoint(tmp_path, exported, run):
    assert main(["export", str(run), str(tmp_path / "out"), "--role", "critic"]) == 0
    assert exported == [(run, tmp_path / "out", "critic")], "not the export of the policy that is there"


def test_export_refuses_a_missing_critic_and_a_missing_checkpoint(tmp_path, run, capsys):
    assert main(["export", str(run), str(tmp_path / "out"), "--role", "critic"]) == 3
    assert "only ppo has a critic" in capsys.readouterr().err
    (run / "run.json").write_text(json.dumps({"method": "sft", "starts": [{}]}))
    (run / "checkpoints" / "20").rename(run / "checkpoints" / "corrupt-20")
    shutil.rmtree(run / "export")
    assert main(["export", str(run), str(tmp_path / "out")]) == 7
    assert "has no checkpoint yet" in capsys.readouterr().err


def test_export_with_an_unreadable_record_is_refused(tmp_path, run, capsys):
    (run / "run.json").write_text("{")
    assert main(["export", str(run), str(tmp_path / "out")]) == 7
    assert "run.json cannot be read" in capsys.readouterr().err


ROWS = {
    "sft": {"prompt": "ab", "completion": "cd"},
    "reward": {"prompt": "ab", "chosen": "c", "rejected": "d"},
    "ppo": {"prompt": "ab"},
}


@pytest.mark.parametrize("method", ROWS)
def test_use_lora_enables_adapters(method, tiny_model, tmp_path, capsys):
    data, reward = tmp_path / "d.jsonl", tmp_path / "r.py"
    data.write_text(f"{json.dumps(ROWS[method])}\n" * 4)
    reward.write_text("def f(completions):\n    return [0.0] * len(completions)\n")
    given = ["--model.path", str(tiny_model), "--model.init", "random", "--data.path", str(data)]
    given += ["--run_dir", str(tmp_path / "run")]
    given += ["--sampling.response_length", "8"] if method != "reward" else []
    given += ["--reward.function", f"{reward}:f", "--checkpoint.grace", "1e-9"] if method == "ppo" else []
    assert main([method, *given, "--use-lora", "--lora.rank", "3", "--lora.quantize", "nf4", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "adapters of rank 3 train, the base model, in nf4, is frozen" in shown
    assert not (tmp_path / "run").exists()
    (tmp_path / "again.yaml").write_text(shown.partition("\n\n")[0])  # the resolved config reads back
    again = load_config(method, tmp_path / "again.yaml")
    assert (again.lora.rank, again.model.path, again.data.path) == (3, str(tiny_model), str(data))
    first = {"sft": "1: ab[[cd</s>]]", "reward": "1 rejected: ab[[d</s>]]", "ppo": "1: ab\n"}[method]
    assert "first batch, " in shown and first in shown
    assert re.search(r"memory: at most [\d.e-]+ GB .*: it fits\n", shown)
    assert re.search(r"checkpoints: [\d.e-]+ GB each, written in about [\d.e-]+ s in the background, after", shown)
    assert "up to 3 of them are on disk at once" in shown
    steps = {"sft": 1, "reward": 1, "ppo": 64}[method]
    assert re.search(rf"time: about [\d.e-]+ s for the matrix products of a step .* for {steps} steps\.", shown)
    warned = "warning: a step, rollout aside, takes longer than checkpoint.grace (1e-09 s)" in shown
    assert warned == (method == "ppo")
    assert f"would write to {tmp_path / 'run'}: config.yaml" in shown


def test_plan_reports_a_run_that_fits(tiny_model, tmp_path, capsys):
    """What the file is for is said by its comment; its model has adapters because the command line says so."""
    (tmp_path / "d.jsonl").write_text(f"{json.dumps(ROWS['reward'])}\n" * 4)
    file = tmp_path / "my.yaml"
    file.write_text(f"# jaxrlhf reward\nmodel: {{path: {tiny_model}}}\ndata: {{path: {tmp_path}/d.jsonl}}\n")
    assert main(["plan", str(file), "--model.init", "random", "--use-lora"]) == 0
    shown = capsys.readouterr().out
    assert "frozen models" in shown and "it fits" in shown
    assert "a checkpoint is " in shown and "up to 3 of them are on disk at once" in shown


def test_export_merges_adapters_of_a_finished_run(tmp_path, monkeypatch, run, exported):
    """Of a run over a packed model they are merged by the run itself: its export does not say what they were over."""
    merged = []
    monkeypatch.setattr("jaxrlhf.training.export.merge", lambda *asked: merged.append(asked))
    (run / "export" / "adapter_config.json").write_text("{}")
    assert main(["export", str(run), str(tmp_path / "out"), "--merge-lora"]) == 0
    assert (merged, exported) == ([(run / "export", tmp_path / "out")], [])
    (run / "config.yaml").write_text("model: {path: m}\ndata: {path: d}\nlora: {enabled: true, quantize: nf4}\n")
    assert main(["export", str(run), str(tmp_path / "out"), "--merge-lora"]) == 0
    assert (len(merged), exported) == (1, [(run, tmp_path / "out", "policy")])
    assert main(["export", str(run / "export"), str(tmp_path / "out"), "--merge-lora"]) == 0
    assert merged[1:] == [(run / "export", tmp_path / "out")], "a folder of adapters alone"


@pytest.fixture(scope="module")
def model_folder(tiny_model, tmp_path_factory) -> Path:
    model, params = weights.load(tiny_model, init="random", key=jax.random.key(1))
    return weights.export(tmp_path_factory.mktemp("models") / "m", model, params, source=tiny_model)


def test_generate_prints_the_prompt_and_its_completion(model_folder, capsys):
    arguments = ["generate", str(model_folder), "--prompt", "hello", "--max-new-tokens", "8", "--seed", "5"]
    assert main(arguments) == 0
    first = capsys.readouterr().out
    assert first.startswith("hello")
    assert len(first) <= len("hello") + 8 + 1
    assert main(arguments) == 0
    assert capsys.readouterr().out == first
    assert main([*arguments, "--n", "3"]) == 0
    several = capsys.readouterr().out
    assert several.startswith(f"--- 1 of 3 ---\n{first}")
    assert len(set(several.split("---\n")[1:])) == 3


def test_generate_with_an_empty_prompt_starts_from_bos(model_folder, capsys):
    assert main(["generate", str(model_folder), "--prompt", "", "--greedy", "--max-new-tokens", "5"]) == 0
    assert len(capsys.readouterr().out) <= 6


def test_generate_warns_if_the_context_limits_the_completion(model_folder, capsys):
    assert main(["generate", str(model_folder), "--prompt", "abc", "--max-new-tokens", "100000"]) == 0
    said = capsys.readouterr().err
    assert "note: 100000 tokens were asked for, but after a prompt of 3 the context of 64 has room for 61" in said


def test_generate_refuses_a_prompt_longer_than_the_context(model_folder, capsys):
    assert main(["generate", str(model_folder), "--prompt", "a" * 64]) == 4
    assert "the prompt has 64 tokens and the model's context is 64" in capsys.readouterr().err


def test_generate_gives_the_known_start_of_stories260k(shared_data, capsys):
    model = shared_data / "models" / "stories260K"
    assert main(["generate", str(model), "--prompt", "", "--greedy", "--max-new-tokens", "40"]) == 0
    assert capsys.readouterr().out.startswith("Once upon a time, there was a little girl named Lily.")


@pytest.mark.parametrize("command", ["evaluate", "compare", "generate"])
def test_prompts_default_to_the_template_of_the_run(tmp_path, monkeypatch, command):
    data = Data(path="d", template="<|user|> {input}\n", control_tokens=True)
    for name, section in {"plain": Data(path="d"), "other": data}.items():
        (tmp_path / name).mkdir()
        settings = config_text.dump(PPOConfig(data=section, reward=RewardSource(model="m")))
        (tmp_path / name / "config.yaml").write_text(f"# jaxrlhf ppo, every option resolved\n{settings}")
    seen = []

    def load(method, path, overrides=(), *, partial):
        config = load_config(method, path, overrides, partial=partial)
        if path:
            return config
        seen.append(config.data)
        raise KeyboardInterrupt

    for module in (commands_models, commands_evaluation):
        monkeypatch.setattr(module, "load_config", load)

    plain, other = str(tmp_path / "plain"), str(tmp_path / "other")
    arguments = {"evaluate": [other], "compare": [plain, other], "generate": [other, "--out", "o.jsonl"]}[command]
    given = [*arguments, "--prompts", "p.jsonl"]
    expected = [(data.template, True), ("{question}", True)]
    for more in ([], ["--data.template", "{question}"]):
        assert main([command, *given, *more]) == 130
    assert [(read.template, read.control_tokens) for read in seen] == expected
    assert {read.path for read in seen} == {"p.jsonl"}


def test_sampling_and_reward_default_to_those_of_the_run(tmp_path):
    sampling = Sampling(response_length=7, stop_strings=("\n", "Q: 'x'"), stop_token_ids=(3,), temperature=0.7)
    reward = RewardSource(model="m", components=({"function": "r.py:f", "options": {"low": 3}},))  # type: ignore[arg-type]
    settings = config_text.dump(PPOConfig(sampling=sampling, reward=reward))
    (tmp_path / "config.yaml").write_text(f"# jaxrlhf ppo, every option resolved\n{settings}")
    again = load_config(
        "ppo", None, commands_models.overrides_from_run(str(tmp_path), "sampling", "reward"), partial=True
    )
    assert again.sampling == sampling and again.reward == reward
    (tmp_path / "config.yaml").write_text("# jaxrlhf dpo, every option resolved\nsampling: {temperature: 0.7}\n")
    again = load_config(
        "ppo", None, commands_models.overrides_from_run(str(tmp_path), "sampling", "reward"), partial=True
    )
    assert again.sampling == Sampling(temperature=0.7) and not again.reward.parts(), "there is no reward in DPO's"
    assert (
        commands_models.overrides_from_run(str(tmp_path), "reward")
        == commands_models.overrides_from_run("hf://org/name", "reward")
        == []
    )


def test_evaluations_of_a_run_have_the_date_of_its_chat_template(tmp_path):
    for name, date in (("first", ""), ("second", "2024-02-29")):
        settings = config_text.dump(RewardConfig(tokenizer=TokenizerSource(template_date=date)))
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"# jaxrlhf reward, every option resolved\n{settings}")
    overrides = commands_models.date_of_run("hf://org/name", str(tmp_path / "first"), str(tmp_path / "second"))
    assert load_config("ppo", None, overrides, partial=True).tokenizer.template_date == "2024-02-29"


def test_compare_uses_the_config_of_the_model_with_a_reward(tmp_path, monkeypatch):
    for method, line in (("sft", "sampling: {top_k: 5}"), ("grpo", "reward: {function: r.py:f}")):
        (tmp_path / method).mkdir()
        (tmp_path / method / "config.yaml").write_text(f"# jaxrlhf {method}, every option resolved\n{line}\n")
    seen = []
    monkeypatch.setattr(comparison, "compare", lambda configs, **asked: seen.extend(configs))
    monkeypatch.setattr(comparison_console, "render", lambda result, show: "")
    models = [str(tmp_path / method) for method in ("sft", "grpo")]
    assert main(["compare", *models, "--prompts", "p.jsonl"]) == 0
    assert main(["compare", models[0], "m", "--prompts", "p.jsonl", "--reward", "r.py:f"]) == 0
    assert [(config.reward.function, config.sampling.top_k) for config in seen] == [("r.py:f", 0)] * 2 + [
        ("r.py:f", 5)
    ] * 2


def test_convert_rm_says_what_to_install_without_torch(monkeypatch, capsys, tmp_path, tiny_model):
    monkeypatch.setitem(sys.modules, "torch", None)
    assert main(["convert-rm", "rm.pt", str(tiny_model), str(tmp_path / "out")]) == 3
    assert "torch, which is not installed: run `pip install torch`" in capsys.readouterr().err


def test_the_reward_of_a_comparison_is_that_of_the_first_run_that_names_one(tmp_path):
    for name, reward in (("python", ""), ("named", "my.py:score")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.yaml").write_text(f"# jaxrlhf ppo, a test\nreward: {{function: '{reward}'}}\n")
    runs = [str(tmp_path / name) for name in ("python", "named")]
    assert dict(reward_of_run(*runs))["reward.function"] == '"my.py:score"'
    assert not reward_of_run(runs[0], "somewhere/else")


def test_the_next_step_of_a_model_with_a_short_context_has_a_response_length(tiny_model):
    config = RewardConfig(model={"path": str(tiny_model)}, data={"path": "pairs.jsonl"})
    assert any("--sampling.response_length 21" in line for line in next_steps.after_training(config))

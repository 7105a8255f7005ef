"""Commands that use existing models: generate, export, convert-rm, and parts of others. Heavy modules are imported when
needed."""

import argparse
import contextlib
import json
import shutil
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TextIO

from jaxrlhf.cli import next_steps
from jaxrlhf.config import text as config_text
from jaxrlhf.config.file import METHODS, load_config, methods_with_sections
from jaxrlhf.config.reader import read_config
from jaxrlhf.errors import ConfigError, DataError, StorageError, visible
from jaxrlhf.files import check_links
from jaxrlhf.selection.rule import Rule

Options = argparse.Namespace
Overrides = list[tuple[str, str]]


def announce_compilations(stream: TextIO, *, quiet: bool = False) -> contextlib.AbstractContextManager[None]:
    """Print a line to `stream` for each program in the block that takes long to compile or load, unless `quiet`."""
    from jaxrlhf import compilation

    return compilation.announce(lambda line: None if quiet else print(line, file=stream, flush=True))


@contextlib.contextmanager
def notes_on_stderr(*, quiet: bool = False) -> Iterator[None]:
    """Print warnings of the block, and its slow compilations unless `quiet`, to standard error, as standard output is
    for the result."""
    with announce_compilations(sys.stderr, quiet=quiet), warnings.catch_warnings(record=True) as caught:
        yield
    for warning in caught:
        print(f"note: {visible(str(warning.message))}", file=sys.stderr)


def generate(options: Options, overrides: Overrides) -> int | None:
    if (options.prompt is None) == (options.prompts is None):
        print("jaxrlhf generate: give --prompt TEXT, or --prompts FILE --out FILE.jsonl", file=sys.stderr)
        return 2
    overrides = [("model.path", options.model), *overrides]
    if options.prompts is not None:
        return _generate_selected(options, [("data.path", options.prompts), *overrides])
    for name in ("out", "best_by", "keep", "threshold", "min_pass_rate", "max_pass_rate", "fresh"):
        if getattr(options, name) not in (None, False):
            raise ConfigError(f"generate: --{name.replace('_', '-')} needs --prompts FILE; it has no use with --prompt")
    if "\\n" in options.prompt and "\n" not in options.prompt:
        print("note: the prompt has a backslash and an n; a newline in bash is $'...\\n...'", file=sys.stderr)
    run = overrides_from_run(options.model, "sampling") + environment_of_run([options.model], overrides)
    config = load_config("ppo", None, [*run, *overrides], partial=True)
    from jaxrlhf.evaluation import generation

    with notes_on_stderr(quiet=config.logging.quiet):
        texts = generation.complete(config, options.prompt, options.n)
    for i, text in enumerate(texts):
        if options.n > 1:
            print(f"--- {i + 1} of {options.n} ---")
        print(visible(text))
    return None


def _generate_selected(options: Options, overrides: Overrides) -> None:
    """`generate --prompts`: complete a file of prompts and write completions selected by their score."""
    if options.out is None:
        raise ConfigError("generate: --prompts needs --out FILE.jsonl, the file to write")
    reward: Overrides = []
    if options.best_by:
        path = Path(options.best_by)
        reward = _section_overrides("grpo" if methods_with_sections(path) == ["grpo"] else "ppo", path, "reward")
    has_reward = reward or any(key.startswith("reward.") for key, _ in overrides)
    run = overrides_from_run(options.model, *["sampling"] if has_reward else ["sampling", "reward"])
    run += date_of_run(options.model) + template_of_run(options.model)
    run += environment_of_run([options.model], overrides)
    config = load_config("ppo", None, [*run, *reward, *overrides], partial=True)
    if config.needs_reward and not config.reward.parts():
        raise ConfigError(
            "generate: --prompts selects completions by their reward; give --best-by FILE, a YAML file with a section "
            "`reward`, or --reward.model DIR or --reward.function path.py:name"
        )
    rule = Rule(options.keep or "best", options.threshold, options.min_pass_rate, options.max_pass_rate)
    from jaxrlhf.selection import select as selection

    with notes_on_stderr(quiet=config.logging.quiet):
        summary = selection.select(config, Path(options.out), rule, options.n, fresh=options.fresh)
    print(visible(f"{summary}\nwrote {options.out}"))
    if not config.logging.quiet:
        print("\n".join(["next:", *next_steps.after_selection(options.model, options.out, rule.keep)]))


def export(options: Options, overrides: Overrides) -> None:
    run, target = Path(options.run), Path(options.directory)
    is_run = (run / "config.yaml").is_file()
    if not is_run and not options.merge_lora:
        raise DataError(f"{run} is not a run directory: it has no config.yaml")
    if options.public and options.push_to_hub is None:
        raise ConfigError("export: --public is for --push-to-hub NAME, which is not given")
    _check_new(target)
    from jaxrlhf.weights import upload

    name = None if options.push_to_hub is None else upload.check_name(options.push_to_hub)
    _export(run, target, options, is_run)
    if name:
        address = upload.push_to_hub(target, name, private=not options.public)
        print(f"uploaded to {address}")
        for note in upload.notes(target):
            print(f"note: {visible(note)}", file=sys.stderr)


def _export(run: Path, target: Path, options: Options, is_run: bool) -> None:
    """Write the model of a run, or of a folder of adapters with its base model, to `target`."""
    from jaxrlhf import runs
    from jaxrlhf.training import export, pretrained

    if not is_run:
        print(export.merge(run, target))
        return
    method, last_start = runs.method_and_last_start(run)
    exported = run / "export"
    # only the run itself can merge adapters of a quantised model: its export does not record the quantisation
    quantised = load_config(method, run / "config.yaml", partial=True).lora.quantize != "none"
    # an unfinished run may have an export that is older than its checkpoints
    is_current = exported.is_dir() and (
        last_start.get("outcome") == "done" or not any((run / "checkpoints").glob("[0-9]*"))
    )
    if not is_current or options.role == "critic" or (options.merge_lora and quantised):
        with notes_on_stderr(quiet=True):
            export.export(run, target, options.role, merge_lora=options.merge_lora)
    elif options.merge_lora and (exported / "adapter_config.json").is_file():
        export.merge(exported, target)
    else:
        check_links(exported, subfolders=True)
        partial = target.with_name(target.name + ".part")
        shutil.rmtree(partial, ignore_errors=True)
        shutil.copytree(exported, partial).replace(target)
    print(target)
    if method == "reward" and (note := pretrained.padding_note(target)):
        print(f"note: {note}", file=sys.stderr)


def _check_new(target: Path) -> None:
    """Raise StorageError if an output folder exists and is not empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(f"{target} exists and is not empty; give a new folder")


def convert_rm(options: Options, overrides: Overrides) -> None:
    target = Path(options.directory)
    _check_new(target)
    from jaxrlhf.weights import rm_pt

    folder, unused = rm_pt.convert(Path(options.file), options.base, target)
    if unused:
        print(visible(f"note: names in {options.file} that were not used: {', '.join(unused)}"), file=sys.stderr)
    print(folder)


def overrides_from_run(
    model: str, *sections: str, methods: tuple[str, ...] = ("ppo", "grpo", "sft", "dpo")
) -> Overrides:
    """Sections of the config of a run directory as overrides; none if `model` is not a run of one of `methods`."""
    path = Path(model) / "config.yaml"
    first_line = read_config(path).partition("\n")[0] if path.is_file() else ""
    method = first_line.removeprefix("# jaxrlhf ").partition(",")[0]
    return _section_overrides(method, path, *sections) if method in methods else []


def _section_overrides(method: str, path: Path, *sections: str) -> Overrides:
    """Those of `sections` that the config file has, as overrides."""
    config = config_text.as_mapping(load_config(method, path, partial=True))
    return [(f"{name}.{key}", json.dumps(value)) for name in sections for key, value in config.get(name, {}).items()]


def date_of_run(*models: str) -> Overrides:
    """The date in the chat template of the first of `models` that is a run directory, as an override."""
    return _option_of_run("tokenizer.template_date", models)


def reward_of_run(*models: str) -> Overrides:
    """The reward of the first of `models` that is a run of PPO or GRPO whose config names one, as overrides. One that
    was given to its trainer in Python is not in the config."""
    named = ("reward.model", "reward.function", "reward.components")
    rewards = (overrides_from_run(model, "reward", methods=("ppo", "grpo")) for model in models)
    return next((r for r in rewards if any(key in named and json.loads(value) for key, value in r)), [])


def environment_of_run(models: Sequence[str], overrides: Overrides) -> Overrides:
    """The environment of the first of `models` that is a run of PPO or GRPO with one, unless `overrides` name
    another."""
    if any(key == "environment.function" for key, _ in overrides):
        return []
    found = (overrides_from_run(model, "environment", methods=("ppo", "grpo")) for model in models)
    return next((pairs for pairs in found if json.loads(dict(pairs).get("environment.function", '""'))), [])


def template_of_run(*models: str) -> Overrides:
    """The template of prompts of the first of `models` that is a run with one, and its reading of control tokens."""
    return [*_option_of_run("data.template", models), *_option_of_run("data.control_tokens", models)]


def _option_of_run(key: str, models: Sequence[str]) -> Overrides:
    """An option of the first of `models` that is a run directory and has it set, as an override."""
    section = key.partition(".")[0]
    pairs = (pair for model in models for pair in overrides_from_run(model, section, methods=tuple(METHODS)))
    return [pair for pair in pairs if pair[0] == key and json.loads(pair[1])][:1]

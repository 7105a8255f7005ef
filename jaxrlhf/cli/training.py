"""What each command does, and its arguments. What is heavy is imported by the command that needs it."""

import argparse
import functools
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from jaxrlhf import runtime
from jaxrlhf.cli.models import Options, Overrides, compare, compilations, evaluate, generate, notes
from jaxrlhf.config import file as config_file
from jaxrlhf.config import replace
from jaxrlhf.config import text as config_text
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError, DataError, OutOfMemory, StorageError
from jaxrlhf.selection.rule import KEEP


@dataclass(frozen=True)
class Command:
    """A verb: what it runs, and its arguments as keywords of argparse's add_argument by name."""

    run: Callable[[Options, Overrides], int | None]
    help: str
    arguments: dict[str, dict[str, Any]] = field(default_factory=dict)
    overrides: bool = False  # whether it takes --section.key value


def _whole(text: str, least: int = 0) -> int:
    """An argument that is a whole number."""
    if text.isdecimal() and int(text) >= least:
        return int(text)
    raise argparse.ArgumentTypeError(f"expected a whole number from {least} on, got '{text}'")


_count = functools.partial(_whole, least=1)


def _config_path(given: str | None) -> Path | None:
    """A config file, or a preset by name. Raises ConfigError for neither."""
    if given is None or Path(given).is_file():
        return Path(given) if given else None
    here = Path(__file__).parents[1]
    presets = {p.stem: p for folder in (here / "configs", here.parent / "configs") for p in folder.glob("*.yaml")}
    if given.removesuffix(".yaml") in presets:
        return presets[given.removesuffix(".yaml")]
    raise ConfigError(
        f"there is no config file {given}, nor a preset of that name ({', '.join(sorted(presets))})"
        f"{did_you_mean(given, list(presets))}"
    )


def train_help(method: str) -> int:
    import tyro

    print(
        f"usage: jaxrlhf {method} CONFIG.yaml [--section.key value ...] [--use-lora] [--fresh] [--dry-run] [--debug]\n"
        "\n"
        "CONFIG.yaml is a file or the name of a preset; `jaxrlhf new "
        + method
        + "` prints one with every key. Overrides come\n"
        "after it. An existing run directory is resumed; --fresh starts over. --dry-run says what would be done.\n"
    )
    cls = config_file.METHODS[method]
    try:
        tyro.cli(
            cls,
            default=cls(),
            args=["--help"],
            prog=f"jaxrlhf {method} CONFIG.yaml",
            config=(tyro.conf.FlagConversionOff,),
        )
    except SystemExit:  # how tyro ends; it leaves out lists that are empty
        for key, annotation in config_file.keys(cls):
            if element := config_text.render_element(annotation):
                flag = f"--{key.replace('_', '-')}"
                print(f"\n{flag} LIST, or {flag}.N.KEY VALUE for a key of its element N (from 0):\n")
                print("\n".join(element))
    return 0


def _train(options: Options, overrides: Overrides) -> int | None:
    if options.config is None and not overrides:
        print(f"jaxrlhf {options.verb}: give a CONFIG.yaml; `jaxrlhf new {options.verb}` prints one", file=sys.stderr)
        return 2
    short = [("lora.enabled", "true")] if options.use_lora else []
    config = config_file.read(options.verb, _config_path(options.config), [*short, *overrides])
    runtime.configure()
    if options.dry_run:
        told = replace(config, **{"model.merged_path": ""})  # it is for a run to write
        trainer = _trainer(options.verb)(told, fresh=options.fresh)
        print(config_text.dump(config))
        print(trainer.describe())
        return 0
    from jaxrlhf import runs

    runs.check_run_directory(config, options.verb, options.fresh)
    with compilations(sys.stdout, quiet=config.logging.quiet):
        _trainer(options.verb)(config, fresh=options.fresh).train()
    return 0


def _trainer(method: str) -> Any:
    from jaxrlhf.training.dpo.trainer import DPOTrainer
    from jaxrlhf.training.grpo.trainer import GRPOTrainer
    from jaxrlhf.training.ppo.trainer import PPOTrainer
    from jaxrlhf.training.reward.trainer import RewardTrainer
    from jaxrlhf.training.sft import SFTTrainer

    trainers = {"sft": SFTTrainer, "reward": RewardTrainer, "dpo": DPOTrainer, "ppo": PPOTrainer, "grpo": GRPOTrainer}
    return trainers[method]


def _plan(options: Options, overrides: Overrides) -> int:
    path, method = _config_path(options.config), options.method
    if method is None:
        if path is None:
            raise ConfigError("plan: give a CONFIG.yaml, or --method and overrides")
        method = config_file.method_of(path)
    short = [("lora.enabled", "true")] if options.use_lora else []
    config = config_file.read(method, path, [*short, *overrides])
    runtime.configure()
    from jaxrlhf.plan import report

    return 0 if report.examine(config, every_knob=options.knobs) else OutOfMemory.exit_code


def _demo(options: Options, overrides: Overrides) -> None:
    runtime.configure()
    from jaxrlhf.demo.pipeline import run

    run(Path(options.output), options.seed, quiet=options.quiet)


def _doctor(options: Options, overrides: Overrides) -> int:
    if overrides and not options.model:
        raise ConfigError(f"doctor: --{overrides[0][0]} is about a run; give its MODEL first")
    given = [*overrides, *([("model.path", options.model)] if options.model else [])]
    config = config_file.read("ppo", _config_path(options.config), given, partial=True)
    runtime.configure()
    from jaxrlhf import doctor

    return 0 if doctor.examine(config) else 1


def _new(options: Options, overrides: Overrides) -> None:
    print(config_text.render_new(options.method, config_file.METHODS[options.method]), end="")


def _data(options: Options, overrides: Overrides) -> None:
    config = config_file.read("sft", None, [("data.path", options.file), *overrides], partial=True)
    runtime.configure()
    from jaxrlhf import doctor

    print(doctor.examine_data(config))


def _plot(options: Options, overrides: Overrides) -> None:
    from jaxrlhf.metrics import plots

    for path in plots.plot(Path(options.run)):
        print(path)


def _export(options: Options, overrides: Overrides) -> None:
    import shutil

    run, target = Path(options.run), Path(options.directory)
    if not (run / "config.yaml").is_file() and not options.merge_lora:
        raise DataError(f"{run} is not a run directory: it has no config.yaml")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise StorageError(f"{target} exists and is not empty; give a new folder")
    runtime.configure()
    from jaxrlhf import runs

    if not (run / "config.yaml").is_file():
        from jaxrlhf.training.export import merge

        print(merge(run, target))
        return
    method, outcome = runs.method_and_outcome(run)
    exported = run / "export"
    # what its adapters were trained over is in the run's hands alone
    lora = config_file.read(method, run / "config.yaml", partial=True).lora
    packed = options.merge_lora and lora.quantize != "none"
    # what a finished run exported is its outcome; of another the export, if there is one, is from before it went on
    chosen = exported.is_dir() and (outcome == "done" or not any((run / "checkpoints").glob("[0-9]*")))
    if not chosen or packed or options.role == "critic":
        from jaxrlhf.training.export import export

        with notes():
            export(run, target, options.role, merge_lora=options.merge_lora)
    elif options.merge_lora and (exported / "adapter_config.json").is_file():
        from jaxrlhf.training.export import merge

        merge(exported, target)
    else:
        part = target.with_name(target.name + ".part")
        shutil.rmtree(part, ignore_errors=True)
        shutil.copytree(exported, part)
        if target.exists():
            target.rmdir()
        os.replace(part, target)
    print(target)


_CONFIG: dict[str, dict[str, Any]] = {
    "config": {"nargs": "?", "metavar": "CONFIG.yaml", "help": "a file, or the name of a preset"},
    "--fresh": {"action": "store_true", "help": "start over in an existing run directory"},
    "--dry-run": {"action": "store_true", "help": "say what would be done and stop"},
    "--use-lora": {"action": "store_true", "help": "short for --lora.enabled true"},
}
_MODEL: dict[str, Any] = {"metavar": "MODEL", "help": "a folder, a hub id or a run directory"}
_MEASURE: dict[str, dict[str, Any]] = {
    "--prompts": {"required": True, "metavar": "FILE", "help": "a data file with prompts"},
    "--num-prompts": {"type": _count, "default": 20, "metavar": "N"},
    "--num-completions": {"type": _count, "default": 4, "metavar": "N"},
    "--reward": {"metavar": "path.py:name", "help": "reward function; default: what a PPO or GRPO run had"},
    "--reward-model": {"metavar": "DIR"},
    "--references": {
        "metavar": "COLUMN",
        "help": "the column with right answers, for BLEU and ROUGE-L; default: the answer of the data's format, if any",
    },
    "--seed": {"type": _whole, "metavar": "N"},
    "--output": {"metavar": "FILE.json", "help": "everything, as JSON"},
}
COMMANDS: dict[str, Command] = {
    "demo": Command(
        _demo,
        "SFT, a reward model and PPO on a tiny task, in two minutes on a CPU",
        {
            "--seed": {"type": _whole, "default": 0},
            "--output": {"default": "runs/demo", "metavar": "DIR", "help": "default: runs/demo"},
            "--quiet": {"action": "store_true"},
        },
    ),
    "doctor": Command(
        _doctor,
        "check this computer and, if given, a model: its files, decoding, and a small PPO update in memory; with a PPO "
        "config also that config's data, reward and sampling; exit code 1 if a check fails",
        {
            "model": {"nargs": "?", **_MODEL},
            "config": {"nargs": "?", "metavar": "CONFIG.yaml", "help": "a PPO config: a file, or the name of a preset"},
        },
        overrides=True,
    ),
    "new": Command(
        _new, "print a commented config file", {"method": {"choices": list(config_file.METHODS), "metavar": "METHOD"}}
    ),
    "data": Command(
        _data, "say what a data file holds and how it will be read", {"file": {"metavar": "FILE"}}, overrides=True
    ),
    "sft": Command(_train, "supervised fine-tuning", _CONFIG, overrides=True),
    "reward": Command(_train, "train a reward model on pairs, rankings, labels or scores", _CONFIG, overrides=True),
    "dpo": Command(
        _train, "learn from preferences without a reward model: DPO and its relatives", _CONFIG, overrides=True
    ),
    "ppo": Command(_train, "PPO against a reward model or a reward function", _CONFIG, overrides=True),
    "grpo": Command(
        _train, "GRPO and its relatives, online DPO too: PPO's loop without a critic", _CONFIG, overrides=True
    ),
    "plan": Command(
        _plan,
        "say what a run will hold in memory, whether it fits and how long a step takes at the least, before it runs; "
        "exit code 8 if it does not fit",
        {
            "config": _CONFIG["config"],
            "--method": {"choices": list(config_file.METHODS), "help": "default: what the file says it is for"},
            "--use-lora": _CONFIG["--use-lora"],
            "--knobs": {"action": "store_true", "help": "try what would need less memory even if it fits"},
        },
        overrides=True,
    ),
    "generate": Command(
        generate,
        "continue a prompt and print the text, or complete the prompts of a file and write what is kept by a reward",
        {
            "model": _MODEL,
            "--prompt": {"metavar": "TEXT", "help": "empty: start from bos"},
            "--greedy": {"action": "store_true", "help": "always the likeliest token"},
            "--max-new-tokens": {"type": _count, "metavar": "N"},
            "--temperature": {"metavar": "T"},
            "--top-k": {"metavar": "K"},
            "--top-p": {"metavar": "P"},
            "--min-p": {"metavar": "P"},
            "--seed": {"type": _whole, "metavar": "N"},
            "--n": {"type": _count, "default": 1, "metavar": "N", "help": "how many texts, of each prompt; default: 1"},
            "--prompts": {"metavar": "FILE", "help": "a data file with prompts, instead of --prompt"},
            "--best-by": {
                "metavar": "reward.yaml",
                "help": "a file with a section `reward`, as in a PPO config; default: what a PPO or GRPO run had",
            },
            "--keep": {
                "choices": KEEP,
                "help": "of each prompt: best (the default), for sft; pairs: best against worst, for reward and dpo; "
                "above: all from --threshold on; all; prompts: no completion, but how good they were",
            },
            "--threshold": {
                "type": float,
                "metavar": "X",
                "help": "the least score of a good completion; rows get their prompt's pass_rate, the share of those",
            },
            "--min-pass-rate": {"type": float, "metavar": "SHARE", "help": "leave out prompts that are too hard"},
            "--max-pass-rate": {"type": float, "metavar": "SHARE", "help": "leave out prompts that are too easy"},
            "--out": {"metavar": "FILE.jsonl", "help": "what --prompts becomes; FILE.jsonl.scored until it is whole"},
            "--fresh": {"action": "store_true", "help": "write over --out, and begin anew what was interrupted"},
        },
        overrides=True,
    ),
    "evaluate": Command(
        evaluate,
        "measure completions of random prompts by a reward, ranked BEST, MEDIUM, WORST, and by right answers; of a "
        "reward model, its verdicts on examples",
        {
            "model": _MODEL,
            **_MEASURE,
            "--prompts": {"metavar": "FILE", "help": "a data file with prompts, for a language model"},
            "--examples": {
                "metavar": "FILE",
                "help": "for a reward model: rows {name, prompt, good, bad}, {name, prompt, completion, label}, or "
                "preferences",
            },
        },
        overrides=True,
    ),
    "compare": Command(
        compare,
        "evaluate two models on the same prompts: both, who is better how often, and by how much",
        {"model": {**_MODEL, "metavar": "A"}, "other": {**_MODEL, "metavar": "B"}, **_MEASURE},
        overrides=True,
    ),
    "plot": Command(_plot, "draw a run's curves (PNG) and write its metrics as CSV", {"run": {"metavar": "RUN"}}),
    "export": Command(
        _export,
        "write a run's model in Hugging Face layout; of a run with adapters those alone, in PEFT's",
        {
            "run": {"metavar": "RUN", "help": "with --merge-lora also a folder of adapters"},
            "directory": {"metavar": "DIR"},
            "--role": {"choices": ("policy", "critic"), "default": "policy", "help": "of a PPO run; default: policy"},
            "--merge-lora": {"action": "store_true", "help": "one model instead of adapters"},
        },
    ),
}
COMPUTING = {"demo", "doctor", *config_file.METHODS, "plan", "generate", "evaluate", "compare"}  # these use the devices
TOP_LEVEL = {key for cls in config_file.METHODS.values() for key, _ in config_file.keys(cls) if "." not in key}

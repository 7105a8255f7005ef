"""The commands over models that are there: generate, evaluate, compare. What is heavy is imported by each."""

import argparse
import contextlib
import dataclasses
import json
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from jaxrlhf import runtime
from jaxrlhf.config import file as config_file
from jaxrlhf.config import replace
from jaxrlhf.errors import ConfigError
from jaxrlhf.selection.rule import Rule

Options = argparse.Namespace
Overrides = list[tuple[str, str]]


def compilations(stream: TextIO, *, quiet: bool = False) -> contextlib.AbstractContextManager[None]:
    """While the block runs, a line on `stream` for every program that takes long to compile or load, unless `quiet`."""
    from jaxrlhf import compilation

    return compilation.announce(lambda line: None if quiet else print(line, file=stream, flush=True))


@contextlib.contextmanager
def notes() -> Iterator[None]:
    """Warnings of what runs inside as notes on standard error: standard output is the result."""
    with warnings.catch_warnings(record=True) as warned:
        yield
    for warning in warned:
        print(f"note: {warning.message}", file=sys.stderr)


def generate(options: Options, overrides: Overrides) -> int | None:
    if (options.prompt is None) == (options.prompts is None):
        print("jaxrlhf generate: give --prompt TEXT, or --prompts FILE --out FILE.jsonl", file=sys.stderr)
        return 2
    flags = {
        "sampling.response_length": options.max_new_tokens,
        "sampling.temperature": options.temperature,
        "sampling.top_k": options.top_k,
        "sampling.top_p": options.top_p,
        "sampling.min_p": options.min_p,
        "sampling.greedy": "true" if options.greedy else None,
        "seed": options.seed,
        "model.path": options.model,
        "data.path": options.prompts,
    }
    given = [(key, str(value)) for key, value in flags.items() if value is not None]
    if options.prompts is not None:
        return _select(options, [*given, *overrides])
    for name in ("out", "best_by", "keep", "threshold", "min_pass_rate", "max_pass_rate", "fresh"):
        if getattr(options, name) not in (None, False):
            raise ConfigError(f"generate: --{name.replace('_', '-')} is for --prompts FILE, and there is one --prompt")
    config = config_file.read("ppo", None, [*as_trained(options.model, "sampling"), *given, *overrides], partial=True)
    runtime.configure()
    from jaxrlhf.evaluation import generation

    with compilations(sys.stderr, quiet=config.logging.quiet), notes():
        texts = generation.complete(config, options.prompt, options.n)
    for i, text in enumerate(texts):
        if options.n > 1:
            print(f"--- {i + 1} of {options.n} ---")
        print(text)
    return None


def _select(options: Options, given: Overrides) -> None:
    """Completions of the prompts of a file, those that are kept by their score, to another file."""
    if options.out is None:
        raise ConfigError("generate: --prompts needs --out FILE.jsonl, where to write what is kept")
    reward: Overrides = []
    if options.best_by:
        by = Path(options.best_by)
        reward = _sections("grpo" if config_file.fitting(by) == ["grpo"] else "ppo", by, "reward")
    rewarded = reward or any(key.startswith("reward.") for key, _ in given)
    before = as_trained(options.model, *["sampling"] if rewarded else ["sampling", "reward"])
    config = config_file.read("ppo", None, [*before, *reward, *given], partial=True)
    if not config.reward.parts():
        raise ConfigError(
            "generate: --prompts keeps completions by their reward; give --best-by FILE, a YAML file with a section "
            "`reward`, or --reward.model DIR or --reward.function path.py:name"
        )
    rule = Rule(options.keep or "best", options.threshold, options.min_pass_rate, options.max_pass_rate)
    runtime.configure()
    from jaxrlhf.selection.select import select

    with compilations(sys.stderr, quiet=config.logging.quiet), notes():
        summary = select(config, Path(options.out), rule, options.n, fresh=options.fresh)
    print(f"{summary}\nwrote {options.out}")


def evaluate(options: Options, overrides: Overrides) -> None:
    if bool(options.prompts) == bool(options.examples):
        raise ConfigError(
            "evaluate: give --prompts FILE for a language model to complete, or --examples FILE for a reward model to "
            "judge; one of the two"
        )
    if options.examples:
        return _judge(options, overrides)
    config = _measured_by(options, [options.model], overrides)
    runtime.configure()
    from jaxrlhf.evaluation import completions, summary

    with compilations(sys.stderr, quiet=config.logging.quiet), notes():
        result = completions.evaluate(config, **_asked(options))
    print(summary.table(result))
    if options.output:
        print(f"\nwrote {completions.write(result, Path(options.output))}")


def compare(options: Options, overrides: Overrides) -> None:
    models = [options.model, options.other]
    config = _measured_by(options, models, overrides)
    runtime.configure()
    from jaxrlhf.evaluation import completions, summary

    with compilations(sys.stderr, quiet=config.logging.quiet), notes():
        results = [
            completions.evaluate(replace(config, **{"model.path": path}), **_asked(options), other_models=models)
            for path in models
        ]
    print(summary.comparison(*results))
    if options.output:
        both = {"comparison": summary.paired(*results), "a": results[0], "b": results[1]}
        print(f"\nwrote {completions.write(both, Path(options.output))}")


def _measured_by(options: Options, models: list[str], overrides: Overrides) -> Any:
    """The config of an evaluation; what is not given is as in the first of `models` that a PPO or GRPO run trained, or
    else an SFT or DPO run."""
    flags = {
        "model.path": models[0],
        "data.path": options.prompts,
        "reward.function": options.reward,
        "reward.model": options.reward_model,
        "seed": options.seed,
    }
    given = [(key, str(value)) for key, value in flags.items() if value is not None]
    rewarded = any(key.startswith("reward.") for key, _ in [*given, *overrides])
    sections = ["sampling"] if rewarded else ["sampling", "reward"]
    kinds = ("ppo", "grpo"), ("sft", "dpo")  # those with a reward first
    trained = (as_trained(model, *sections, methods=methods) for methods in kinds for model in models)
    before: Overrides = next(filter(None, trained), [])
    return config_file.read("ppo", None, [*before, *given, *overrides], partial=True)


def _asked(options: Options) -> dict[str, Any]:
    return {
        "num_prompts": options.num_prompts,
        "num_completions": options.num_completions,
        "references": options.references or "",
    }


def _judge(options: Options, overrides: Overrides) -> None:
    """`evaluate --examples`: what a reward model says of examples."""
    given = [("model.path", options.model), ("data.path", options.examples)]
    kept = {f"data.{key}" for key in ("completion_prefix", "control_tokens", "max_length", "truncation")}
    before = [pair for pair in as_trained(options.model, "data", methods=("reward",)) if pair[0] in kept]
    config = config_file.read("reward", None, [*before, *given, *overrides], partial=True)
    runtime.configure()
    from jaxrlhf.evaluation import completions, reward_examples

    with compilations(sys.stderr, quiet=config.logging.quiet):
        result = reward_examples.judge(config)
    print(reward_examples.table(result))
    if options.output:
        print(f"\nwrote {completions.write(result, Path(options.output))}")


def as_trained(model: str, *sections: str, methods: tuple[str, ...] = ("ppo", "grpo", "sft", "dpo")) -> Overrides:
    """Those sections that the config of the run in the folder `model` has, if one of `methods` made it; nothing for
    others."""
    file = Path(model) / "config.yaml"
    first = file.read_text(encoding="utf-8").partition("\n")[0] if file.is_file() else ""
    method = first.removeprefix("# jaxrlhf ").partition(",")[0]
    if method not in methods:
        return []
    return _sections(method, file, *sections)


def _sections(method: str, file: Path, *sections: str) -> Overrides:
    """Sections of a config, those that it has, as overrides."""
    config = dataclasses.asdict(config_file.read(method, file, partial=True))
    return [(f"{name}.{key}", json.dumps(value)) for name in sections for key, value in config.get(name, {}).items()]

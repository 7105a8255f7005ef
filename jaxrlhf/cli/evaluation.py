"""The commands that measure models: evaluate and compare. Heavy modules are imported when needed."""

import sys
from pathlib import Path
from typing import Any

from jaxrlhf.cli.models import (
    Options,
    Overrides,
    date_of_run,
    environment_of_run,
    notes_on_stderr,
    overrides_from_run,
    reward_of_run,
    template_of_run,
)
from jaxrlhf.config.file import load_config
from jaxrlhf.errors import ConfigError, visible


def evaluate(options: Options, overrides: Overrides) -> None:
    if sum(map(bool, (options.prompts, options.examples, options.text))) != 1:
        raise ConfigError(
            "evaluate: give one of --prompts FILE, for a language model to complete, --text FILE, for its perplexity, "
            "and --examples FILE, for a reward model to judge"
        )
    if options.examples:
        return _evaluate_reward_model(options, overrides)
    if options.text:
        return _evaluate_perplexity(options, overrides)
    (config,), asked = _evaluation(options, [options.model], overrides)
    from jaxrlhf.evaluation import completions, console

    with notes_on_stderr(quiet=config.logging.quiet):
        result = completions.evaluate(config, **asked)
    print(visible(console.table(result)))
    if options.output:
        _write_json(result, options.output)
    return None


def compare(options: Options, overrides: Overrides) -> None:
    configs, asked = _evaluation(options, [options.model, *options.others], overrides)
    from jaxrlhf.evaluation import comparison, comparison_console, comparison_files

    with notes_on_stderr(quiet=configs[0].logging.quiet):
        result = comparison.compare(configs, **asked)
    print(visible(comparison_console.render(result, options.show)))
    if options.output:
        paths, notes = comparison_files.write(result, Path(options.output))
        print("\nwrote " + ", ".join(map(str, paths)))
        for note in notes:
            print(f"note: {visible(note)}", file=sys.stderr)


def _evaluation(options: Options, models: list[str], overrides: Overrides) -> tuple[list[Any], dict[str, Any]]:
    """Configs of `models` for evaluation on the same prompts, and what is asked of them. Sampling defaults to that of
    the first model that was trained by PPO or GRPO, or else by SFT or DPO; the reward, the environment and the template
    of prompts to those of the first run that has one."""
    runs = (
        overrides_from_run(model, "sampling", methods=methods)
        for methods in (("ppo", "grpo"), ("sft", "dpo"))
        for model in models
    )
    run = [*next(filter(None, runs), []), *date_of_run(*models), *template_of_run(*models)]
    if not any(key.startswith("reward.") for key, _ in overrides):
        run += reward_of_run(*models)
    run += environment_of_run(models, overrides)
    overrides = [*run, ("data.path", options.prompts[0]), *overrides]
    configs = [load_config("ppo", None, [*overrides, ("model.path", path)], partial=True) for path in models]
    greedy = configs[0].sampling.greedy
    return configs, {
        "num_prompts": options.num_prompts,
        "num_completions": options.num_completions or (1 if greedy else 4),
        "files": options.prompts,
        "references": options.references or "",
        "by": options.by or "",
        "threshold": options.threshold,
    }


def _evaluate_reward_model(options: Options, overrides: Overrides) -> None:
    """`evaluate --examples`: print a reward model's scores of examples."""
    kept = {f"data.{key}" for key in ("completion_prefix", "control_tokens", "max_length", "truncation")}
    run = [pair for pair in overrides_from_run(options.model, "data", methods=("reward",)) if pair[0] in kept]
    paths = [("model.path", options.model), ("data.path", options.examples)]
    run += date_of_run(options.model)
    config = load_config("reward", None, [*run, *paths, *overrides], partial=True)
    from jaxrlhf.evaluation import reward_examples

    with notes_on_stderr(quiet=config.logging.quiet):
        result = reward_examples.judge(config, options.by or "")
    print(visible(reward_examples.table(result)))
    if options.output:
        _write_json(result, options.output)


def _evaluate_perplexity(options: Options, overrides: Overrides) -> None:
    """`evaluate --text`: print the perplexity of a language model on texts, read as its SFT run would read them."""
    kept = {f"data.{key}" for key in ("completion_prefix", "control_tokens", "max_length", "template", "truncation")}
    run = [pair for pair in overrides_from_run(options.model, "data", methods=("sft",)) if pair[0] in kept]
    run += [*date_of_run(options.model), ("model.path", options.model), ("data.path", options.text)]
    config = load_config("sft", None, [*run, *overrides], partial=True)
    from jaxrlhf.evaluation import perplexity

    with notes_on_stderr(quiet=config.logging.quiet):
        result = perplexity.measure(config)
    print(visible(perplexity.table(result)))
    if options.output:
        _write_json(result, options.output)


def _write_json(result: dict[str, Any], path: str) -> None:
    from jaxrlhf.evaluation import completions

    print(f"\nwrote {completions.write(result, Path(path))}")

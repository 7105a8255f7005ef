"""Commands to suggest after a command has finished, with the paths of its run."""

import contextlib
import json
import shlex
from collections.abc import Sequence
from typing import Any

from jaxrlhf.config import Data, GRPOConfig, PPOConfig, RewardConfig, Sampling, SFTConfig
from jaxrlhf.errors import JaxrlhfError

Step = tuple[Sequence[str], str]
_READING = ("split", "subset", "revision", "columns", "template", "score", "completion_prefix", "control_tokens")


def after_training(config: Any) -> list[str]:
    """Commands for the run of `config`, each with a note. Words in capitals stand for files that are not known."""
    run, base, data = config.run_dir, config.model.path, config.data.sources[0]
    prompts = _reading(data, data.validation_path or data.path)
    report: Step = (("report", run), "curves, samples and alarms on one page")
    talk: Step = (("chat", run), "talk to the model")
    compare: Step = (("compare", base, run, "--prompts", *prompts), "against the model it started from")
    merge = ["--merge-lora"] * config.lora.enabled
    export: Step = (("export", run, f"{run.rstrip('/')}-model", *merge), "the model in a folder of its own")
    match config:
        case PPOConfig() | GRPOConfig():
            # chat plays no environment
            return _lines(report, compare, *([] if config.environment.function else [talk]), export)
        case SFTConfig():
            reward = ("reward", "reward", "--model.path", run, "--data.path", "PAIRS.jsonl")
            ppo = ("ppo", "ppo", "--model.path", run, "--data.path", "PROMPTS.jsonl", "--reward.model", "REWARD_RUN")
            ppo += _response_length(run)
            return _lines(talk, (reward, "train a reward model from it"), (ppo, "then train it with PPO"), report)
        case RewardConfig():
            ppo = ("ppo", "ppo", "--model.path", base, "--data.path", *_reading(data, data.path), "--reward.model", run)
            ppo += _response_length(base)
            return _lines(
                (("evaluate", run, "--examples", *prompts), "its scores, example by example"),
                (ppo, "train a model with PPO on it"),
                report,
            )
    return _lines(compare, talk, report, export)


def after_selection(model: str, file: str, keep: str) -> list[str]:
    """Commands that train on the rows that `jaxrlhf generate --keep` has written to a file."""
    methods = {"pairs": ("reward", "dpo"), "prompts": ("ppo", "grpo")}.get(keep, ("sft",))
    reward = {"ppo": ["--reward.model", "REWARD_RUN"], "grpo": ["--reward.model", "REWARD_RUN"]}
    return _lines(
        (("data", file), "look at the rows"),
        *(
            ((method, method, "--model.path", model, "--data.path", file, *reward.get(method, [])), "train on them")
            for method in methods
        ),
    )


def _response_length(model: str) -> tuple[str, ...]:
    """An option for models with a short context, of which the default response length would take half or more."""
    from jaxrlhf import weights

    with contextlib.suppress(JaxrlhfError):  # the command would say what is wrong with the model
        context = weights.load_config(model).max_positions
        if 2 * Sampling().response_length >= context:
            return "--sampling.response_length", str(context // 3)
    return ()


def _reading(data: Data, path: str) -> list[str]:
    """The path of a data set, and the options that say how its rows are read."""
    words = [path]
    for key in _READING:
        value = getattr(data, key)
        if value != getattr(Data(), key):
            plain = isinstance(value, str) and value.isprintable() and value.strip() == value
            words += [f"--data.{key}", value if plain else json.dumps(value, ensure_ascii=False)]
    return words


def _lines(*steps: Step) -> list[str]:
    commands = [shlex.join(("jaxrlhf", *words)) for words, _ in steps]
    width = min(max(map(len, commands)), 100)
    notes = (note for _, note in steps)
    return [f"  {command:<{width}}  # {note}" for command, note in zip(commands, notes, strict=True)]

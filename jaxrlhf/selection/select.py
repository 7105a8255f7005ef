"""Generation of training data: sample several completions per prompt, score them and keep some by their score."""

import contextlib
import dataclasses
import datetime
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import weights
from jaxrlhf.config import PPOConfig, replace, text
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.data.formats import FORMAT_COLUMNS
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, DataError, StorageError, first_line
from jaxrlhf.evaluation import generation
from jaxrlhf.files import atomic_open
from jaxrlhf.metrics.console import Console
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.selection.log import Log, open_log, settings_in
from jaxrlhf.selection.rule import Completion, Rule, Summary, mean, scores_of

BATCHES = 8  # batches of ppo.batch_size completions generated before scoring: freed decoding slots take further prompts
CHANGEABLE = ("timeout", "on_error", "error_value", "micro_batch_size")  # reward options that may change on resuming


def select(
    config: PPOConfig,
    out: Path,
    rule: Rule,
    count: int,
    *,
    fresh: bool = False,
    function: Callable[..., Any] | None = None,
) -> Summary:
    """Sample `count` completions of every prompt of `config.data`, score them, and write the rows that `rule` keeps.

    `rollout.slots` completions are generated at a time (0: `ppo.batch_size`) and about `ppo.batch_size` scored; the
    result depends on the seed and on neither of these. Scored completions are stored in `out`.scored at once, and an
    interrupted call resumes from there. Raises StorageError if `out` exists, unless `fresh`.

    Args:
        config: model, tokenizer, data, reward, sampling, rollout and seed.
        out: JSON lines file to write, in the order of the prompts.
        fresh: start over, whatever exists.
        function: reward function to use in place of `reward.function`.
    """
    if out.suffix != ".jsonl" or out.resolve() == Path(config.data.path).resolve():
        raise ConfigError(f"--out is {out}: give a file of its own whose name ends in .jsonl")
    if out.exists() and not fresh:
        raise StorageError(f"{out} exists; give another --out, or --fresh to overwrite it")
    if config.environment.function and rule.keep != "prompts":
        raise ConfigError(
            f"--keep {rule.keep} writes completions to train on, and those of an environment "
            f"({config.environment.function}) have its texts in them, which a model would learn to write itself; use "
            "--keep prompts, which selects prompts by the scores of their episodes, or --environment.function '' for "
            "single turns without it"
        )
    if rule.keep == "pairs" and count < 2:
        raise ConfigError("--keep pairs needs two or more completions per prompt, for example --n 8")
    if config.sampling.greedy and count > 1:
        raise ConfigError(f"sampling.greedy with {count} completions per prompt: all would be the same; remove it")
    path = out.with_name(f"{out.name}.scored")
    if not config.tokenizer.template_date:
        stored = {} if fresh else settings_in(path).get("tokenizer", {})
        today = str(datetime.date.today())
        config = replace(config, **{"tokenizer.template_date": stored.get("template_date") or today})
    tokenizer, split = generation.read_prompts(config)
    rows = split.train
    _check_columns(rows)
    scorer = generation.open_scorer(config, tokenizer, rows, function, directory=out.parent)
    with open_log(path, _settings(config, rows, count), code_hashes(config), fresh=fresh) as log:
        if log.count < len(rows):
            _complete(config, tokenizer, rows, count, scorer, log)
        summary = Summary(config.model.path, rule, count)
        if rule.keep != "prompts":
            summary.left_out = sorted(
                {name for row in rows for name in row.columns if name in FORMAT_COLUMNS} - {"prompt"}
            )
        with atomic_open(out) as file:
            for row, completions in zip(rows, log.read(), strict=True):
                kept, reason = rule.apply(row, completions)
                summary.add(completions, kept, reason)
                file.writelines(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in kept)
        log.remove()
    return summary


def _complete(
    config: PPOConfig, tokenizer: Tokenizer, rows: Sequence[PromptRow], count: int, scorer: Scorer, log: Log
) -> None:
    """Generate and score completions of the rows that are not in the log yet."""
    model, params = generation.open_model(config, tokenizer, len(rows) * count)
    columns = generation.prompt_columns(config, model, rows)
    size = -(-BATCHES * config.ppo.batch_size // count)
    scores = [score for group in log.read() for score in scores_of(group)]
    with contextlib.closing(Console("generate", len(rows), config.logging)) as console:
        scorer.pause_while_asking(console.paused)
        if log.count:
            console.note(f"resuming: {log.count} of {len(rows)} prompts are scored in {log.path}")
        while log.count < len(rows):
            batch = rows[log.count : log.count + size]
            rollout = generation.generate(config, model, params, tokenizer, batch, count, columns)
            for groups in generation.score_completions(config, scorer, tokenizer, batch, rollout):
                stored = [[_stored(completion) for completion in group] for group in groups]
                log.append(stored)
                scores += [score for group in stored for score in scores_of(group)]
            console.progress(log.count, {"objective/scores": mean(scores)} if scores else {})


def _stored(completion: Completion) -> Completion:
    """The part of a completion that is stored."""
    score = completion["score"]
    if score is not None:
        score = float(str(np.float32(score)))  # float32 0.9 passes a threshold of 0.9
    return {"text": completion["text"], "score": score, "finished": completion["finished"]}


def _settings(config: PPOConfig, rows: Sequence[PromptRow], count: int) -> dict[str, Any]:
    """Everything that determines completions and scores, except the code of reward functions."""
    reward, environment = text.as_mapping(config.reward), config.environment
    for component in [reward, *reward["components"]]:
        for name in CHANGEABLE:
            component.pop(name, None)
    members = [member for component in config.reward.parts() for member in component.members()]
    prompts = hashlib.sha256()
    for row in rows:
        prompts.update(repr((row.index, row.tokens, row.columns)).encode("utf-8", "backslashreplace"))
    return {
        "model": dataclasses.asdict(config.model) | {"content": _content(config.model.path, config.model.revision)},
        "tokenizer": dataclasses.asdict(config.tokenizer),
        "prompts": prompts.hexdigest(),
        "n": count,
        "reward": reward | {"content": [_content(member.model, member.revision) for member in members if member.model]},
        "sampling": dataclasses.asdict(config.sampling),
        "rollout.dtype": config.rollout.dtype,
        "seed": config.seed,
        **({"environment": dataclasses.asdict(environment) | {"timeout": None}} if environment.function else {}),
    }


def _content(path: str, revision: str | None) -> str:
    """Hash of the config and weights of a model, including adapters and their base model."""
    folders = weights.base_and_adapters(weights.resolve(path, revision), weights=True)
    digest = hashlib.sha256()
    for file in (file for folder in folders if folder for file in sorted(folder.iterdir())):
        if file.suffix in (".json", ".safetensors"):
            with file.open("rb") as opened:
                digest.update(hashlib.file_digest(opened, "sha256").digest())
    return digest.hexdigest()


def code_hashes(config: PPOConfig) -> dict[str, str]:
    """SHA-256 of each file that contains a reward function or the environment."""
    named = [*(component.function for component in config.reward.parts()), config.environment.function]
    files = [Path(function.rpartition(":")[0]) for function in named]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.suffix == ".py"}


def _check_columns(rows: Sequence[PromptRow]) -> None:
    """Raise DataError for columns that cannot be written as JSON, before any completion is generated."""
    for row in rows:
        for name, value in row.columns.items():
            try:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"row {row.index + 1} of the prompts: column {name!r} cannot be written as JSON "
                    f"({first_line(error)}); remove it from the data, or convert it to text"
                ) from error

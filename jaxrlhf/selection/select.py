"""Completions to data: several of each prompt, scored, and kept by their score (selection_rule.py)."""

import dataclasses
import hashlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf import weights
from jaxrlhf.config import PPOConfig
from jaxrlhf.data.datasets import PromptRow
from jaxrlhf.data.formats import FORMAT_COLUMNS
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import ConfigError, DataError, StorageError, first_line
from jaxrlhf.evaluation import completions
from jaxrlhf.files import whole
from jaxrlhf.metrics.console import Console
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.selection.log import Log
from jaxrlhf.selection.rule import Answer, Rule, Summary, mean, scores_of

BATCHES = 8  # of ppo.batch_size completions that are drawn before they are scored: ended rows make room for others
MENDING = ("timeout", "on_error", "error_value", "micro_batch_size")  # of a reward: may change when a job goes on


def select(
    config: PPOConfig,
    out: Path,
    rule: Rule,
    count: int,
    *,
    fresh: bool = False,
    function: Callable[..., Any] | None = None,
) -> Summary:
    """Complete every prompt of `config.data` `count` times, score the completions, and write what `rule` keeps to `out`
    as JSON lines in the order of the prompts.

    Uses model, tokenizer, data, reward, sampling and rollout of `config`; rollout.slots completions are made at a time
    (0: ppo.batch_size) and about ppo.batch_size scored. What they are depends on the seed alone. What has been scored
    is at once in `out`.scored, from where an interrupted call goes on. `fresh` begins anew, whatever is there.
    `function` stands in for `reward.function`. Raises StorageError where `out` exists, unless `fresh`.
    """
    if out.suffix != ".jsonl" or out.resolve() == Path(config.data.path).resolve():
        raise ConfigError(f"--out is {out}: give a file of its own whose name ends in .jsonl")
    if out.exists() and not fresh:
        raise StorageError(f"{out} exists; give another --out, or --fresh to write it anew")
    if rule.keep == "pairs" and count < 2:
        raise ConfigError("--keep pairs needs two completions of each prompt or more; give --n 8, say")
    if config.sampling.greedy and count > 1:
        raise ConfigError(f"sampling.greedy with {count} completions of a prompt: all would be the same; leave it out")
    tokenizer, rows = completions.read_prompts(config)
    _check_columns(rows)
    scorer = completions.open_scorer(config, tokenizer, rows, function, directory=out.parent)
    with Log(out.with_name(f"{out.name}.scored"), _settings(config, rows, count), _code(config), fresh=fresh) as log:
        if log.count < len(rows):
            _complete(config, tokenizer, rows, count, scorer, log)
        summary = Summary(config.model.path, rule, count)
        if rule.keep != "prompts":
            summary.left_out = sorted(
                {name for row in rows for name in row.columns if name in FORMAT_COLUMNS} - {"prompt"}
            )
        with whole(out) as file:
            for row, answers in zip(rows, log.read(), strict=True):
                kept, why = rule.apply(row, answers)
                summary.add(answers, kept, why)
                file.writelines(json.dumps(item, ensure_ascii=False).encode() + b"\n" for item in kept)
        log.remove()
    return summary


def _complete(
    config: PPOConfig, tokenizer: Tokenizer, rows: Sequence[PromptRow], count: int, scorer: Scorer, log: Log
) -> None:
    """Complete and score the rows that the log does not have."""
    model, params = completions.open_model(config, tokenizer)
    columns = completions.prompt_columns(config, model, rows)
    size = -(-BATCHES * config.ppo.batch_size // count)
    console = None if config.logging.quiet else Console("generate", len(rows), every=config.logging.log_every)
    scores = [score for group in log.read() for score in scores_of(group)]
    if console:
        scorer.pause(console.paused)
    try:
        if console and log.count:
            console.note(f"{log.count} of {len(rows)} prompts are scored in {log.path}; going on there")
        while log.count < len(rows):
            part = rows[log.count : log.count + size]
            rollout = completions.respond(config, model, params, tokenizer, part, count, columns)
            for groups in completions.judge(config, scorer, tokenizer, part, rollout):
                found = [[_answer(answer, scorer) for answer in group] for group in groups]
                log.append(found)
                scores += [score for group in found for score in scores_of(group)]
            if console:
                console.progress(log.count, {"objective/scores": mean(scores)} if scores else {})
    finally:
        if console:
            console.close()


def _answer(answer: Answer, scorer: Scorer) -> Answer:
    """What is kept of a completion; its score is None where no part of the reward had an opinion."""
    silent = all(answer["components"].get(f"{name}_unanswered") for name in scorer.parts)
    score = None if silent else float(str(np.float32(answer["score"])))  # 0.9 reaches a threshold of 0.9
    return {"text": answer["text"], "score": score, "finished": answer["finished"]}


def _settings(config: PPOConfig, rows: Sequence[PromptRow], count: int) -> dict[str, Any]:
    """All that decides what is drawn and how it is scored, but for the code of functions."""
    reward = dataclasses.asdict(config.reward)
    for part in [reward, *reward["components"]]:
        for name in MENDING:
            part.pop(name, None)
    judges = [member for part in config.reward.parts() for member in part.members()]
    prompts = hashlib.sha256()
    for row in rows:
        prompts.update(repr((row.index, row.tokens, row.columns)).encode("utf-8", "backslashreplace"))
    return {
        "model": dataclasses.asdict(config.model) | {"content": _content(config.model.path, config.model.revision)},
        "tokenizer": dataclasses.asdict(config.tokenizer),
        "prompts": prompts.hexdigest(),
        "n": count,
        "reward": reward | {"content": [_content(part.model, part.revision) for part in judges if part.model]},
        "sampling": dataclasses.asdict(config.sampling),
        "rollout.dtype": config.rollout.dtype,
        "seed": config.seed,
    }


def _content(path: str, revision: str | None) -> str:
    """A hash of a model's description and weights, adapters and what they are for."""
    found = weights.described_by(weights.resolve(path, revision), weights=True)
    files = [file for folder in found if folder for file in sorted(folder.iterdir())]
    total = hashlib.sha256()
    for file in files:
        if file.suffix in (".json", ".safetensors"):
            with file.open("rb") as opened:
                total.update(hashlib.file_digest(opened, "sha256").digest())
    return total.hexdigest()


def _code(config: PPOConfig) -> dict[str, str]:
    """A hash of each file that a function of the reward is in."""
    files = [Path(part.function.rpartition(":")[0]) for part in config.reward.parts()]
    return {str(file): hashlib.sha256(file.read_bytes()).hexdigest() for file in files if file.suffix == ".py"}


def _check_columns(rows: Sequence[PromptRow]) -> None:
    """Refuse columns that cannot be written, before hours have gone into what stands beside them."""
    for row in rows:
        for name, value in row.columns.items():
            try:
                json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
            except (TypeError, ValueError) as error:
                raise DataError(
                    f"row {row.index + 1} of the prompts: column {name!r} cannot be written as JSON "
                    f"({first_line(error)}); drop it from the data, or turn it into text"
                ) from error

"""Evaluation of a language model: sample completions of prompts and score them by a reward or against references."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.config import PPOConfig, replace
from jaxrlhf.data.datasets import PromptRow, columns
from jaxrlhf.data.formats import answer_column
from jaxrlhf.data.sources import Rows
from jaxrlhf.errors import ConfigError, DataError, quoted
from jaxrlhf.evaluation import generation
from jaxrlhf.evaluation.generation import Completion
from jaxrlhf.evaluation.summary import statistics
from jaxrlhf.files import write_whole


def evaluate(
    config: PPOConfig,
    *,
    num_prompts: int,
    num_completions: int,
    function: Callable[..., Any] | None = None,
    references: str = "",
    other_models: Sequence[str] = (),
) -> dict[str, Any]:
    """Sample `num_completions` completions of each of `num_prompts` random prompts of `config.data` and score them.

    `rollout.slots` completions are generated at a time (0: `ppo.batch_size`) and about `ppo.batch_size` scored; the
    result depends on the seed and on neither of these. Returns a JSON object with `statistics` and `prompts`; each
    prompt has its completions, with a reward ranked by score. Raises ConfigError without a reward or references,
    RewardError if the reward gives no score at all.

    Args:
        config: model, tokenizer, data, reward, sampling, rollout and seed of the evaluation.
        function: reward function to use in place of `reward.function`.
        references: column with a reference answer to each prompt; "": the answer column of the data's format.
        other_models: models to be compared on the same prompts; prompts too long for one of them are left out.
    """
    tokenizer, rows = generation.read_prompts(config)
    for path in (path for path in other_models if path != config.model.path):
        readable = {row.index for row in generation.read_prompts(replace(config, **{"model.path": path}))[1]}
        rows = [row for row in rows if row.index in readable]
    has_reward = bool(config.reward.parts(passed=function is not None))
    column = _reference_column(config, rows, references, has_reward)
    scorer = generation.open_scorer(config, tokenizer, rows, function) if has_reward else None
    rows = sample_rows(rows, num_prompts, config.seed)
    reference_texts = [_reference_text(row, column) for row in rows]
    model, params = generation.open_model(config, tokenizer)
    rollout = generation.generate(config, model, params, tokenizer, rows, num_completions)
    groups = [
        group for batch in generation.score_completions(config, scorer, tokenizer, rows, rollout) for group in batch
    ]
    prompts = [_prompt_result(*item) for item in zip(rows, groups, reference_texts, strict=True)]
    sections = dataclasses.asdict(config.reward), dataclasses.asdict(config.sampling)
    reward, sampling = json.loads(json.dumps(sections))  # with lists in place of tuples
    return {
        "model": config.model.path,
        "prompts_from": config.data.path,
        "references_from": column,
        "reward": reward,
        "sampling": sampling,
        "seed": config.seed,
        "statistics": statistics(prompts),
        "prompts": prompts,
    }


def sample_rows(rows: Sequence[PromptRow], count: int, seed: int) -> list[PromptRow]:
    """Draw `count` random rows without replacement, in file order; all rows if there are fewer."""
    picked = np.random.default_rng(seed).permutation(len(rows))[:count]
    return [rows[i] for i in sorted(picked)]


def write(result: dict[str, Any], path: Path) -> Path:
    """Write a result as JSON, atomically. Raises StorageError."""
    return write_whole(path, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _reference_column(config: PPOConfig, rows: Sequence[PromptRow], requested: str, has_reward: bool) -> str:
    """Name of the column of references; "" if there is none but a reward."""
    names = list(columns(rows))
    if requested:
        if requested not in names:
            raise ConfigError(f"there is no column {requested!r} in {config.data.path}; it has {', '.join(names)}")
        return requested
    column = answer_column(Rows(config.data.path, [row.columns for row in rows], []), config.data)
    if not (column or has_reward):
        raise ConfigError(
            f"nothing to measure completions by: give a reward (--reward, --reward-model, --reward.KEY), or name the "
            f"column of {config.data.path} that has reference answers (--references); it has {', '.join(names)}"
        )
    return column


def _reference_text(row: PromptRow, column: str) -> str | None:
    """Text of `column` in a row (the last assistant turn of a conversation); None if the row has none."""
    value = row.columns.get(column)
    if isinstance(value, list) and value and isinstance(value[-1], dict) and value[-1].get("role") == "assistant":
        value = value[-1].get("content")
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(
        f"row {row.index + 1} of the prompts: column {column!r} is {quoted(value)}; expected text, a number or a "
        "conversation that ends with the assistant"
    )


def _prompt_result(row: PromptRow, completions: list[Completion], reference: str | None) -> dict[str, Any]:
    result = {"prompt": row.text, "index": row.index, "reference": reference, "completions": completions}
    if "score" not in completions[0]:
        return result
    scored = [completion for completion in completions if completion["score"] is not None]
    unscored = [{"rank": "UNSCORED", **completion} for completion in completions if completion["score"] is None]
    ranked = sorted(scored, key=lambda completion: -completion["score"])
    ranks = ["BEST", *["MEDIUM"] * (len(ranked) - 2), "WORST"][: len(ranked)]
    scores = [completion["score"] for completion in ranked]
    return result | {
        "mean": float(np.mean(scores)) if scores else None,
        "spread": scores[0] - scores[-1] if scores else None,
        "completions": [{"rank": rank, **completion} for rank, completion in zip(ranks, ranked, strict=True)]
        + unscored,
    }

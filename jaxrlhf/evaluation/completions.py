"""Evaluation of a language model: sample completions of prompts and score them by a reward or against references."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.config import PPOConfig, text
from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.evaluation import generation, prompts
from jaxrlhf.evaluation.generation import Completion
from jaxrlhf.evaluation.prompts import Question, Questions
from jaxrlhf.evaluation.summary import by_group, statistics, with_reference
from jaxrlhf.files import write_whole
from jaxrlhf.models import ModelConfig
from jaxrlhf.rewards.compose import Scorer
from jaxrlhf.types import Params, Rollout

Result = dict[str, Any]


def evaluate(
    config: PPOConfig,
    *,
    num_prompts: int,
    num_completions: int,
    function: Callable[..., Any] | None = None,
    files: Sequence[str] = (),
    references: str = "",
    by: str = "",
    threshold: float | None = None,
) -> Result:
    """Sample `num_completions` completions of each of `num_prompts` random prompts and score them.

    `rollout.slots` completions are generated at a time (0: `ppo.batch_size`) and about `ppo.batch_size` scored; the
    result depends on the seed and on neither of these. Returns a JSON object with `statistics`, `groups` (the
    statistics of each category and, of several files, of each file) and `prompts`; each prompt has its completions,
    with a reward ranked by score. Raises ConfigError without a reward or references, RewardError if the reward gives no
    score at all.

    Args:
        config: model, tokenizer, data, reward, sampling, rollout and seed of the evaluation.
        function: reward function to use in place of `reward.function`.
        files: files of prompts, each in its own format; none: `config.data.path`.
        references: column with a reference answer to each prompt; "": the answer column of the data's format.
        by: column with the category of each prompt; "": `category`, if there is one.
        threshold: score of a completion that passes, for pass@k.
    """
    check(config, num_completions, threshold, function)
    questions = prompts.read(config, files, references, by, has_reward=has_reward(config, function))
    questions = questions.sample(num_prompts, config.seed)
    scorer = open_scorer(config, questions, function)
    decoder = generation.open_model(config, questions.tokenizer, len(questions.rows) * num_completions)
    return complete(config, questions, num_completions, decoder, scorer, threshold)[0]


def check(
    config: PPOConfig, num_completions: int, threshold: float | None, function: Callable[..., Any] | None = None
) -> None:
    """Raise ConfigError for settings that do not go together."""
    if config.sampling.greedy and num_completions > 1:
        raise ConfigError(
            f"greedy decoding with {num_completions} completions per prompt: all would be the same; leave out "
            "--num-completions, or --greedy"
        )
    if threshold is not None and not has_reward(config, function):
        raise ConfigError(
            f"--threshold {threshold:g} is a score, and there is no reward; give one (--reward, --reward-model)"
        )


def has_reward(config: PPOConfig, function: Callable[..., Any] | None = None) -> bool:
    """Return True if completions have a score: that of a reward, or of the turns of an environment."""
    return bool(config.environment.function or config.reward.parts(passed=function is not None))


def open_scorer(config: PPOConfig, questions: Questions, function: Callable[..., Any] | None = None) -> Scorer | None:
    """The reward of a config, checked on the prompts; None if there is none."""
    if not has_reward(config, function):
        return None
    return generation.open_scorer(config, questions.tokenizer, questions.rows, function)


def complete(
    config: PPOConfig,
    questions: Questions,
    num_completions: int,
    decoder: tuple[ModelConfig, Params],
    scorer: Scorer | None,
    threshold: float | None,
) -> tuple[Result, Rollout]:
    """`evaluate` on given prompts with an inference copy of a model; also the rollout, on the host."""
    tokenizer, rows = questions.tokenizer, questions.rows
    rollout = generation.generate(config, *decoder, tokenizer, rows, num_completions)
    batches = generation.score_completions(config, scorer, tokenizer, rows, rollout)
    groups = [group for batch in batches for group in batch]
    results = [_prompt_result(*item) for item in zip(questions.questions, groups, strict=True)]
    count = sum(len(group) for group in groups)
    if scorer and not any(completion["score"] is not None for group in groups for completion in group):
        raise RewardError(
            f"none of {count} completions has a score: all components of the reward with a weight returned None, or "
            "failed with on_error: skip"
        )
    sections = [text.as_mapping(section) for section in (config.reward, config.environment, config.sampling)]
    reward, environment, sampling = json.loads(json.dumps(sections))  # with lists in place of tuples
    files = list(dict.fromkeys(question.file for question in questions.questions))
    by = [questions.category_from] * bool(questions.category_from) + ["file"] * (len(files) > 1)
    result = {
        "model": config.model.path,
        "prompts_from": files,
        "references_from": questions.references_from,
        "category_from": questions.category_from,
        "reward": reward,
        "environment": environment,
        "weights": scorer.weights if scorer else {},
        "sampling": sampling,
        "seed": config.seed,
        "threshold": threshold,
        "statistics": statistics(results, threshold),
        "groups": {name: by_group(results, "file" if name == "file" else "category", threshold) for name in by},
        "prompts": results,
    }
    return result, rollout


def write(result: Result, path: Path) -> Path:
    """Write a result as JSON, atomically. Raises StorageError."""
    return write_whole(path, json.dumps(result, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def _prompt_result(question: Question, completions: list[Completion]) -> dict[str, Any]:
    """A prompt with its completions in order of their score, unscored ones last; `sample` is their number."""
    completions = [{**completion, "sample": number} for number, completion in enumerate(completions)]
    result = {
        "prompt": question.row.text,
        "index": question.number,
        "file": question.file,
        "category": question.category,
        "reference": question.reference,
        "completions": completions,
    }
    if "score" in completions[0]:
        scored = [completion for completion in completions if completion["score"] is not None]
        unscored = [{"rank": "UNSCORED", **completion} for completion in completions if completion["score"] is None]
        ranked = sorted(scored, key=lambda completion: -completion["score"])
        ranks = ["BEST", *["MEDIUM"] * (len(ranked) - 2), "WORST"][: len(ranked)]
        scores = [completion["score"] for completion in ranked]
        result |= {
            "mean": float(np.mean(scores)) if scores else None,
            "spread": scores[0] - scores[-1] if scores else None,
            "completions": [{"rank": rank, **completion} for rank, completion in zip(ranks, ranked, strict=True)]
            + unscored,
        }
    return with_reference(result)

"""Evaluation of a reward model on examples with known preferences or labels: a verdict for each, and their metrics."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.config import RewardConfig
from jaxrlhf.data import formats, sources
from jaxrlhf.data.datasets import prompt_text, train_validation_split
from jaxrlhf.data.examples import Example
from jaxrlhf.data.sources import Rows
from jaxrlhf.data.tokenise import TokenisedExample
from jaxrlhf.errors import ConfigError, DataError
from jaxrlhf.evaluation.prompts import CATEGORY, category
from jaxrlhf.evaluation.reward_metrics import HeldOut, evaluation, summary
from jaxrlhf.evaluation.text_layout import one_line
from jaxrlhf.metrics.statistics import wilson
from jaxrlhf.rewards.sources.model import RewardModel

SHOWN = 50  # examples printed


@dataclass(frozen=True)
class _Case:
    name: str
    prompt: str
    sequences: list[list[int]]  # prompt + response: good and bad, or the labelled one
    lengths: list[int]  # response tokens
    label: bool
    category: str


def judge(config: RewardConfig, by: str = "") -> dict[str, Any]:
    """Score the rows of `config.data` with the reward model `config.model`, tokenised as in training.

    Rows are {prompt, good, bad}, any preference format, or {prompt, completion, label}; a column `name` names a row.
    `by` is the column of their categories ("": `category`, if there is one).

    Scores of a model with two labels are log-odds, and the verdicts also have the probability of label 1 and the class
    that it means, good or bad. Returns a JSON object with the `examples`, their scores and whether these are right, the
    `accuracy` with its 95 % Wilson interval, of all and in `groups` of each category, and the `evaluation` of all of
    them (`reward_metrics`). Raises DataError, also for a score that is not finite, and ConfigError for a column `by`
    that the data lack.
    """
    source, data = config.model, config.data
    model = RewardModel(
        source.path,
        revision=source.revision,
        dtype=source.compute_dtype,
        micro_batch_size=config.train.eval_batch_size,
        tokenizer=config.tokenizer,
    )
    rows = sources.read_rows(data)
    if {"good", "bad"} <= {*rows.columns}:
        data = dataclasses.replace(data, columns={"chosen": "good", "rejected": "bad", **data.columns})
        rows = sources.read_rows(data)
    if by and by not in rows.columns:
        raise ConfigError(f"there is no column {by!r} in {data.path}; it has {', '.join(rows.columns)}")
    column = by or (CATEGORY if CATEGORY in rows.columns else "")
    labelled = formats.can_read(rows, "labels", data) and not formats.can_read(rows, "pairs", data)
    data = dataclasses.replace(data, max_length=min(data.max_length, model.max_length))

    def to_case(tokens: TokenisedExample, example: Example, rows: Rows, i: int) -> _Case:
        row, place = rows.rows[i], rows.locations[i]
        sequences = [tokens.sequence(k) for k in range(len(tokens.completions))]
        return _Case(
            name=str(row.get("name") or place.short),
            prompt="" if example.prompt is None else prompt_text(example.prompt),
            sequences=[model.ended(ids) for ids, _ in sequences],
            lengths=[sum(mask) for _, mask in sequences],
            label=bool(example.scores[0]) if labelled else True,
            category=category(row, column, str(place)) if column else "",
        )

    split = train_validation_split(data, model.tokenizer, "labels" if labelled else "pairs", to_case)
    cases = split.train
    scores = model.score_ids([ids for case in cases for ids in case.sequences])[0].astype(np.float64)
    two_labels = model.model_config.num_labels == 2
    if two_labels:
        probability = np.clip(scores, 1e-7, 1 - 1e-7)
        scores = np.log(probability) - np.log1p(-probability)
    scores = scores.reshape(len(cases), -1)
    for case, row in zip(cases, scores, strict=True):
        if not np.isfinite(row).all():
            raise DataError(f"{source.path} gives {row.tolist()} for example {case.name}: not a finite score")
    target = np.array([case.label for case in cases] if labelled else [0.0] * len(cases), np.float32)
    lengths = np.array([case.lengths for case in cases])
    held_out = HeldOut(scores, np.ones(scores.shape, bool), target, lengths)
    verdicts = [_verdict(case, row.tolist(), labelled, two_labels) for case, row in zip(cases, scores, strict=True)]
    groups = sorted({case.category for case in cases}) if column else []
    return {
        "model": source.path,
        "examples_from": data.path,
        "category_from": column,
        "data": str(split.report).splitlines(),
        "evaluation": evaluation(held_out, "classification" if labelled else "pairwise"),
        "accuracy": _accuracy(verdicts),
        "groups": {name: _accuracy([v for v in verdicts if v["category"] == name]) for name in groups},
        "examples": verdicts,
    }


def table(result: dict[str, Any], width: int = 100) -> str:
    """Format the first examples with their verdicts, the share that is right, and the evaluation for the console."""
    examples, lines = result["examples"], []
    for example in examples[:SHOWN]:
        if "label" in example:
            scores = f"{'good' if example['label'] else 'bad':<4} {_score(example, 'score')}"
        else:
            scores = f"good {_score(example, 'good')}  bad {_score(example, 'bad')}"
        head = f"{'right' if example['right'] else 'WRONG'}  {scores}  "
        lines.append(head + one_line(f"{example['name']}: {example['prompt']}", width - len(head)))
    if len(examples) > SHOWN:
        lines.append(f"and {len(examples) - SHOWN} more")
    lines += ["", f"{_share(result['accuracy'])} (95 % Wilson interval)"]
    if result["groups"]:
        lines += ["", f"by {result['category_from']}:"]
        lines += [f"{one_line(name, 40):<40}  {_share(found)}" for name, found in result["groups"].items()] + [""]
    dropped = [line for line in result["data"] if line.startswith(("dropped", "cut"))]
    return "\n".join([*lines, *summary(result["evaluation"]), *dropped])


def _accuracy(verdicts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    right, count = sum(verdict["right"] for verdict in verdicts), len(verdicts)
    return {"right": right, "examples": count, "share": right / count, "interval_95": list(wilson(right, count))}


def _share(found: dict[str, Any]) -> str:
    low, high = found["interval_95"]
    return f"{found['right']} of {found['examples']} right: {found['share']:.3f} [{low:.3f}, {high:.3f}]"


def _score(example: dict[str, Any], name: str) -> str:
    """A score of an example, of a model with two labels followed by the probability of label 1 and its class."""
    text = f"{example[name]:>9.3f}"
    if "probability" in example:
        text += f" (p {example['probability'][name]:.3f}, {example['class'][name]})"
    return text


def _verdict(case: _Case, scores: list[float], labelled: bool, two_labels: bool) -> dict[str, Any]:
    named = dict(zip(["score"] if labelled else ["good", "bad"], scores, strict=True))
    verdict: dict[str, Any] = {"name": case.name, "prompt": case.prompt, "category": case.category, **named}
    if two_labels:
        verdict["probability"] = {name: 1 / (1 + math.exp(-odds)) for name, odds in named.items()}
        verdict["class"] = {name: "good" if odds > 0 else "bad" for name, odds in named.items()}
    if labelled:
        return verdict | {"label": case.label, "right": (scores[0] > 0) == case.label}
    return verdict | {"right": scores[0] > scores[1]}

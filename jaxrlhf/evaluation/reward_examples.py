"""A reward model on examples of which the better response is known: a verdict for each, and how it does on all."""

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np

from jaxrlhf.config import RewardConfig
from jaxrlhf.data import labels, sources
from jaxrlhf.data.datasets import prompt_text, train_validation_split
from jaxrlhf.data.examples import Example
from jaxrlhf.data.sources import Rows
from jaxrlhf.data.tokenise import TokenisedExample
from jaxrlhf.errors import DataError
from jaxrlhf.evaluation.reward_metrics import HeldOut, evaluation, summary
from jaxrlhf.rewards.sources.model import RewardModel

SHOWN = 50  # examples with a line of their own


@dataclass(frozen=True)
class _Case:
    name: str
    prompt: str
    texts: list[list[int]]  # good and bad, or the one that has a label
    lengths: list[int]  # response tokens
    label: bool


def judge(config: RewardConfig) -> dict[str, Any]:
    """Score the rows of `config.data` with the reward model `config.model`, each written as in training.

    Rows are {prompt, good, bad} or any preference format, or {prompt, completion, label}; a column `name` names one.
    Of a model with two labels the scores are log-odds. Returns the `examples` with their scores and whether they came
    out right, and the `evaluation` of all (`reward_metrics`). Raises DataError, also for a score that is not finite.
    """
    source, data = config.model, config.data
    model = RewardModel(source.path, revision=source.revision, dtype=source.compute_dtype,
                        micro_batch_size=config.train.eval_batch_size)  # fmt: skip
    columns = {*sources.read_rows(data).columns}
    if {"good", "bad"} <= columns:
        data = dataclasses.replace(data, columns={"chosen": "good", "rejected": "bad", **data.columns})
    single = "label" in columns and not columns & {"good", "chosen", "accepted"}
    data = dataclasses.replace(data, max_length=min(data.max_length, model.limit))

    def row(tokens: TokenisedExample, example: Example, rows: Rows, i: int) -> _Case:
        given = rows.rows[i]
        made = [tokens.sequence(k) for k in range(len(tokens.completions))]
        return _Case(
            name=str(given.get("name") or rows.locations[i].short),
            prompt="" if example.prompt is None else prompt_text(example.prompt),
            texts=[ids for ids, _ in made],
            lengths=[sum(mask) for _, mask in made],
            label=labels.parse_label(given, f"data {rows.locations[i]}") if single else True,
        )

    split = train_validation_split(data, model.tokenizer, "labels" if single else "pairs", row)
    cases = split.train
    scores = model.score_ids([text for case in cases for text in case.texts])[0].astype(np.float64)
    if model.described.num_labels == 2:
        likely = np.clip(scores, 1e-7, 1 - 1e-7)
        scores = np.log(likely) - np.log1p(-likely)
    scores = scores.reshape(len(cases), -1)
    for case, found in zip(cases, scores, strict=True):
        if not np.isfinite(found).all():
            raise DataError(f"{source.path} gives {found.tolist()} for example {case.name}: no finite score")
    target = np.array([case.label for case in cases] if single else [0.0] * len(cases), np.float32)
    lengths = np.array([case.lengths for case in cases])
    found = HeldOut(scores, np.ones(scores.shape, bool), target, lengths)
    return {
        "model": source.path,
        "examples_from": data.path,
        "data": str(split.report).splitlines(),
        "evaluation": evaluation(found, "classification" if single else "pairwise"),
        "examples": [_verdict(case, row.tolist(), single) for case, row in zip(cases, scores, strict=True)],
    }


def table(result: dict[str, Any], width: int = 100) -> str:
    """A line for each of the first examples and its verdict, the share that is right, and the evaluation."""
    lines = []
    for example in result["examples"][:SHOWN]:
        if "label" in example:
            said = f"{'good' if example['label'] else 'bad':<4} {example['score']:>9.3f}"
        else:
            said = f"good {example['good']:>9.3f}  bad {example['bad']:>9.3f}"
        about = " ".join(f"{example['name']}: {example['prompt']}".split())
        line = f"{'right' if example['right'] else 'WRONG'}  {said}  {about}"
        lines.append(line if len(line) <= width else line[: width - 3] + "...")
    rest = len(result["examples"]) - SHOWN
    right = sum(example["right"] for example in result["examples"])
    lines += [f"and {rest} more"] * (rest > 0)
    lines += ["", f"{right} of {len(result['examples'])} right: {right / len(result['examples']):.3f}"]
    dropped = [line for line in result["data"] if line.startswith(("dropped", "cut"))]
    return "\n".join([*lines, *summary(result["evaluation"]), *dropped])


def _verdict(case: _Case, scores: list[float], single: bool) -> dict[str, Any]:
    about: dict[str, Any] = {"name": case.name, "prompt": case.prompt}
    if single:
        return about | {"label": case.label, "score": scores[0], "right": (scores[0] > 0) == case.label}
    return about | {"good": scores[0], "bad": scores[1], "right": scores[0] > scores[1]}

"""Win rates: shares of prompts to which one model's answers are better than another's."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from jaxrlhf.evaluation.length_control import length_controlled_win_rate
from jaxrlhf.evaluation.resampling import bootstrap_interval
from jaxrlhf.metrics.statistics import mean_and_error, wilson

Prompt = dict[str, Any]
MEASURES = {"score": "mean", "ROUGE-L": "rouge_l"}
"""Measure that prompts are compared by -> its key in a prompt's result."""


def value_of(prompt: Prompt, by: str) -> float | None:
    """The mean over a prompt's completions of what models are compared by; None if the prompt has none."""
    return prompt.get(MEASURES[by])


def against(first: Sequence[Prompt], other: Sequence[Prompt], by: str) -> dict[str, Any]:
    """Compare the results of `other` with those of `first` on the same prompts, prompt by prompt.

    A prompt is won by the higher mean over its completions, and a tie counts half. Prompts without a value of both
    models are left out. Returns a JSON object:

    - `prompts`, `left_out`, `wins`, `ties`, `losses` of `other`;
    - `win_rate` with its bootstrap interval over prompts, `decided_win_rate` without ties with its Wilson interval;
    - `length_controlled` (`length_control`), by the mean lengths of the completions in characters;
    - `difference`, other minus first: mean, standard error of the paired differences, and bootstrap interval.

    Without any prompt to compare, rates and difference are None; with a single one there are no intervals and errors.
    """
    assert all((a["file"], a["index"]) == (b["file"], b["index"]) for a, b in zip(first, other, strict=True)), (
        "the results are of different prompts"
    )
    pairs = [
        (theirs - ours, _length(b) - _length(a))
        for a, b in zip(first, other, strict=True)
        if (ours := value_of(a, by)) is not None and (theirs := value_of(b, by)) is not None
    ]
    result: dict[str, Any] = {"by": by, "prompts": len(pairs), "left_out": len(first) - len(pairs)}
    if not pairs:
        return result | {"wins": 0, "ties": 0, "losses": 0, "win_rate": None, "difference": None}
    differences, lengths = np.array(pairs).T
    outcomes = (np.sign(differences) + 1) / 2
    wins, losses, count = int((outcomes == 1).sum()), int((outcomes == 0).sum()), len(pairs)
    controlled, coefficient = length_controlled_win_rate(outcomes, lengths, np.ones((1, count)))
    mean, error = mean_and_error(differences)
    return result | {
        "wins": wins,
        "ties": count - wins - losses,
        "losses": losses,
        "win_rate": float(outcomes.mean()),
        "win_rate_interval_95": bootstrap_interval(lambda counts: counts @ outcomes / count, count),
        "decided_win_rate": wins / (wins + losses) if wins + losses else None,
        "decided_win_rate_interval_95": list(wilson(wins, wins + losses)) if wins + losses else None,
        "length_controlled": {
            "win_rate": float(controlled[0]),
            "interval_95": bootstrap_interval(
                lambda counts: length_controlled_win_rate(outcomes, lengths, counts)[0], count
            ),
            "length_coefficient": float(coefficient[0]),
            "mean_length_difference": float(lengths.mean()),
        },
        "difference": {
            "mean": mean,
            "standard_error": error if count > 1 else None,
            "interval_95": bootstrap_interval(lambda counts: counts @ differences / count, count),
        },
    }


def _length(prompt: Prompt) -> float:
    """Mean length of a prompt's completions, in characters."""
    return float(np.mean([len(completion["text"]) for completion in prompt["completions"]]))

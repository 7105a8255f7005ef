"""Statistics of scored completions, of all of them and of each category."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluation import text_metrics
from jaxrlhf.evaluation.pass_rates import numbers, pass_at_k
from jaxrlhf.evaluation.prompts import NO_CATEGORY
from jaxrlhf.metrics.statistics import mean_and_error, wilson

Prompt = dict[str, Any]


def with_reference(prompt: Prompt) -> Prompt:
    """The prompt with `sentence_bleu` and `rouge_l` against its reference: of each completion, and their means. Without
    a reference it is returned as it is."""
    if prompt.get("reference") is None:
        return prompt
    metrics = {"sentence_bleu": text_metrics.plain_bleu, "rouge_l": text_metrics.rouge_l}
    completions = [
        {**c, **{name: metric([c["text"]], [prompt["reference"]]) for name, metric in metrics.items()}}
        for c in prompt["completions"]
    ]
    means = {name: float(np.mean([c[name] for c in completions])) for name in metrics}
    return prompt | {"completions": completions} | means


def statistics(prompts: Sequence[Prompt], threshold: float | None = None) -> dict[str, Any]:
    """Statistics over all completions of an evaluation's `prompts`: those of `measures`, with the diversity of the
    texts and corpus BLEU."""
    texts = [completion["text"] for prompt in prompts for completion in prompt["completions"]]
    stats = measures(prompts, threshold) | {
        "distinct_1": text_metrics.distinct(texts, 1),
        "distinct_2": text_metrics.distinct(texts, 2),
        "repetition": _over_prompts(prompts, lambda completion: text_metrics.repetition([completion["text"]])),
        "identical_completions": 1 - len(set(texts)) / len(texts),
    }
    if "references" in stats:
        stats["references"]["corpus_bleu"] = _corpus_bleu(prompts)
    return stats


def by_group(prompts: Sequence[Prompt], key: str, threshold: float | None = None) -> dict[str, dict[str, Any]]:
    """`measures` of the prompts of each value of `key`, in alphabetical order, prompts without a category last."""
    names = sorted({prompt[key] for prompt in prompts}, key=lambda name: (name == NO_CATEGORY, name))
    return {name: measures([prompt for prompt in prompts if prompt[key] == name], threshold) for name in names}


def measures(prompts: Sequence[Prompt], threshold: float | None = None) -> dict[str, Any]:
    """Score, its components, length, finished responses, the policy's turns with an environment, and BLEU and ROUGE-L
    of prompts that have a reference.

    Standard errors are those of the per-prompt means, because completions of one prompt are not independent.
    Statistics of scores are missing without a reward, and where all completions are unscored; unscored completions have
    no part in them. With a `threshold` there is pass@k (`pass_rates`).
    """
    completions = [completion for prompt in prompts for completion in prompt["completions"]]
    finished = sum(completion["finished"] for completion in completions)
    stats: dict[str, Any] = {"prompts": len(prompts), "completions": len(completions)}
    if "score" in completions[0]:
        scores = [completion["score"] for completion in completions if completion["score"] is not None]
        stats |= {"unscored": 1 - len(scores) / len(completions)}
        if scores:
            stats |= _score_statistics([prompt for prompt in prompts if prompt["mean"] is not None], scores)
        if threshold is not None:
            stats["passes"] = _pass_rates(prompts, threshold)
    stats |= {
        "tokens_mean": float(np.mean([completion["tokens"] for completion in completions])),
        "tokens_standard_error": _over_prompts(prompts, lambda completion: completion["tokens"])["standard_error"],
        "finished": finished / len(completions),
        "finished_interval_95": list(wilson(finished, len(completions))),
        "components": {
            name: _over_prompts(prompts, lambda completion, name=name: completion["components"][name])
            for name in completions[0].get("components", {})
            if any(completion["components"][name] is not None for completion in completions)
        },
    }
    if "turns" in completions[0]:  # the policy's and the environment's alternate
        stats["turns"] = _over_prompts(prompts, lambda completion: (len(completion["turns"]) + 1) // 2)
    if with_reference := [prompt for prompt in prompts if prompt.get("reference") is not None]:
        stats["references"] = {
            "prompts": len(with_reference),
            "sentence_bleu": _mean_with_error(prompt["sentence_bleu"] for prompt in with_reference),
            "rouge_l": _mean_with_error(prompt["rouge_l"] for prompt in with_reference),
        }
    return stats


def _score_statistics(prompts: Sequence[Prompt], scores: Sequence[float]) -> dict[str, Any]:
    return _mean_with_error(prompt["mean"] for prompt in prompts) | {
        "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0,
        "min": min(scores),
        "max": max(scores),
        "spread_within_prompt": float(np.mean([prompt["spread"] for prompt in prompts])),
        "best_of_n_mean": float(np.mean([prompt["completions"][0]["score"] for prompt in prompts])),
    }


def _pass_rates(prompts: Sequence[Prompt], threshold: float) -> dict[str, Any]:
    """pass@k for the k of `numbers`, each the mean over prompts with so many scored completions."""
    scores = [[c["score"] for c in prompt["completions"] if c["score"] is not None] for prompt in prompts]
    counts = [(len(found), sum(score >= threshold for score in found)) for found in scores]
    most = max(total for total, _ in counts)
    rates = {}
    for k in numbers(most) if most else ():
        usable = [pass_at_k(total, passed, k) for total, passed in counts if total >= k]
        rates[str(k)] = _mean_with_error(usable) | {"prompts": len(usable)}
    return {"threshold": threshold, "pass_at": rates}


def _corpus_bleu(prompts: Sequence[Prompt]) -> float | None:
    """sacrebleu's corpus BLEU, 0 to 100; None without sacrebleu."""
    with_reference = [prompt for prompt in prompts if prompt.get("reference") is not None]
    pairs = [(c["text"], prompt["reference"]) for prompt in with_reference for c in prompt["completions"]]
    try:
        return text_metrics.corpus_bleu(*map(list, zip(*pairs, strict=True)))
    except ConfigError as error:  # the other metrics need no package
        warnings.warn(str(error), stacklevel=2)
        return None


def _over_prompts(prompts: Sequence[Prompt], value: Callable[[dict[str, Any]], float | None]) -> dict[str, Any]:
    """Mean over prompts of the mean `value` of their completions, where it is not None."""
    found = [[number for c in prompt["completions"] if (number := value(c)) is not None] for prompt in prompts]
    return _mean_with_error(float(np.mean(values)) for values in found if values)


def _mean_with_error(values: Iterable[float]) -> dict[str, Any]:
    """Mean and standard error, which is None for a single value."""
    values = list(values)
    mean, error = mean_and_error(values)
    return {"mean": mean, "standard_error": error if len(values) > 1 else None}

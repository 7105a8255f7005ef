"""Statistics of scored completions, tables for the console, and the comparison of two models."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxrlhf.errors import ConfigError, RewardError
from jaxrlhf.evaluation import text_metrics
from jaxrlhf.metrics.statistics import mean_and_error, wilson

Prompt = dict[str, Any]
Result = dict[str, Any]
TextMetric = Callable[[list[str], list[str]], float]


def statistics(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Statistics over all completions of an evaluation's `prompts`.

    Standard errors are those of the per-prompt means, because completions of one prompt are not independent.
    Statistics of scores and of references are included if the prompts have them. Unscored completions have no part in
    those of scores. Raises RewardError if all are unscored.
    """
    completions = [completion for prompt in prompts for completion in prompt["completions"]]
    texts = [completion["text"] for completion in completions]
    finished = sum(completion["finished"] for completion in completions)
    stats: dict[str, Any] = {"prompts": len(prompts), "completions": len(completions)}
    if "score" in completions[0]:
        scores = [completion["score"] for completion in completions if completion["score"] is not None]
        if not scores:
            raise RewardError(
                f"none of {len(completions)} completions has a score: all components of the reward with a weight "
                "returned None, or failed with on_error: skip"
            )
        stats |= {"unscored": 1 - len(scores) / len(completions)}
        stats |= _score_statistics([prompt for prompt in prompts if prompt["mean"] is not None], scores)
    stats |= {
        "distinct_1": text_metrics.distinct(texts, 1),
        "distinct_2": text_metrics.distinct(texts, 2),
        "repetition": _over_prompts(prompts, lambda completion: text_metrics.repetition([completion["text"]])),
        "identical_completions": 1 - len(set(texts)) / len(texts),
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
    if with_reference := [prompt for prompt in prompts if prompt.get("reference") is not None]:
        stats["references"] = _reference_statistics(with_reference)
    return stats


def _score_statistics(prompts: Sequence[Prompt], scores: Sequence[float]) -> dict[str, float]:
    return _mean_with_error(prompt["mean"] for prompt in prompts) | {
        "std": float(np.std(scores, ddof=1)) if len(scores) > 1 else 0.0,
        "min": min(scores),
        "max": max(scores),
        "spread_within_prompt": float(np.mean([prompt["spread"] for prompt in prompts])),
        "best_of_n_mean": float(np.mean([prompt["completions"][0]["score"] for prompt in prompts])),
    }


def _reference_statistics(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """sacrebleu's corpus BLEU, 0 to 100 (None without sacrebleu); NLTK's sentence BLEU and ROUGE-L, 0 to 1."""
    pairs = [(completion["text"], prompt["reference"]) for prompt in prompts for completion in prompt["completions"]]
    try:
        corpus_bleu = text_metrics.corpus_bleu(*map(list, zip(*pairs, strict=True)))
    except ConfigError as error:  # the other metrics need no package
        warnings.warn(str(error), stacklevel=2)
        corpus_bleu = None
    return {
        "prompts": len(prompts),
        "corpus_bleu": corpus_bleu,
        "sentence_bleu": _mean_with_error(_reference_score(prompt, text_metrics.plain_bleu) for prompt in prompts),
        "rouge_l": _mean_with_error(_reference_score(prompt, text_metrics.rouge_l) for prompt in prompts),
    }


def _reference_score(prompt: Prompt, metric: TextMetric) -> float:
    """`metric` of the completions of a prompt against its reference."""
    texts = [completion["text"] for completion in prompt["completions"]]
    return metric(texts, [prompt["reference"]] * len(texts))


def _over_prompts(prompts: Sequence[Prompt], value: Callable[[dict[str, Any]], float | None]) -> dict[str, float]:
    """Mean over prompts of the mean `value` of their completions, where it is not None."""
    found = [[number for c in prompt["completions"] if (number := value(c)) is not None] for prompt in prompts]
    return _mean_with_error(float(np.mean(values)) for values in found if values)


def _mean_with_error(values: Iterable[float]) -> dict[str, float]:
    mean, error = mean_and_error(values)
    return {"mean": mean, "standard_error": error}


def table(result: Result, width: int = 100) -> str:
    """Format an evaluation for the console: every prompt with its completions, best score first, then statistics."""
    lines = []
    for prompt in result["prompts"]:
        lines += ["", one_line(prompt["prompt"], width)]
        if prompt.get("reference") is not None:
            lines.append(f"  {'REFERENCE':<16}  {one_line(prompt['reference'], width - 20)}")
        for completion in prompt["completions"]:
            score = completion.get("score")
            head = f"{completion.get('rank', ''):<16}" if score is None else f"{completion['rank']:<6} {score:>9.3f}"
            lines.append(f"  {head}  {one_line(completion['text'], width - 20)}")
    stats = result["statistics"]
    lines += ["", f"{stats['prompts']} prompts, {stats['completions']} completions of {result['model']}"]
    return "\n".join([*lines, *_statistics_lines(stats)]).lstrip("\n")


def _statistics_lines(stats: dict[str, Any]) -> list[str]:
    """The statistics, a line per subject. "+-" precedes the standard error over prompts."""
    low, high = stats["finished_interval_95"]
    lines = {}
    if "mean" in stats:
        lines["score"] = f"{_with_error(stats)}, std {stats['std']:.4f}, min {stats['min']:.4f}, max {stats['max']:.4f}"
        lines["per prompt"] = (
            f"best minus worst score {stats['spread_within_prompt']:.4f}, best score {stats['best_of_n_mean']:.4f} "
            "(means over prompts)"
        )
    if stats.get("unscored"):
        lines["unscored"] = f"{stats['unscored']:.4f} of the completions, which have no part in the scores"
    if references := stats.get("references"):
        bleu = references["corpus_bleu"]
        corpus = "" if bleu is None else f", corpus BLEU {bleu:.2f} of 100"
        lines["BLEU"] = f"{_with_error(references['sentence_bleu'])}{corpus}"
        lines["ROUGE-L"] = f"{_with_error(references['rouge_l'])}, {references['prompts']} prompts with a reference"
    lines["length"] = (
        f"{stats['tokens_mean']:.1f} +- {stats['tokens_standard_error']:.1f} tokens, "
        f"finished {stats['finished']:.2f} [{low:.2f}, {high:.2f}]"
    )
    lines["diversity"] = (
        f"distinct-1 {stats['distinct_1']:.2f}, distinct-2 {stats['distinct_2']:.2f}, "
        f"identical completions {stats['identical_completions']:.2f}"
    )
    lines["repetition"] = _with_error(stats["repetition"])
    for name, component in stats["components"].items():
        if component["mean"] or not name.endswith(("_truncated", "_unanswered")):  # these only if they occurred
            lines[f"reward {name}"] = _with_error(component)
    return [f"{name:<13} {text}" for name, text in lines.items()]


def _with_error(value: dict[str, Any]) -> str:
    return f"{value['mean']:.4f} +- {value['standard_error']:.4f}"


def paired(first: Result, second: Result) -> dict[str, Any]:
    """Compare two models on the same prompts: win rate and mean difference.

    A prompt counts by its mean score, or without scores by its mean ROUGE-L against the reference. The win rate is the
    share of prompts without a tie that `first` wins. The difference is `first` minus `second`, with the standard error
    of the paired differences. Raises RewardError if no prompt has a score by both.
    """
    pairs = list(zip(first["prompts"], second["prompts"], strict=True))
    assert all(a["index"] == b["index"] for a, b in pairs), "the results are of different prompts"
    if "mean" in first["statistics"]:
        pairs = [(a, b) for a, b in pairs if None not in (a["mean"], b["mean"])]
        by, differences = "score", [a["mean"] - b["mean"] for a, b in pairs]
        if not pairs:
            raise RewardError("no prompt has a scored completion of both models: there is nothing to compare")
    else:
        by, rouge = "ROUGE-L", text_metrics.rouge_l
        pairs = [pair for pair in pairs if pair[0]["reference"] is not None]
        differences = [_reference_score(a, rouge) - _reference_score(b, rouge) for a, b in pairs]
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {
        "by": by,
        "prompts": len(differences),
        "wins": wins,
        "ties": len(differences) - wins - losses,
        "losses": losses,
        "win_rate": wins / (wins + losses) if wins + losses else 0.5,
        "win_rate_interval_95": list(wilson(wins, wins + losses)),
        "difference": _mean_with_error(differences),
    }


def comparison(first: Result, second: Result) -> str:
    """Format two evaluations and their paired comparison for the console."""
    found = paired(first, second)
    low, high = found["win_rate_interval_95"]
    lines = []
    for label, result in (("A", first), ("B", second)):
        stats = result["statistics"]
        lines.append(f"{label}: {result['model']}, {stats['prompts']} prompts, {stats['completions']} completions")
        lines += [f"  {line}" for line in _statistics_lines(stats)]
    return "\n".join(
        [
            *lines,
            f"paired comparison by {found['by']}:",
            f"  A - B         {_with_error(found['difference'])}",
            f"  wins          A {found['wins']}, B {found['losses']}, ties {found['ties']}; A wins "
            f"{found['win_rate']:.2f} [{low:.2f}, {high:.2f}] of the prompts without a tie",
        ]
    )


def one_line(text: str, width: int) -> str:
    """`text` without line breaks and repeated spaces, truncated to `width` characters."""
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 3] + "..."

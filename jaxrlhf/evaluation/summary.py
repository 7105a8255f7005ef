"""What completions say about a model: statistics over prompts, a table for a console, two models side by side."""

import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import numpy as np

from jaxrlhf.errors import ConfigError
from jaxrlhf.evaluation import text_metrics

Z95 = 1.959964  # two-sided 95 % of a normal distribution
Prompt = dict[str, Any]
Result = dict[str, Any]


def mean_and_error(values: Iterable[float]) -> tuple[float, float]:
    """Mean and its standard error, s / sqrt(n) with the n - 1 variance; the error of a single value is 0."""
    data = np.asarray(list(values), np.float64)
    return float(data.mean()), float(data.std(ddof=1) / np.sqrt(len(data))) if len(data) > 1 else 0.0


def wilson(successes: int, total: int, z: float = Z95) -> tuple[float, float]:
    """Score interval of a share (Wilson 1927, https://doi.org/10.1080/01621459.1927.10502953); (0, 1) for no trials."""
    if total == 0:
        return 0.0, 1.0
    share = successes / total
    centre = share + z * z / (2 * total)
    half = z * np.sqrt(share * (1 - share) / total + z * z / (4 * total * total))
    scale = 1 + z * z / total
    low, high = float((centre - half) / scale), float((centre + half) / scale)
    return min(max(0.0, low), share), max(min(1.0, high), share)  # rounding must not put the share outside


def statistics(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """Figures over all completions. Completions of one prompt are not independent, so every standard error is that of
    the prompts' means. What needs scores or references is there where they are."""
    answers = [answer for prompt in prompts for answer in prompt["completions"]]
    texts = [answer["text"] for answer in answers]
    finished = sum(answer["finished"] for answer in answers)
    stats: dict[str, Any] = {"prompts": len(prompts), "completions": len(answers)}
    if "score" in answers[0]:
        stats |= _scores(prompts, answers)
    stats |= {
        "distinct_1": text_metrics.distinct(texts, 1),
        "distinct_2": text_metrics.distinct(texts, 2),
        "repetition": _over_prompts(prompts, lambda answer: text_metrics.repetition([answer["text"]])),
        "identical_completions": 1 - len(set(texts)) / len(texts),
        "tokens_mean": float(np.mean([answer["tokens"] for answer in answers])),
        "tokens_standard_error": _over_prompts(prompts, lambda answer: answer["tokens"])["standard_error"],
        "finished": finished / len(answers),
        "finished_interval_95": list(wilson(finished, len(answers))),
        "components": {
            name: _over_prompts(prompts, lambda answer, name=name: answer["components"][name])
            for name in answers[0].get("components", {})
        },
    }
    if referred := [prompt for prompt in prompts if prompt.get("reference") is not None]:
        stats["references"] = _against_references(referred)
    return stats


def _scores(prompts: Sequence[Prompt], answers: Sequence[dict[str, Any]]) -> dict[str, float]:
    scores = np.array([answer["score"] for answer in answers])
    mean, error = mean_and_error(prompt["mean"] for prompt in prompts)
    return {
        "mean": mean,
        "standard_error": error,
        "std": float(scores.std(ddof=1)) if len(scores) > 1 else 0.0,
        "min": float(scores.min()),
        "max": float(scores.max()),
        "spread_within_prompt": float(np.mean([prompt["spread"] for prompt in prompts])),
        "best_of_n_mean": float(np.mean([prompt["completions"][0]["score"] for prompt in prompts])),
    }


def _against_references(prompts: Sequence[Prompt]) -> dict[str, Any]:
    """sacrebleu's corpus BLEU, 0 to 100, None without sacrebleu; NLTK's sentence BLEU and ROUGE-L, 0 to 1."""
    pairs = [(answer["text"], prompt["reference"]) for prompt in prompts for answer in prompt["completions"]]
    try:
        corpus = text_metrics.corpus_bleu(*map(list, zip(*pairs, strict=True)))
    except ConfigError as error:  # the other measures need no package
        warnings.warn(str(error), stacklevel=2)
        corpus = None
    measures = {"sentence_bleu": text_metrics.plain_bleu, "rouge_l": text_metrics.rouge_l}
    return {
        "prompts": len(prompts),
        "corpus_bleu": corpus,
        **{name: _mean_of([per_prompt(prompt, measure) for prompt in prompts]) for name, measure in measures.items()},
    }


def per_prompt(prompt: Prompt, measure: Callable[[list[str], list[str]], float]) -> float:
    """`measure` of the completions of a prompt against its reference."""
    texts = [answer["text"] for answer in prompt["completions"]]
    return measure(texts, [prompt["reference"]] * len(texts))


def _over_prompts(prompts: Sequence[Prompt], value: Callable[[dict[str, Any]], float]) -> dict[str, float]:
    return _mean_of([float(np.mean([value(answer) for answer in prompt["completions"]])) for prompt in prompts])


def _mean_of(values: Iterable[float]) -> dict[str, float]:
    return dict(zip(("mean", "standard_error"), mean_and_error(values), strict=True))


def table(result: Result, width: int = 100) -> str:
    """The result for a console: every prompt with its completions, ranked where they have scores, then the
    statistics."""
    lines = []
    for prompt in result["prompts"]:
        lines += ["", _one_line(prompt["prompt"], width)]
        if prompt.get("reference") is not None:
            lines.append(f"  {'REFERENCE':<16}  {_one_line(prompt['reference'], width - 20)}")
        for answer in prompt["completions"]:
            head = f"{answer['rank']:<6} {answer['score']:>9.3f}" if "score" in answer else " " * 16
            lines.append(f"  {head}  {_one_line(answer['text'], width - 20)}")
    stats = result["statistics"]
    lines += ["", f"{stats['prompts']} prompts, {stats['completions']} completions of {result['model']}"]
    lines += [f"{name:<13} {text}" for name, text in figures(stats).items()]
    return "\n".join(lines).lstrip("\n")


def figures(stats: dict[str, Any]) -> dict[str, str]:
    """The statistics as lines, by what they are about. Behind +- stands the standard error over prompts."""
    low, high = stats["finished_interval_95"]
    lines = {}
    if "mean" in stats:
        lines["score"] = f"{_with_error(stats)}, std {stats['std']:.4f}, from {stats['min']:.4f} to {stats['max']:.4f}"
        lines["per prompt"] = (
            f"best - worst {stats['spread_within_prompt']:.4f}, mean best {stats['best_of_n_mean']:.4f}"
        )
    if found := stats.get("references"):
        corpus = "" if found["corpus_bleu"] is None else f", of all together {found['corpus_bleu']:.2f} of 100"
        lines["BLEU"] = f"{_with_error(found['sentence_bleu'])}{corpus}"
        lines["ROUGE-L"] = f"{_with_error(found['rouge_l'])}, {found['prompts']} prompts with a reference"
    lines["length"] = (
        f"{stats['tokens_mean']:.1f} +- {stats['tokens_standard_error']:.1f} tokens, "
        f"finished {stats['finished']:.2f} [{low:.2f}, {high:.2f}]"
    )
    lines["variety"] = (
        f"distinct-1 {stats['distinct_1']:.2f}, distinct-2 {stats['distinct_2']:.2f}, "
        f"identical {stats['identical_completions']:.2f}"
    )
    lines["repetition"] = _with_error(stats["repetition"])
    for name, part in stats["components"].items():
        if part["mean"] or not name.endswith(("_truncated", "_unanswered")):  # said only where it happened
            lines[f"from {name}"] = _with_error(part)
    return lines


def _with_error(part: dict[str, Any]) -> str:
    return f"{part['mean']:.4f} +- {part['standard_error']:.4f}"


def paired(first: Result, second: Result) -> dict[str, Any]:
    """Two models on the same prompts: who is better how often, and by how much.

    Compared are the means of each prompt: of the scores, or where there are none of ROUGE-L against its reference. The
    share of prompts that `first` wins is of those that are no tie; the difference is `first` minus `second`, and its
    standard error that of the differences.
    """
    pairs = list(zip(first["prompts"], second["prompts"], strict=True))
    assert all(a["index"] == b["index"] for a, b in pairs), "other prompts"
    if "mean" in first["statistics"]:
        by, differences = "score", [a["mean"] - b["mean"] for a, b in pairs]
    else:
        by, rouge = "ROUGE-L", text_metrics.rouge_l
        both = [pair for pair in pairs if pair[0]["reference"] is not None]
        differences = [per_prompt(a, rouge) - per_prompt(b, rouge) for a, b in both]
    wins, losses = sum(d > 0 for d in differences), sum(d < 0 for d in differences)
    return {
        "by": by,
        "prompts": len(differences),
        "wins": wins,
        "ties": len(differences) - wins - losses,
        "losses": losses,
        "win_rate": wins / (wins + losses) if wins + losses else 0.5,
        "win_rate_interval_95": list(wilson(wins, wins + losses)),
        "difference": _mean_of(differences),
    }


def comparison(first: Result, second: Result) -> str:
    """Two results and `paired` of them for a console."""
    found = paired(first, second)
    low, high = found["win_rate_interval_95"]
    lines = []
    for mark, result in (("A", first), ("B", second)):
        stats = result["statistics"]
        lines += [f"{mark}: {result['model']}, {stats['prompts']} prompts, {stats['completions']} completions"]
        lines += [f"  {name:<13} {text}" for name, text in figures(stats).items()]
    return "\n".join(
        [
            *lines,
            f"by {found['by']}, prompt by prompt:",
            f"  A - B         {_with_error(found['difference'])}",
            f"  wins          A {found['wins']}, B {found['losses']}, ties {found['ties']}; A has "
            f"{found['win_rate']:.2f} [{low:.2f}, {high:.2f}] of those that are decided",
        ]
    )


def _one_line(text: str, width: int) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= width else flat[: width - 3] + "..."

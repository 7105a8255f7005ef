"""Picture of a comparison."""

import functools
from pathlib import Path
from typing import Any

import numpy as np

from jaxrlhf.evaluation.win_rates import value_of
from jaxrlhf.metrics import plots
from jaxrlhf.metrics.drawing import plain

Result = dict[str, Any]
MOST_TICKS = 30


def draw(result: Result, folder: Path) -> list[Path]:
    """Draw compare.png: panels of score, win rate, score against KL, categories, and the score of each prompt, as far
    as there are such values; and bleu.png, the sentence BLEU of each prompt, if there are references. Raises
    JaxrlhfError if matplotlib is missing."""
    models = result["models"]
    chosen = [_scores, _win_rates]
    if any(model["kl"] and "mean" in model["kl"] for model in models):
        chosen.append(_score_and_kl)
    chosen += [*(_by_group(column) for column in models[0]["groups"]), _by_prompt]
    title = "   ".join(f"{model['label']}: {model['model']}" for model in models)
    drawn = [functools.partial(panel, result=result) for panel in chosen]
    paths = [plots.panels(folder / "compare.png", drawn, title)]
    answers = [prompt["answers"] for prompt in result["prompts"] if prompt["reference"] is not None]
    if answers:
        bleu = {
            model["label"]: [of_prompt[i]["sentence_bleu"] for of_prompt in answers] for i, model in enumerate(models)
        }
        paths.append(plots.bars(bleu, folder / "bleu.png", "sentence BLEU", title))
    return paths


def _measure(stats: dict[str, Any], by: str) -> tuple[float, float]:
    """Mean and standard error of what models are compared by; nan where there is none."""
    value = stats if by == "score" else stats.get("references", {}).get("rouge_l", {})
    return value.get("mean", np.nan), value.get("standard_error") or 0.0


def _scores(axis: Any, result: Result) -> None:
    values = [_measure(model["statistics"], result["by"]) for model in result["models"]]
    labels = [model["label"] for model in result["models"]]
    for number, (mean, error) in enumerate(values):
        axis.errorbar([number], [mean], [error], fmt="o", capsize=4, color=f"C{number % 10}")
    axis.set_xticks(range(len(labels)), labels)
    axis.set_xlim(-0.5, len(labels) - 0.5)
    axis.set_title(f"{result['by']}, mean and standard error")


def _win_rates(axis: Any, result: Result) -> None:
    for number, model in enumerate(result["models"]):
        found = model["against"]
        if not found or not found["prompts"]:
            continue
        controlled = found["length_controlled"]
        for share, interval, offset, marker in (
            (found["win_rate"], found["win_rate_interval_95"], -0.1, "o"),
            (controlled["win_rate"], controlled["interval_95"], 0.1, "s"),
        ):
            low, high = interval or (share, share)
            error = [[max(0, share - low)], [max(0, high - share)]]
            axis.errorbar([number + offset], [share], error, fmt=marker, capsize=4, color=f"C{number % 10}")
    labels = [model["label"] for model in result["models"]]
    axis.set_xticks(range(1, len(labels)), labels[1:])
    axis.set_xlim(0.5, len(labels) - 0.5)
    axis.axhline(0.5, color="grey", linewidth=0.8)
    axis.set_ylim(-0.03, 1.03)
    axis.set_title("win rate against A (circle), length-controlled (square)")


def _score_and_kl(axis: Any, result: Result) -> None:
    for number, model in enumerate(result["models"]):
        divergence = model["kl"] if number else {"mean": 0.0, "standard_error": 0.0}
        if not divergence or "mean" not in divergence:
            continue
        mean, error = _measure(model["statistics"], result["by"])
        spread = divergence["standard_error"] or 0.0
        axis.errorbar([divergence["mean"]], [mean], [error], [spread], fmt="o", capsize=3, color=f"C{number % 10}")
        axis.annotate(model["label"], (divergence["mean"], mean), xytext=(5, 5), textcoords="offset points")
    axis.set_xlabel("KL to A, nats per completion")
    axis.set_title(f"{result['by']} against KL")


def _by_group(column: str) -> Any:
    def panel(axis: Any, result: Result) -> None:
        models = result["models"]
        names = list(models[0]["groups"][column])[:MOST_TICKS]
        width = 0.8 / len(models)
        for number, model in enumerate(models):
            values = [_measure(model["groups"][column][name], result["by"]) for name in names]
            places = np.arange(len(names)) + (number - (len(models) - 1) / 2) * width
            means, errors = zip(*values, strict=True)
            axis.errorbar(places, means, errors, fmt="o", capsize=3, label=model["label"], color=f"C{number % 10}")
        axis.set_xticks(range(len(names)), [plain(name[:18]) for name in names], rotation=20, ha="right", fontsize=8)
        axis.legend(fontsize="small")
        axis.set_title(f"{result['by']} by {plain(column)}")

    return panel


def _by_prompt(axis: Any, result: Result) -> None:
    count = len(result["prompts"])
    for number, model in enumerate(result["models"]):
        values = [value_of(prompt["answers"][number], result["by"]) for prompt in result["prompts"]]
        numbers = [np.nan if value is None else value for value in values]
        style = {"marker": ".", "linestyle": "-" if count <= MOST_TICKS else "", "linewidth": 0.8, "alpha": 0.8}
        axis.plot(range(1, count + 1), numbers, label=model["label"], color=f"C{number % 10}", **style)
    axis.set_xlabel("prompt")
    axis.legend(fontsize="small")
    axis.set_title(f"{result['by']} of each prompt")

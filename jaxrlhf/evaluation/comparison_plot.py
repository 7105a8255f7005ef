"""Picture of a comparison. matplotlib is imported only when it is drawn."""

import io
from typing import Any

import numpy as np

Result = dict[str, Any]
MOST_TICKS = 30
_PROMPTS = {"score": "mean", "BLEU": "sentence_bleu", "ROUGE-L": "rouge_l"}


def draw(result: Result) -> bytes | None:
    """A PNG with panels of score, win rate, score against KL, categories, and score and BLEU of each prompt, as far as
    there are such values; None without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        return None
    matplotlib.use("Agg")
    from matplotlib.figure import Figure

    panels = [_scores, _win_rates]
    if any(model["kl"] and "mean" in model["kl"] for model in result["models"]):
        panels.append(_score_and_kl)
    panels += [_by_group(column) for column in result["models"][0]["groups"]]
    values = [key for key in ("score", "BLEU") if _has(result, _PROMPTS[key])]
    panels += [_by_prompt(key) for key in values or ["ROUGE-L"]]
    rows = -(-len(panels) // 2)
    figure = Figure(figsize=(12, 3.6 * rows), layout="constrained")
    figure.suptitle("   ".join(f"{model['label']}: {model['model']}" for model in result["models"]), fontsize=9)
    axes = list(figure.subplots(rows, 2, squeeze=False).flat)
    for axis, panel in zip(axes, panels, strict=False):
        panel(axis, result)
        axis.grid(alpha=0.3)
    for axis in axes[len(panels) :]:
        axis.set_axis_off()
    picture = io.BytesIO()
    figure.savefig(picture, dpi=110)
    return picture.getvalue()


def _has(result: Result, key: str) -> bool:
    return any(answer.get(key) is not None for prompt in result["prompts"] for answer in prompt["answers"])


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
        axis.set_xticks(range(len(names)), [name[:18] for name in names], rotation=20, ha="right", fontsize=8)
        axis.legend(fontsize="small")
        axis.set_title(f"{result['by']} by {column}")

    return panel


def _by_prompt(name: str) -> Any:
    def panel(axis: Any, result: Result) -> None:
        count = len(result["prompts"])
        for number, model in enumerate(result["models"]):
            values = [prompt["answers"][number].get(_PROMPTS[name]) for prompt in result["prompts"]]
            numbers = [np.nan if value is None else value for value in values]
            line = "-" if count <= MOST_TICKS else ""
            axis.plot(
                range(1, count + 1), numbers, marker=".", linestyle=line, alpha=0.8, linewidth=0.8,
                label=model["label"], color=f"C{number % 10}",
            )  # fmt: skip
        axis.set_xlabel("prompt")
        axis.legend(fontsize="small")
        axis.set_title(f"{name} of each prompt")

    return panel

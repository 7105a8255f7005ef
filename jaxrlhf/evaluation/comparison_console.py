"""A comparison of language models as text for the console."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.evaluation.console import SHOWN_GROUPS, amounts, with_error
from jaxrlhf.evaluation.text_layout import WIDTH, one_line, side_by_side, text_table, wrapped

Result = dict[str, Any]


def render(result: Result, show: int, width: int = WIDTH) -> str:
    """The answers to the first `show` prompts side by side, a table with a row per model, one of training costs, one
    per category and file, and notes."""
    models, lines = result["models"], []
    for prompt in result["prompts"][:show]:
        lines += [*_answers(prompt, result["by"], width), ""]
    rest = len(result["prompts"]) - show
    if show and rest > 0:
        lines += [f"({rest} more prompts: --show, or all with --output DIR)", ""]
    lines += [f"{model['label']}: {model['model']}" for model in models]
    stats = models[0]["statistics"]
    sampling = "greedy" if result["sampling"]["greedy"] else f"temperature {result['sampling']['temperature']:g}"
    lines += [f"{amounts(stats)} of each model, {sampling}", ""]
    lines += text_table(_model_rows(result), width)
    if result["references_from"]:
        lines += ["", "against references:", *text_table(_reference_rows(models), width)]
    if len(names := _component_names(models)) > 1:
        lines += ["", "parts of the reward, before their weights:", *text_table(_component_rows(result, names), width)]
    if any(model["training"] for model in models):
        lines += ["", "training:", *text_table(_training_rows(models), width)]
    for column in models[0]["groups"]:
        lines += ["", f"by {column}:", *text_table(_group_rows(models, column, result["by"]), width)]
        if len(names) > 1:
            parts = _group_component_rows(models, column, names)
            lines += ["", f"by {column}, parts of the reward:", *text_table(parts, width)]
    lines += ["", *_explanations(result, width)]
    for note in result["notes"]:
        lines += wrapped(f"note: {note}", width)
    return "\n".join(lines)


def _answers(prompt: Mapping[str, Any], by: str, width: int) -> list[str]:
    """The first sample of each model, with its score; the mean of the prompt and its improvement over A."""
    category = f" ({prompt['category']})" if prompt["category"] != "(none)" else ""
    lines = wrapped(f"prompt {prompt['index'] + 1}{category}: {prompt['prompt']}", width)
    if prompt["reference"] is not None:
        lines += wrapped(f"reference: {prompt['reference']}", width)
    heads, texts = [], []
    for answer in prompt["answers"]:
        sample = min(answer["completions"], key=lambda completion: completion["sample"])
        score = sample.get("score", sample.get("rouge_l"))
        head = f"{answer['label']}  {by} {'none' if score is None else f'{score:.3f}'}"
        if len(answer["completions"]) > 1 and answer.get("mean") is not None:
            head += f", mean {answer['mean']:.3f}"
        if answer["improvement"] is not None:
            head += f" ({answer['improvement']:+.3f})"
        heads.append(head)
        texts.append(sample["text"])
    return [*lines, *side_by_side(heads, texts, width)]


def _model_rows(result: Result) -> list[list[str]]:
    by_score = result["by"] == "score"
    passes = list(result["models"][0]["statistics"].get("passes", {}).get("pass_at", {}))
    rows = [
        [
            "model",
            *["score"] * by_score,
            f"{result['by']} - A",
            "wins-ties-losses",
            "win rate",
            "length-controlled",
            "KL to A",
            *(f"pass@{k}" for k in passes),
            "tokens",
            "finished",
        ]
    ]
    for model in result["models"]:
        stats, divergence = model["statistics"], model["kl"]
        length = {"mean": stats["tokens_mean"], "standard_error": stats["tokens_standard_error"]}
        rows.append(
            [
                model["label"],
                *[with_error(stats, 3) if "mean" in stats else "-"] * by_score,
                *_compared(model["against"]),
                with_error(divergence, 3) if divergence and "mean" in divergence else "-",
                *(with_error(stats["passes"]["pass_at"][k], 3) for k in passes),
                with_error(length, 1),
                f"{stats['finished']:.2f}",
            ]
        )
    return rows


def _compared(found: Mapping[str, Any] | None) -> list[str]:
    """Difference, wins, win rate and length-controlled win rate."""
    if found is None or not found["prompts"]:
        return ["-"] * 4
    controlled = found["length_controlled"]
    return [
        with_error(found["difference"], 3),
        f"{found['wins']}-{found['ties']}-{found['losses']}",
        _rate(found["win_rate"], found["win_rate_interval_95"]),
        _rate(controlled["win_rate"], controlled["interval_95"]),
    ]


def _reference_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    rows = [["model", "prompts", "BLEU", "ROUGE-L", "corpus BLEU"]]
    for model in models:
        found = model["statistics"].get("references")
        if found is None:
            rows.append([model["label"], "0", "-", "-", "-"])
            continue
        corpus = "-" if found["corpus_bleu"] is None else f"{found['corpus_bleu']:.2f}"
        means = [with_error(found[key], 3) for key in ("sentence_bleu", "rouge_l")]
        rows.append([model["label"], str(found["prompts"]), *means, corpus])
    return rows


def _component_names(models: Sequence[Mapping[str, Any]]) -> list[str]:
    names = dict.fromkeys(name for model in models for name in model["statistics"]["components"])
    return [name for name in names if not name.endswith(("_truncated", "_unanswered", "_spread"))]


def _component_rows(result: Result, names: Sequence[str]) -> list[list[str]]:
    weights = result["weights"]
    rows = [["model", *(f"{name} (x {weights[name]:g})" if name in weights else name for name in names)]]
    for model in result["models"]:
        found = model["statistics"]["components"]
        rows.append([model["label"], *(with_error(found[name], 3) if name in found else "-" for name in names)])
    return rows


def _training_rows(models: Sequence[Mapping[str, Any]]) -> list[list[str]]:
    equal = [model["at_equal_tokens"] for model in models if model["at_equal_tokens"]]
    least = f" at {min(found['tokens'] for found in equal):,.0f} tokens" if equal else ""
    rows = [["model", "method", "time", "peak memory", "device memory", "tokens generated", "steps"]]
    rows[0] += [f"score{least}", f"KL{least}"] * bool(equal)
    for model in models:
        run, found = model["training"], model["at_equal_tokens"] or {}
        if run is None:
            rows.append([model["label"], "no run directory", *["-"] * (len(rows[0]) - 2)])
            continue
        tokens = run["generated_tokens"]
        rows.append(
            [
                model["label"],
                run["method"],
                f"{'at least ' * bool(run['open_starts'])}{duration(run['seconds'])}",
                gigabytes(run["peak_memory"]["host"]),
                gigabytes(run["peak_memory"]["device"]),
                "-" if tokens is None else f"{tokens:,.0f}",
                f"{run['steps']:,}",
                *["-" if found.get(key) is None else f"{found[key]:.3f}" for key in ("score", "kl")] * bool(equal),
            ]
        )
    return rows


def _group_rows(models: Sequence[Mapping[str, Any]], column: str, by: str) -> list[list[str]]:
    """A row per group: its prompts; of each model the score, and from the second on the win rate."""
    groups = list(models[0]["groups"][column])
    rows = [[column, "prompts"]]
    for model in models:
        rows[0] += [f"{model['label']} {by}", *[f"{model['label']} wins"] * (model["against"] is not None)]
    for name in groups[:SHOWN_GROUPS]:
        row = [one_line(name, 28), str(models[0]["groups"][column][name]["prompts"])]
        for model in models:
            stats = model["groups"][column][name]
            value = stats if by == "score" else stats.get("references", {}).get("rouge_l", {})
            row.append(with_error(value, 3) if "mean" in value else "-")
            if (found := stats["against"]) is not None:
                row.append(_rate(found["win_rate"], None) if found["prompts"] else "-")
        rows.append(row)
    if len(groups) > SHOWN_GROUPS:
        rows.append([f"and {len(groups) - SHOWN_GROUPS} more", *[""] * (len(rows[0]) - 1)])
    return rows


def _group_component_rows(models: Sequence[Mapping[str, Any]], column: str, names: Sequence[str]) -> list[list[str]]:
    """A row per group and model: the mean of each component of the reward, before its weight."""
    rows = [[column, "model", *names]]
    for group in list(models[0]["groups"][column])[:SHOWN_GROUPS]:
        for model in models:
            found = model["groups"][column][group]["components"]
            title = one_line(group, 28) if model is models[0] else ""
            rows.append([title, model["label"], *(with_error(found[n], 3) if n in found else "-" for n in names)])
    return rows


def _explanations(result: Result, width: int) -> list[str]:
    """Explanation of the columns of the table of models."""
    sampled = len(result["prompts"][0]["answers"][0]["completions"])
    mean = f"mean {result['by']} of its {sampled} completions" if sampled > 1 else result["by"]
    draws = result["bootstrap"]
    text = (
        f"A is the baseline. A prompt is won by the higher {mean}; a tie counts half. +- is a standard error over "
        f"prompts, [ ] a 95 % bootstrap interval over prompts ({draws['resamples']} resamples, seed {draws['seed']}). "
        "length-controlled: win rate at equal length, by a logistic regression on the length difference (Dubois et al. "
        "2024). KL: nats per completion, on the model's own completions."
    )
    if any(model["at_equal_tokens"] for model in result["models"]):
        text += (
            " Score and KL at equal tokens are those of the training batch at the first update by which so many tokens "
            "were generated."
        )
    return wrapped(text, width)


def _rate(share: float, interval: Sequence[float] | None) -> str:
    return f"{share:.2f}" + (f" [{interval[0]:.2f}, {interval[1]:.2f}]" if interval else "")


def duration(seconds: float) -> str:
    minutes, seconds = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}h {minutes:02d}m" if hours else f"{minutes}m {seconds:02d}s" if minutes else f"{seconds}s"


def gigabytes(size: int | None) -> str:
    return "-" if size is None else f"{size / 2**30:.2f} GiB"

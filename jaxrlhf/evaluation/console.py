"""An evaluation of one language model as text for the console."""

from collections.abc import Mapping, Sequence
from typing import Any

from jaxrlhf.evaluation.text_layout import WIDTH, one_line, text_table

Result = dict[str, Any]
SHOWN_GROUPS = 30
_FLAGS = ("_truncated", "_unanswered", "_spread")  # endings of what is recorded beside a component


def table(result: Result, width: int = WIDTH) -> str:
    """Every prompt with its completions, best score first, then statistics, components of the reward, and the
    statistics of each category and file."""
    lines = []
    for prompt in result["prompts"]:
        lines += ["", one_line(prompt["prompt"], width)]
        if prompt.get("reference") is not None:
            measured = f"  BLEU {prompt['sentence_bleu']:.3f}, ROUGE-L {prompt['rouge_l']:.3f}"
            lines.append(f"  {'REFERENCE':<16}  {one_line(prompt['reference'], width - 20 - len(measured))}{measured}")
        for completion in prompt["completions"]:
            score = completion.get("score")
            head = f"{completion.get('rank', ''):<16}" if score is None else f"{completion['rank']:<6} {score:>9.3f}"
            lines.append(f"  {head}  {one_line(completion['text'], width - 20)}")
    stats = result["statistics"]
    lines += ["", f"{amounts(stats)} of {result['model']}"]
    lines += statistics_lines(stats)
    if parts := component_rows(stats, result["weights"]):
        lines += ["", "parts of the reward:", *text_table(parts, width)]
    for column, groups in result["groups"].items():
        lines += ["", f"by {column}:", *text_table(group_rows(groups, column), width), *_omitted(groups)]
    return "\n".join(lines).lstrip("\n")


def statistics_lines(stats: Mapping[str, Any]) -> list[str]:
    """The statistics, a line per subject. "+-" precedes the standard error over prompts."""
    low, high = stats["finished_interval_95"]
    lines = {}
    if "mean" in stats:
        lines["score"] = f"{with_error(stats)}, std {stats['std']:.4f}, min {stats['min']:.4f}, max {stats['max']:.4f}"
        lines["per prompt"] = (
            f"best minus worst score {stats['spread_within_prompt']:.4f}, best score {stats['best_of_n_mean']:.4f} "
            "(means over prompts)"
        )
    if stats.get("unscored"):
        lines["unscored"] = f"{stats['unscored']:.4f} of the completions, which have no part in the scores"
    if passes := stats.get("passes"):
        rates = ", ".join(f"pass@{k} {with_error(rate)}" for k, rate in passes["pass_at"].items())
        lines["passing"] = f"{rates} (score at least {passes['threshold']:g})"
    if references := stats.get("references"):
        bleu = references["corpus_bleu"]
        corpus = "" if bleu is None else f", corpus BLEU {bleu:.2f} of 100"
        lines["BLEU"] = f"{with_error(references['sentence_bleu'])}{corpus}"
        lines["ROUGE-L"] = f"{with_error(references['rouge_l'])}, {references['prompts']} prompts with a reference"
    lines["length"] = (
        f"{with_error({'mean': stats['tokens_mean'], 'standard_error': stats['tokens_standard_error']}, 1)} tokens, "
        f"finished {stats['finished']:.2f} [{low:.2f}, {high:.2f}]"
    )
    if "turns" in stats:
        lines["turns"] = f"{with_error(stats['turns'], 2)} of the model in each episode"
    lines["diversity"] = (
        f"distinct-1 {stats['distinct_1']:.2f}, distinct-2 {stats['distinct_2']:.2f}, "
        f"identical completions {stats['identical_completions']:.2f}"
    )
    lines["repetition"] = with_error(stats["repetition"])
    return [f"{name:<13} {text}" for name, text in lines.items()]


def component_rows(stats: Mapping[str, Any], weights: Mapping[str, float]) -> list[list[str]]:
    """A table of the reward's components: weight, mean before the weight, mean after it, share left unscored; below the
    terms of the sum what is recorded beside them, if it occurred. Empty without a reward."""
    components = stats["components"]
    rows = []
    for name, weight in weights.items():
        if name not in components:
            rows.append([name, f"{weight:g}", "scored nothing", "", ""])
            continue
        unanswered = components.get(f"{name}_unanswered", {"mean": 0.0})["mean"]
        weighted = weight * components[name]["mean"]
        rows.append([name, f"{weight:g}", with_error(components[name]), f"{weighted:.4f}", f"{unanswered:.2f}"])
    for name, value in components.items():
        shown = name not in weights and not name.endswith("_unanswered")
        if shown and (value["mean"] or not name.endswith(_FLAGS)):
            rows.append([name, "", with_error(value), "", ""])
    return [["reward", "weight", "mean", "weighted", "unscored"], *rows] if rows else []


def group_rows(groups: Mapping[str, Mapping[str, Any]], column: str) -> list[list[str]]:
    """A row for each of the first SHOWN_GROUPS groups: prompts, score and its components, length, finished, and BLEU,
    ROUGE-L and pass@k where there are such."""
    shown = dict(list(groups.items())[:SHOWN_GROUPS])
    names = [
        name
        for name in dict.fromkeys(name for stats in shown.values() for name in stats["components"])
        if not name.endswith(_FLAGS)
    ]
    names = names if len(names) > 1 else []  # a single component is the score, up to its weight
    references = any("references" in stats for stats in shown.values())
    scored = any("unscored" in stats for stats in shown.values())
    tries = list(next((s["passes"]["pass_at"] for s in shown.values() if "passes" in s), {}))
    head = [column, "prompts", *["score"] * scored, *names, *(f"pass@{k}" for k in tries)]
    rows = [[*head, "tokens", "finished", *["BLEU", "ROUGE-L"] * references]]
    for name, stats in shown.items():
        low, high = stats["finished_interval_95"]
        length = {"mean": stats["tokens_mean"], "standard_error": stats["tokens_standard_error"]}
        rows.append(
            [
                one_line(name, 28),
                str(stats["prompts"]),
                *[_cell(stats if "mean" in stats else None)] * scored,
                *(_cell(stats["components"].get(component)) for component in names),
                *(_cell(stats["passes"]["pass_at"].get(k)) for k in tries),
                with_error(length, 1),
                f"{stats['finished']:.2f} [{low:.2f}, {high:.2f}]",
                *[_cell(stats.get("references", {}).get(key)) for key in ("sentence_bleu", "rouge_l")] * references,
            ]
        )
    return rows


def amounts(stats: Mapping[str, Any]) -> str:
    """Numbers of prompts and completions that were evaluated."""
    counts = ((stats["prompts"], "prompt"), (stats["completions"], "completion"))
    return ", ".join(f"{count} {name}{'s' if count != 1 else ''}" for count, name in counts)


def with_error(value: Mapping[str, Any], digits: int = 4) -> str:
    """Mean +- standard error; the error of a single prompt cannot be estimated."""
    error = value["standard_error"]
    return f"{value['mean']:.{digits}f} +- {'?' if error is None else f'{error:.{digits}f}'}"


def _cell(value: Mapping[str, Any] | None) -> str:
    return "-" if value is None else with_error(value, 3)


def _omitted(groups: Sequence[Any] | Mapping[str, Any]) -> list[str]:
    return [f"and {len(groups) - SHOWN_GROUPS} more"] if len(groups) > SHOWN_GROUPS else []

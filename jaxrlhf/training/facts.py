"""Facts of a run for the model card of its export: command, options, metrics, samples and limits."""

import dataclasses
import json
import shlex
from pathlib import Path
from typing import Any

from jaxrlhf import metrics, runs
from jaxrlhf.config import DPOConfig, GRPOConfig, PPOConfig, RewardConfig
from jaxrlhf.config import text as config_text
from jaxrlhf.config.base import default_of
from jaxrlhf.errors import DataError, counted
from jaxrlhf.files import read_json
from jaxrlhf.metrics.statistics import wilson
from jaxrlhf.training.setup import RunConfig

SHOWN = 3  # prompts whose completions are in the card
LONGEST = 1000  # characters of a prompt or completion in the card
BASELINE = "validation.json"
"""File of a PPO or GRPO run: metrics and scores of the initial policy on held-out prompts."""
EVALUATION = "evaluation.json"
"""File of a reward model's run: its last evaluation."""
_LEFT_OUT = ("perf/", "alarm/", "val/", "policy/", "critic/")


@dataclasses.dataclass(frozen=True)
class Origin:
    """Origin of the parameters of an export: a run's directory, and the hash of the rows that it trains on (empty
    if it is not known)."""

    run: Path
    data: str = ""


def of_export(config: RunConfig, step: int, results: dict[str, float], origin: Origin | None) -> dict[str, Any]:
    """Facts for `weights.export` of the state after `step` steps, whose record is `results`. Without an `origin`, of
    parameters that no run has trained, they are those of the config."""
    facts: dict[str, Any] = {
        "method": config.method,
        "base_model": config.model.path,
        "dataset": config.data.name,
        "data_sha256": origin.data if origin else "",
        "steps": step,
        "config": changes(config),
        "metrics": {k: v for k, v in results.items() if not k.startswith(_LEFT_OUT)},
        "notes": _limits(config, results),
    }
    if origin:
        validation, evaluation = _json(origin.run / BASELINE), _json(origin.run / EVALUATION)
        facts |= {
            "command": _command(_json(origin.run / "run.json")),
            "before": validation.get("metrics", {}),
            "samples": before_and_after(origin.run / "samples.jsonl", step),
            "notes": [*_held_out(validation, evaluation), *facts["notes"]],
        }
    return facts


def changes(config: Any, default: Any = None) -> dict[str, Any]:
    """The options of a config, or of a section, that are not at their defaults: those of its class, or of `default`."""
    found = {}
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        # A component of the reward has no default as a whole: it needs a source.
        usual = getattr(default, field.name) if default is not None else default_of(type(config), field.name)
        if value == usual:
            continue
        nested = dataclasses.is_dataclass(value) and type(value) is type(usual)
        found[field.name] = changes(value, usual) if nested else _plain(value, field)
    return found


def before_and_after(path: Path, step: int) -> list[dict[str, str]]:
    """Completions of a samples.jsonl, as {label: text}: of prompts that were completed at several steps up to `step`,
    the first and the last completion; if there are none, completions of the last step with any."""
    rows = [row for row in metrics.read_records(path) if row.get("step", 0) <= step] if path.is_file() else []
    by_prompt: dict[str, list[dict[str, Any]]] = {}
    for row in rows:
        by_prompt.setdefault(json.dumps([row.get("prompt"), row.get("held_out")]), []).append(row)
    pairs = [(group[0], group[-1]) for group in by_prompt.values() if group[0]["step"] < group[-1]["step"]]
    if pairs:
        return [{**_text(first, "prompt"), **_completion(first), **_completion(last)} for first, last in pairs[:SHOWN]]
    last_step = max((row["step"] for row in rows), default=0)
    found = [row for row in rows if row["step"] == last_step][:SHOWN]
    return [{**_text(row, "prompt"), **_completion(row)} for row in found]


def _completion(row: dict[str, Any]) -> dict[str, str]:
    when = f"after step {row['step']}" if row["step"] else "before training"
    score = row.get("score")
    scored = f", score {score:.4g}" if isinstance(score, int | float) else ""
    return _text(row, "completion", f"completion {when}{scored}")


def _text(row: dict[str, Any], key: str, label: str = "") -> dict[str, str]:
    value = row.get(key, "")
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    cut = f" ... ({len(text) - LONGEST} more characters)" if len(text) > LONGEST else ""
    return {label or key: text[:LONGEST] + cut}


def _command(record: dict[str, Any]) -> str:
    """The command of the last start of a run, as it can be typed."""
    return shlex.join(runs.typed_command((record.get("starts") or [{}])[-1]))


def _held_out(validation: dict[str, Any], evaluation: dict[str, Any]) -> list[str]:
    """On how many held-out prompts or rows the metrics are measured, and the interval of an accuracy."""
    lines = []
    if scores := validation.get("scores"):
        lines.append(f"The metrics eval/... are of {len(scores)} held-out prompts.")
    count, share = evaluation.get("pairs"), evaluation.get("accuracy")
    if isinstance(count, int) and isinstance(share, float) and count:
        low, high = wilson(round(share * count), count)
        lines.append(
            f"On {counted(count, 'held-out pair')} the accuracy is {share:.3g} (95 % Wilson interval {low:.3g} to "
            f"{high:.3g}); preferring by length alone would reach {evaluation.get('length_accuracy', 0):.3g}."
        )
    return lines


def _limits(config: RunConfig, results: dict[str, float]) -> list[str]:
    """Limits of the numbers of the card."""
    match config:
        case RewardConfig():
            return [
                "The score orders responses to the same prompt. It has no unit, and scores of different prompts or "
                "reward models need not be comparable.",
                "It was learnt from the data above and can be wrong elsewhere, above all on text that was written to "
                "raise it.",
            ]
        case PPOConfig() | GRPOConfig():
            parts = [part.model or part.function for part in config.reward.parts()]
            trained_on = f"the score of {' and '.join(filter(None, parts))}" if any(parts) else "the score"
            kl = results.get("objective/kl")
            origin = f"the teacher {config.reference.path}" if config.reference.path else "its initial state"
            distance = f" At the end it was {kl:.3g} nats per response from {origin} (KL)." if kl else ""
            return [
                f"Training raised {trained_on}, which is not proof of better answers: a policy also finds what its "
                "reward overrates. Read samples, and measure with another judge (jaxrlhf compare)." + distance,
                *_LANGUAGE_MODEL,
            ]
        case DPOConfig():
            return ["Preferences in the data also carry their length and style.", *_LANGUAGE_MODEL]
        case _:
            return [*_LANGUAGE_MODEL]


_LANGUAGE_MODEL = (
    "Completions can be wrong, harmful or copied from data; nothing was measured but the results above.",
)


def _plain(value: Any, field: "dataclasses.Field[Any]") -> Any:
    """The value of a field as it is written down, dataclasses inside as mappings of what is not at its default."""
    if dataclasses.is_dataclass(value):
        return changes(value)
    if isinstance(value, list | tuple):
        return [_plain(item, field) for item in value]
    return config_text.kept(value, field.type, field.name)


def _json(path: Path) -> dict[str, Any]:
    """The content of a JSON file of the run; empty if there is none, or none that can be read."""
    try:
        return read_json(path)
    except DataError:
        return {}

"""Model card: README.md with the front matter that the hub indexes and the facts of the run.

Facts come from users and files (prompts, paths, config values) and are escaped: none can end a code block, open an
HTML tag or add a line to the front matter.
"""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf.config import yaml12
from jaxrlhf.errors import visible
from jaxrlhf.metrics.keys import definition
from jaxrlhf.models import ModelConfig
from jaxrlhf.weights import families, sums

TAG = "jaxrlhf"
LONGEST = 4_000_000  # bytes of a card that is read
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_RLHF = ("reward", "dpo", "ppo", "grpo")
_METHODS = {
    "merge": "merging adapters",
    "sft": "supervised fine-tuning",
    "reward": "preferences, labels or scores of responses",
    "dpo": "preferences (DPO and its relatives)",
    "ppo": "PPO",
    "grpo": "group-relative policy optimisation",
    "distill": "distillation from a teacher",
}
_MAIN = (
    *("loss", "entropy", "accuracy", "margin", "absolute_error", "rewards/accuracies", "rewards/margins", "kl"),
    *("objective/scores", "objective/kl", "objective/entropy_per_token", "tokens/mean_length", "tokens/finished"),
    "episode",
)
"""Metrics of training that the card shows."""
_LICENSE = ("license", "license_name", "license_link")
_NOT_IN_TABLE = (
    *("method", "command", "config", "metrics", "before", "samples", "notes", "original"),
    *_LICENSE,
)


def card(model: ModelConfig, config: Mapping[str, Any], facts: Mapping[str, Any], adapters: bool = False) -> str:
    """The text of README.md for `model` with this config.json, or for `adapters` of it.

    Facts: `method`, `base_model`, `dataset`; `license`, `license_name`, `license_link`, and `original`, the hub id of
    the model that `base_model` was trained from, all as given by `inherited`; `command`; `config`, a mapping;
    `metrics`, {name: number}, and `before`, the same before training; `samples`, each a mapping of labels to text;
    `notes`, a list of sentences. Any other fact becomes a row of the first table.
    """
    method = facts.get("method")
    kind = "language model" if model.head == "lm" else "reward model"
    title = f"{model.family} {kind}{' (adapters)' if adapters else ''}"
    training = f" after training by {_METHODS.get(str(method), _escape(method))}" if method else ""
    parts = [
        f"---\n{yaml.safe_dump(_front(model, facts, kind, adapters), sort_keys=False, allow_unicode=True)}---",
        f"# A {title} trained with jaxrlhf",
        f"This {title} was written by jaxrlhf{training}. {sums.SENTENCE}",
    ]
    rows = {key: value for key, value in facts.items() if key not in _NOT_IN_TABLE and value not in (None, "")}
    if rows:
        parts.append(_table(("fact", "value"), rows.items()))
    if facts.get("command"):
        parts += ["## Command", _code_block("sh", visible(str(facts["command"])))]
    if facts.get("metrics"):
        parts += ["## Results", _results(facts["metrics"], facts.get("before") or {})]
    if facts.get("samples"):
        parts += ["## Samples", *(part for sample in facts["samples"] for part in _sample(sample))]
    notes = [*_notes(model, config), *map(str, facts.get("notes") or ())]
    if notes:
        parts += ["## Notes and limits", "\n".join(f"- {_escape(note)}" for note in notes)]
    if facts.get("config"):
        plain = json.loads(json.dumps(facts["config"], default=str))  # tuples as lists, paths as text
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        parts += ["## Configuration", "Options that are not at their defaults:"]
        parts.append(_code_block("yaml", visible(text.rstrip("\n"))))
    return "\n\n".join(parts) + "\n"


def inherited(readme: Path) -> dict[str, str]:
    """Facts that the card of a base model gives to models trained from it: its license, and if it is an export of
    jaxrlhf, the `original` hub id. Empty if there is no card, or none that can be read."""
    try:
        if not readme.is_file() or readme.stat().st_size > LONGEST:
            return {}
        text = readme.read_text(encoding="utf-8", errors="replace")
        front = yaml12.load(text.split("\n---", 1)[0].removeprefix("---")) if text.startswith("---\n") else {}
    except (OSError, yaml.YAMLError):
        return {}
    front = front if isinstance(front, dict) else {}
    facts = {key: value for key in _LICENSE if isinstance(value := front.get(key), str)}
    if is_ours(text) and isinstance(original := front.get("base_model"), str):
        facts["original"] = original
    return facts


def is_ours(text: str) -> bool:
    """Return True if the text of a README.md is a card written by `card`."""
    front = text.split("\n---\n", 1)[0]
    return front.startswith("---\n") and f"\n- {TAG}\n" in front + "\n"


def _front(model: ModelConfig, facts: Mapping[str, Any], kind: str, adapters: bool) -> dict[str, Any]:
    """The front matter. A name is given as a hub id only if it can be one and is no folder here."""
    front: dict[str, Any] = {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation" if model.head == "lm" else "text-classification",
    }
    base = next((hub_id for name in ("base_model", "original") if (hub_id := _hub_id(facts.get(name)))), None)
    if base:
        front["base_model"] = base
    if datasets := [*filter(None, map(_hub_id, str(facts.get("dataset") or "").split(", ")))]:
        front["datasets"] = datasets
    front |= {key: _one_line(facts[key]) for key in _LICENSE if facts.get(key)}
    method = facts.get("method")
    methods = [_one_line(method), *(["rlhf"] if method in _RLHF else [])] if method else []
    return front | {"tags": [TAG, *methods, kind.replace(" ", "-")]}


def _results(metrics: Mapping[str, Any], before: Mapping[str, Any]) -> str:
    """A table of the main metrics with their definitions, those of held-out data first; the others are counted."""
    names = sorted(filter(_is_main, metrics), key=lambda name: (not name.startswith("eval/"), name)) or sorted(metrics)
    known = [name for name in names if name in before]
    head = ("metric", "value", *(("before training",) if known else ()), "meaning")
    rows = []
    for name in names:
        then = (before.get(name, ""),) if known else ()
        rows.append((name, metrics[name], *then, definition(name)))
    left_out = len(metrics) - len(names)
    others = f"\n\nThe other {left_out} metrics are in metrics.jsonl of the run." if left_out else ""
    return _table(head, rows, digits=6) + others


def _is_main(name: str) -> bool:
    """The metric is measured on held-out data, one of `_MAIN`, the mean of a component of the score, or not ours."""
    component = re.fullmatch(r"rewards/.+(?<!_unanswered)(?<!_truncated)(?<!_spread)/mean", name)
    return name.startswith("eval/") or name in _MAIN or component is not None or not definition(name)


def _sample(sample: Mapping[str, Any]) -> list[str]:
    """A prompt and its completions, in code blocks."""
    blocks = []
    for label, text in sample.items():
        blocks += [f"{_escape(label)}:", _code_block("text", visible(str(text)))]
    return blocks


def _notes(model: ModelConfig, config: Mapping[str, Any]) -> list[str]:
    """Notes on how a reward model is read."""
    if model.head == "lm":
        return []
    score = "single output" if model.num_labels == 1 else "probability of label 1"
    notes = [f"The score is the {score} at the last real token."]
    if model.head == "mlp":
        notes.append(
            "The head is an MLP, for which transformers has no class: AutoModelForSequenceClassification would load "
            "the decoder with a random head. jaxrlhf.load reads the whole model."
        )
    elif not families.FAMILIES[model.family].has_classifier:
        notes.append(
            f"transformers has no class for reward models of this family ({model.family}); jaxrlhf.load reads it."
        )
    pad, eos = config.get("pad_token_id"), config.get("eos_token_id")
    if pad is None:
        notes.append("There is no padding token: transformers scores one text at a time.")
    elif pad in (eos if isinstance(eos, list) else [eos]):
        notes.append(
            "The padding token is also an end token: transformers then reads the score before the end token, "
            "jaxrlhf reads it at the end token."
        )
    return notes


def _hub_id(name: Any) -> str | None:
    """`name` as a hub id, without the scheme hf://; None if it is a path or no id."""
    if not isinstance(name, str):
        return None
    hub_id = name.removeprefix("hf://")
    return hub_id if _HUB_ID.fullmatch(hub_id) and (hub_id != name or not Path(name).exists()) else None


def _one_line(value: Any) -> str:
    return visible(" ".join(str(value).split()))


def _escape(value: Any) -> str:
    """Plain text on one line of Markdown."""
    return re.sub(r"([\\`*\[\]<>#|!&~$])", r"\\\1", _one_line(value))


def _table(head: Sequence[Any], rows: Iterable[Sequence[Any]], digits: int | None = None) -> str:
    """A Markdown table; floats are rounded to `digits` significant digits if given."""
    cells = [head, ["---"] * len(head)]
    cells += [[f"{v:.{digits}g}" if digits and isinstance(v, float) else v for v in row] for row in rows]
    return "\n".join(f"| {' | '.join(_escape(cell) for cell in row)} |" for row in cells)


def _code_block(language: str, text: str) -> str:
    """A fenced block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"

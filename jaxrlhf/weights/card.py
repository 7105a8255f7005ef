"""Model card: README.md with the front matter that the hub indexes and the facts of the run.

Facts come from users and files (prompts, paths, config values) and are escaped: none can end a code block, open an
HTML tag or add a line to the front matter.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf.models import ModelConfig

TAG = "jaxrlhf"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_METHODS = {
    "merge": "merging adapters",
    "sft": "supervised fine-tuning",
    "reward": "preferences, labels or scores of responses",
    "dpo": "preferences (DPO and its relatives)",
    "ppo": "PPO",
    "grpo": "group-relative policy optimisation",
}
_NOT_IN_TABLE = ("method", "license", "command", "config", "metrics", "notes")


def card(model: ModelConfig, config: Mapping[str, Any], facts: Mapping[str, Any], adapters: bool = False) -> str:
    """The text of README.md for `model` with this config.json, or for `adapters` of it.

    Facts: `method`, `base_model`, `dataset`, `license`, `command`, `config` (a mapping), `metrics` ({name: number}),
    `notes` (a list of sentences); any other fact becomes a row of the first table.
    """
    method = facts.get("method")
    kind = "language model" if model.head == "lm" else "reward model"
    front: dict[str, Any] = {
        "library_name": "peft" if adapters else "transformers",
        "pipeline_tag": "text-generation" if model.head == "lm" else "text-classification",
    }
    if _is_hub_id(facts.get("base_model")):
        front["base_model"] = facts["base_model"]
    if _is_hub_id(facts.get("dataset")):
        front["datasets"] = [facts["dataset"]]
    if facts.get("license"):
        front["license"] = _one_line(facts["license"])
    front["tags"] = [TAG, *([_one_line(method)] if method else []), kind.replace(" ", "-")]
    title = f"{model.family} {kind}{' (adapters)' if adapters else ''}"
    training = f" after training by {_METHODS.get(str(method), _escape(method))}" if method else ""
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---",
        f"# A {title} trained with jaxrlhf",
        f"This {title} was written by jaxrlhf{training}.",
    ]
    rows = {key: value for key, value in facts.items() if key not in _NOT_IN_TABLE and value not in (None, "")}
    if rows:
        parts.append(_table(("fact", "value"), rows))
    if facts.get("command"):
        parts += ["## Command", _code_block("sh", str(facts["command"]))]
    if facts.get("metrics"):
        parts += ["## Results", _table(("metric", "value"), facts["metrics"], digits=6)]
    notes = [*_notes(model, config), *map(str, facts.get("notes") or ())]
    if notes:
        parts += ["## Notes", "\n".join(f"- {_escape(note)}" for note in notes)]
    if facts.get("config"):
        plain = json.loads(json.dumps(facts["config"], default=str))  # tuples as lists, paths as text
        text = yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)
        parts += ["## Configuration", _code_block("yaml", text.rstrip("\n"))]
    return "\n\n".join(parts) + "\n"


def is_ours(text: str) -> bool:
    """Return True if the text of a README.md is a card written by `card`."""
    front = text.split("\n---\n", 1)[0]
    return front.startswith("---\n") and f"\n- {TAG}\n" in front + "\n"


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
    pad, eos = config.get("pad_token_id"), config.get("eos_token_id")
    if pad is None:
        notes.append("There is no padding token: transformers scores one text at a time.")
    elif pad in (eos if isinstance(eos, list) else [eos]):
        notes.append(
            "The padding token is also an end token: transformers then reads the score before the end token, "
            "jaxrlhf reads it at the end token."
        )
    return notes


def _is_hub_id(name: Any) -> bool:
    return isinstance(name, str) and bool(_HUB_ID.fullmatch(name)) and not Path(name).exists()


def _one_line(value: Any) -> str:
    return " ".join(str(value).split())


def _escape(value: Any) -> str:
    """Plain text on one line of Markdown."""
    return re.sub(r"([\\`*\[\]<>#|!&~$])", r"\\\1", _one_line(value))


def _table(head: tuple[str, str], rows: Mapping[Any, Any], digits: int | None = None) -> str:
    """A Markdown table; floats are rounded to `digits` significant digits if given."""
    cells = [
        head,
        ("---", "---"),
        *((k, f"{v:.{digits}g}" if digits and isinstance(v, float) else v) for k, v in rows.items()),
    ]
    return "\n".join(f"| {_escape(left)} | {_escape(right)} |" for left, right in cells)


def _code_block(language: str, text: str) -> str:
    """A fenced block whose fence is longer than any run of backticks in the text."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"

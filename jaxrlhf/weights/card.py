"""The model card: README.md with the front matter that the hub indexes and the facts of the run.

Prompts, paths and config values come from people and files, so everything is escaped: no fact can end a code block,
open an HTML tag or add a line to the front matter.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from jaxrlhf.models import ModelConfig

TAG = "jaxrlhf"
_ON_THE_HUB = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9_][\w.-]*")
_METHODS = {
    "merge": "merging adapters",
    "sft": "supervised fine-tuning",
    "reward": "preferences, labels or scores of responses",
    "dpo": "preferences (DPO and its relatives)",
    "ppo": "PPO",
    "grpo": "group-relative policy optimisation",
}


def card(model: ModelConfig, config: Mapping[str, Any], facts: Mapping[str, Any], adapters: bool = False) -> str:
    """The text of README.md for `model` with this config.json; or of `adapters` that make it of another model.

    Facts: `method`, `base_model`, `dataset`, `license`, `command`, `config` (a mapping), `metrics` ({name: number}),
    `notes` (a list of sentences); any other becomes a row of the first table.
    """
    method, base = facts.get("method"), facts.get("base_model")
    front: dict[str, Any] = {"library_name": "peft" if adapters else "transformers"}
    front["pipeline_tag"] = "text-generation" if model.head == "lm" else "text-classification"
    if _hub_id(base):
        front["base_model"] = base
    if _hub_id(facts.get("dataset")):
        front["datasets"] = [facts["dataset"]]
    if facts.get("license"):
        front["license"] = _line(facts["license"])
    front["tags"] = [
        TAG,
        *([_line(method)] if method else []),
        "language-model" if model.head == "lm" else "reward-model",
    ]
    kind = "language model" if model.head == "lm" else "reward model"
    kind += " (adapters)" if adapters else ""
    by = f" by {_METHODS.get(str(method), _text(method))}" if method else ""
    parts = [
        "---\n" + yaml.safe_dump(front, sort_keys=False, allow_unicode=True) + "---",
        f"# A {model.family} {kind} trained with jaxrlhf",
        f"This {model.family} {kind} was written by jaxrlhf{f' after training{by}' if by else ''}.",
    ]
    known = ("method", "license", "command", "config", "metrics", "notes")
    rows = [(key, value) for key, value in facts.items() if key not in known and value not in (None, "")]
    if rows:
        parts.append(_table(("fact", "value"), rows))
    if facts.get("command"):
        parts += ["## Command", _block("sh", str(facts["command"]))]
    if facts.get("metrics"):
        parts += ["## Results", _table(("metric", "value"), [(k, _number(v)) for k, v in facts["metrics"].items()])]
    notes = [*_notes(model, config), *map(str, facts.get("notes") or ())]
    if notes:
        parts += ["## Notes", "\n".join(f"- {_text(note)}" for note in notes)]
    if facts.get("config"):
        plain = yaml.safe_dump(_plain(facts["config"]), sort_keys=False, allow_unicode=True)
        parts += ["## Configuration", _block("yaml", plain.rstrip("\n"))]
    return "\n\n".join(parts) + "\n"


def is_ours(text: str) -> bool:
    """Whether a README.md is a card of ours."""
    front = text.split("\n---\n", 1)[0]
    return front.startswith("---\n") and f"\n- {TAG}\n" in front + "\n"


def _notes(model: ModelConfig, config: Mapping[str, Any]) -> list[str]:
    notes = []
    if model.head != "lm":
        notes.append(
            "The score is the single output at the last real token."
            if model.num_labels == 1
            else "The score is the probability of label 1 at the last real token."
        )
    if model.head == "mlp":
        notes.append(
            "The head is an MLP, for which transformers has no class: AutoModelForSequenceClassification would load "
            "the decoder and leave a random head on it. jaxrlhf.load reads the whole model."
        )
    pad, eos = config.get("pad_token_id"), config.get("eos_token_id")
    if model.head != "lm" and pad is None:
        notes.append("No padding token is known: transformers scores one text at a time.")
    if model.head != "lm" and pad is not None and pad in (eos if isinstance(eos, list) else [eos]):
        notes.append(
            "The padding token is also an end token: transformers then reads the score before the end token, "
            "jaxrlhf reads it at the end token."
        )
    return notes


def _hub_id(name: Any) -> bool:
    return isinstance(name, str) and bool(_ON_THE_HUB.fullmatch(name)) and not Path(name).exists()


def _line(value: Any) -> str:
    return " ".join(str(value).split())


def _text(value: Any) -> str:
    """Plain text on one line of Markdown."""
    return re.sub(r"([\\`*\[\]<>#|!&~$])", r"\\\1", _line(value))


def _number(value: Any) -> str:
    return f"{value:.6g}" if isinstance(value, float) else str(value)


def _table(head: tuple[str, str], rows: list[tuple[Any, Any]]) -> str:
    return "\n".join(f"| {_text(a)} | {_text(b)} |" for a, b in [head, ("---", "---"), *rows])


def _block(language: str, text: str) -> str:
    """A fenced block whose fence is longer than any run of backticks inside it."""
    fence = "`" * max(3, 1 + max((len(run) for run in re.findall(r"`+", text)), default=0))
    return f"{fence}{language}\n{text}\n{fence}"


def _plain(value: Any) -> Any:
    """Mappings, lists, numbers and text; anything else as its text."""
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value if value is None or isinstance(value, bool | int | float | str) else str(value)

"""Recognise the format of a file from its column names.

The prompt is `prompt` (used as it is, text or messages), `question` (with `system`), `instruction` (with `input`), or
is written by `data.template`. The completion is `completion`, `answer` or `output`; a preference pair is `chosen` or
`accepted` with `rejected`; a ranking is the list `responses`. `text`, `messages` and `conversations` hold prompt and
completion together. Columns that fit more than one format are refused. labels.py reads `label`, `score` and `ranks`.
"""

import string
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import Literal

from jaxrlhf.config import Data
from jaxrlhf.errors import DataError

Task = Literal["sft", "pairs", "prompts", "labels", "scores", "rankings"]
Kind = Literal["text", "messages", "prompt_completion", "prompt", "preference", "ranking"]
PromptStyle = Literal["as_is", "question", "template", "common_prefix", "none"]
TASK_NAMES = {
    "sft": "supervised fine-tuning",
    "pairs": "preference pairs",
    "prompts": "prompts",
    "labels": "labelled responses",
    "scores": "scored responses",
    "rankings": "ranked responses",
}
_COMPLETIONS = "prompt, completion | [system, ]question, answer | instruction[, input], output | messages | text"
KNOWN_FORMATS = {
    "sft": "text | messages | conversations | prompt, completion | instruction[, input], output | "
    "[system, ]question, answer | any format of preference pairs (trains on chosen)",
    "pairs": "prompt, chosen, rejected | chosen, rejected (common beginning) | accepted for chosen | "
    "[system, ]question, chosen, rejected | instruction[, input], chosen, rejected",
    "prompts": "prompt | [system, ]question | instruction[, input] | messages | conversations | chosen, rejected; "
    "the reward function gets all other columns",
    "labels": f"label with {_COMPLETIONS}",
    "scores": f"score with {_COMPLETIONS}",
    "rankings": "prompt, responses (a list, best first, or in any order with ranks) | [system, ]question, responses | "
    "instruction[, input], responses | responses (conversations, or text with a common beginning)",
}
FORMAT_COLUMNS = frozenset(
    {"text", "messages", "conversations", "prompt", "question", "instruction", "completion"}
    | {"chosen", "accepted", "rejected"}
)
"""Columns that decide the format: adding one of these to a file can change how it is read, or make it ambiguous."""
_LABEL_COLUMN = {"labels": "label", "scores": "score"}
_COMPLETION_COLUMN = {"prompt": "completion", "question": "answer", "instruction": "output"}


@dataclass(frozen=True)
class Format:
    """Columns that a task reads; "" or () for those the format does not have.

    prompt: columns the prompt is built from.       completion: the completion, the chosen one, or all of a ranking.
    rejected: the rejected completion of a pair.    label: the label or score.
    style: `as_is` uses the prompt unchanged; `question` makes it a user turn if the tokenizer has a chat template;
    `template` fills `data.template`; `common_prefix` takes the common beginning of the completions, or of a single
    conversation everything before its last assistant turn; `none` has no prompt.
    """

    kind: Kind
    prompt: tuple[str, ...] = ()
    completion: str = ""
    rejected: str = ""
    style: PromptStyle = "none"
    label: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column this format reads."""
        return (*self.prompt, *filter(None, (self.completion, self.rejected, self.label)))

    def __str__(self) -> str:
        if self.style == "common_prefix" and self.kind != "messages":
            return f"{self.kind} from {', '.join(self.columns)} (the prompt is the common beginning)"
        columns = self.prompt if self.kind == "prompt" and self.prompt else self.columns
        return f"{self.kind.replace('_', ' + ')} from {', '.join(columns)}"


def recognise(columns: Collection[str], task: Task, config: Data, source: str) -> Format:
    """Return the one format in which `task` can read `columns`. Raises DataError if there is none or more than one."""
    formats = _candidates(columns, task, config, source)
    if len(formats) > 1 and config.columns:  # a column named in data.columns decides
        formats = [f for f in formats if set(f.columns) & set(config.columns)] or formats
    if len(formats) == 1:
        return formats[0]
    found = f"data {source}: columns {', '.join(columns)}"
    if formats:
        options = "; or ".join(", ".join(f.columns) for f in formats)
        raise DataError(
            f"{found} can be read as {TASK_NAMES[task]} in more than one way: {options}. Name the columns to use in "
            "data.columns, {known name: name in the file}"
        )
    if any(name.endswith("input_ids") for name in columns):
        raise DataError(f"{found} hold token ids; give the text instead, which is tokenised here")
    raise DataError(
        f"{found} are not a known format for {TASK_NAMES[task]}. Known: {KNOWN_FORMATS[task]}. Rename columns with "
        "data.columns, {known name: name in the file}"
        + ("" if task in ("pairs", "rankings") else ", or write the prompt with data.template")
    )


def answer_column(columns: Collection[str], config: Data, source: str) -> str:
    """The column with the completion that belongs to the prompts, or "" if there is none. Raises DataError."""
    prompt = recognise(columns, "prompts", config, source).prompt
    return next(iter(_completion_columns(columns, prompt, config)), "")


def _candidates(columns: Collection[str], task: Task, config: Data, source: str) -> list[Format]:
    prompts = _prompt_columns(columns, config, source)
    prompts_or_prefix: list[tuple[tuple[str, ...], PromptStyle]] = prompts or [((), "common_prefix")]
    pairs = [
        Format("preference", names, chosen, "rejected", style)
        for chosen in ("chosen", "accepted")
        if {chosen, "rejected"} <= {*columns}
        for names, style in prompts_or_prefix
    ]
    conversations = [Format("messages", completion=name) for name in ("messages", "conversations") if name in columns]
    if task == "pairs":
        return pairs
    if task == "rankings":
        rankings = [Format("ranking", names, "responses", style=style) for names, style in prompts_or_prefix]
        return rankings if "responses" in columns else []
    if task == "prompts":
        # a conversation in one of these columns shows that a plain prompt is its user turn
        conversation = next((name for name in ("chosen", "messages", "completion") if name in columns), "")
        plain = [
            Format("prompt", names, conversation if style == "as_is" else "", style=style) for names, style in prompts
        ]
        return plain or [replace(f, kind="prompt") for f in (*conversations, *pairs)]
    completions = [
        Format("prompt_completion", names, completion, style=style)
        for names, style in prompts
        for completion in _completion_columns(columns, names, config)
    ]
    text = [Format("text", completion="text")] if "text" in columns else []
    if task == "sft":
        return (completions if config.template else [*text, *conversations, *completions]) or pairs
    if _LABEL_COLUMN[task] not in columns:
        return []
    conversations = [replace(f, style="common_prefix") for f in conversations]
    formats = completions if config.template else [*text, *conversations, *completions]
    return [replace(f, label=_LABEL_COLUMN[task]) for f in formats]


def _prompt_columns(columns: Collection[str], config: Data, source: str) -> list[tuple[tuple[str, ...], PromptStyle]]:
    if config.template:
        return [(_template_columns(config.template, columns, source), "template")]
    prompts: list[tuple[tuple[str, ...], PromptStyle]] = [(("prompt",), "as_is")] if "prompt" in columns else []
    if "question" in columns:
        prompts.append((("system", "question") if "system" in columns else ("question",), "question"))
    if "instruction" in columns:
        prompts.append((("instruction", "input") if "input" in columns else ("instruction",), "question"))
    return prompts


def _completion_columns(columns: Collection[str], prompt: tuple[str, ...], config: Data) -> list[str]:
    """Columns that hold a completion of a prompt built from the columns `prompt`."""
    keys = _COMPLETION_COLUMN if config.template else [name for name in prompt if name in _COMPLETION_COLUMN]
    names = [_COMPLETION_COLUMN[key] for key in keys]
    return [name for name in names if name in columns and name not in prompt]


def _template_columns(template: str, columns: Collection[str], source: str) -> tuple[str, ...]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"data.template: {error}; write a literal brace twice, {{{{ or }}}}") from error
    for field in fields:
        if field not in columns:
            raise DataError(f"data.template: no column {field!r} in {source}; the columns are {', '.join(columns)}")
    if not fields:
        raise DataError("data.template has no {column} in it, so every prompt would be the same")
    return tuple(dict.fromkeys(fields))

"""Recognise how a data set stores prompts and responses: the layout of layouts.py that fits its columns."""

import itertools
import math
import re
import shlex
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import yaml

from jaxrlhf.config import Data
from jaxrlhf.data import labels
from jaxrlhf.data.dialogues import common_beginning, has_answer_mark
from jaxrlhf.data.labels import Judge
from jaxrlhf.data.layouts import LAYOUTS, Layout, Style
from jaxrlhf.data.messages import parse, roles
from jaxrlhf.data.sources import Rows
from jaxrlhf.errors import DataError

Task = Literal["sft", "pairs", "prompts", "labels", "scores", "rankings"]
TASK_NAMES: dict[Task, str] = {
    "sft": "supervised fine-tuning",
    "pairs": "preference pairs",
    "prompts": "prompts",
    "labels": "labelled responses",
    "scores": "scored responses",
    "rankings": "ranked responses",
}
_NEEDED: dict[Task, tuple[str, ...]] = {
    "sft": ("prompt", "completion"),
    "pairs": ("prompt", "chosen", "rejected"),
    "prompts": ("prompt",),
    "labels": ("prompt", "completion", "label"),
    "scores": ("prompt", "completion", "score"),
    "rankings": ("prompt", "responses"),
}
"""Columns of the simplest layout of each task."""
_SYNONYMS = {
    "prompt": "question instruction query problem input post context title text human user source request q",
    "completion": "response answer output solution target reply assistant summary text a",
    "chosen": "good better best preferred positive pos winner win accepted",
    "rejected": "bad worse worst dispreferred negative neg loser lose",
    "label": "good correct accepted",
    "score": "rating reward points grade",
    "responses": "answers completions outputs",
}
"""Names that columns often have instead, to guess what they hold."""
SHOWN = 5  # layouts in an error message
_LABELS = ("label", "kto_tag", "tag")
FORMAT_COLUMNS = frozenset(
    {name for layout in LAYOUTS for name in re.findall(r"\w+", layout.responses)} - {"answer", "output", "solution"}
    | {"prompt", "question", "instruction", "problem", "query", "system", "system_prompt"}
    | {*_LABELS, "tie", "tied"}
)
"""Columns that decide the format: adding one of these to a file can change how it is read, or make it ambiguous."""


@dataclass(frozen=True)
class Format:
    """A layout with the columns of a data set that a task reads; "" or () for those it does not have.

    prompt: columns the prompt is built from.    system, tools: columns of the system prompt and of tools.
    responses: the completion, both of a pair, or the list of all.    verdict, judge: what scores them.
    matched: the columns by which the layout was recognised.
    """

    layout: Layout
    task: Task
    prompt: tuple[str, ...]
    responses: tuple[str, ...]
    verdict: tuple[str, ...]
    style: Style
    judge: Judge
    matched: frozenset[str]
    system: str = ""
    tools: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column this format reads."""
        from_prompt = self.task == "prompts" and self.prompt
        read = self.prompt if from_prompt else (*self.prompt, *self.responses, *self.verdict)
        return tuple(dict.fromkeys((*filter(None, (self.system, self.tools)), *read)))

    def unused(self, rows: Rows) -> list[str]:
        """The columns that are not read, unless they are empty; none for prompts: reward functions get all columns."""
        names = [name for name in rows.columns if name not in self.columns and rows.first(name) is not None]
        return [] if self.task == "prompts" else names

    def reward_columns(self, rows: Rows) -> Rows:
        """`rows` as reward functions get them: with a ground truth as `answer`, without rated `completions`."""
        hidden = {*self.responses} & {"completions"}
        changed = [{name: value for name, value in row.items() if name not in hidden} for row in rows.rows]
        for column, key in self.layout.keys.items():
            if column not in self.columns and column not in self.responses:
                values = [parse(row.get(column)) for row in rows.rows]
                answers = [value.get(key) if isinstance(value, dict) else None for value in values]
                if any(answer is not None for answer in answers):
                    changed = [{"answer": answer, **row} for answer, row in zip(answers, changed, strict=True)]
        return replace(rows, rows=changed)

    def __str__(self) -> str:
        name = "data.template" if self.style == "template" else self.layout.name
        if self.task == "prompts" and self.prompt and self.layout.responses:
            name = "prompts by data.template" if self.style == "template" else "prompts"
        return f"{name} from {', '.join(self.columns)}"


def recognise(rows: Rows, task: Task, config: Data) -> Format:
    """Return the one format in which `task` can read `rows`. Raises DataError if there is none or more than one."""
    formats = _candidates(rows, task, config)
    if config.template:  # layouts that differ in the prompt alone
        formats = list({(f.columns, f.verdict): f for f in formats}.values())
    formats = [f for f in formats if not f.layout.weak] or formats
    formats = [f for f in formats if not any(f.matched < other.matched for other in formats)]
    if len(formats) > 1 and config.columns:  # a column named in data.columns decides
        formats = [f for f in formats if {*f.columns} & {*config.columns}] or formats
    found = f"data {rows.source}: columns {', '.join(rows.columns)}"
    if len(formats) > 1:
        options = "; or ".join(", ".join(f.columns) for f in formats)
        others = {name for f in formats[1:] for name in f.columns}
        own = next((name for name in formats[0].columns if name not in others), "")
        hint = f", e.g. {_columns_flag({own: own})} for the first" if own else ", {known name: name in the file}"
        raise DataError(
            f"{found} can be read as {TASK_NAMES[task]} in more than one way: {options}.\n"
            f"Name the columns to use in data.columns{hint}"
        )
    if not formats and any(name.endswith("input_ids") for name in rows.columns):
        raise DataError(f"{found} hold token ids; give the text instead, which is tokenised here")
    if not formats:
        raise DataError(
            f"{found}: not a known format for {TASK_NAMES[task]}.\nKnown: {known_formats(task)}\n"
            + _advice(rows.columns, task)
        )
    _refuse_lost_prompt(formats[0], rows, config)
    return formats[0]


def can_read(rows: Rows, task: Task, config: Data) -> bool:
    """Test if `rows` have a format for `task`, or more than one."""
    return bool(_candidates(rows, task, config))


def known_formats(task: Task) -> str:
    """The required columns of the first layouts that serve `task`; for `sft` and `prompts` not those with several
    responses."""
    specs: list[str] = []
    for layout in LAYOUTS:
        if _serves(layout, task) and (layout.single or task not in ("sft", "prompts")):
            score = "scores" if layout.judge is labels.by_rank else "" if layout.many else layout.verdict or "score"
            verdict = {"sft": "", "labels": "label|kto_tag|tag", "scores": score}
            words = f"{layout.prompt} {'' if task == 'prompts' and layout.prompt else layout.responses}"
            words = f"{words} {verdict.get(task, layout.verdict)}".split()
            specs.append(", ".join(word for word in words if not word.startswith("[")))
    if task == "prompts":  # more columns than a prompt are not required
        specs = [spec for spec in specs if not any({*other.split(", ")} < {*spec.split(", ")} for other in specs)]
    others = {"sft": " | preference pairs (trains on the better)", "prompts": " | those of any other method"}
    shown = list(dict.fromkeys(specs))
    more = " | ..." if len(shown) > SHOWN else ""
    return " | ".join(shown[:SHOWN]).replace(">", "|") + more + others.get(task, "") + " (all: docs/formats.md)"


def _advice(columns: Sequence[str], task: Task) -> str:
    """Advice about columns that are not known: the option to type, with the names of `columns` if they can be
    guessed."""
    needed = _NEEDED[task]
    if task == "sft" and len(columns) == 1 and columns[0] != "prompt":
        needed = ("text",)
    template = "" if task in ("pairs", "rankings") else ", or write the prompt with --data.template"
    if len(columns) < len(needed):
        return f"Needed are {len(needed)} columns, e.g. {', '.join(needed)}; add those that are missing" + template
    guess: dict[str, str] = {}
    for known in needed:
        left = [name for name in columns if name not in guess.values()]
        words = {known, *_SYNONYMS.get(known, "").split()}
        like = [name for name in left if name.lower() in words]
        like += [name for name in left if words & {*re.split(r"[\W_]+", name.lower())}]
        if like:
            guess[known] = like[0]
    missing, left = [k for k in needed if k not in guess], [name for name in columns if name not in guess.values()]
    if len(missing) == len(left) == 1:
        guess[missing[0]] = left[0]
    if len(guess) < len(needed):
        return f"Rename columns with {_columns_flag(dict.fromkeys(needed, 'NAME'))}, NAME as in the file{template}"
    renamed = {known: guess[known] for known in needed if known != guess[known]}
    return f"Rename columns, perhaps with {_columns_flag(renamed)}{template}"


def _columns_flag(columns: Mapping[str, str]) -> str:
    """The option that renames columns, to type in a shell."""
    value = yaml.safe_dump(dict(columns), default_flow_style=True, sort_keys=False, allow_unicode=True, width=math.inf)
    return f"--data.columns {shlex.quote(value.strip())}"


def answer_column(rows: Rows, config: Data) -> str:
    """The column with the completion that belongs to the prompts, or "" if there is none. Raises DataError."""
    found = recognise(rows, "prompts", config)
    if found.layout.keys and not found.responses:
        return "answer"
    return found.responses[0] if found.layout.single and found.responses and found.style != "whole" else ""


def _serves(layout: Layout, task: Task) -> bool:
    match task:
        case "sft":
            return bool(layout.responses)
        case "pairs":
            return not layout.single
        case "rankings":
            return layout.many
        case "labels":
            return layout.single and bool(layout.responses)
        case "scores":
            return bool(layout.responses) and (
                layout.single or layout.judge in (labels.by_score, labels.by_rating, labels.by_rank)
            )
    return layout.name != "text"


def _candidates(rows: Rows, task: Task, config: Data) -> list[Format]:
    """The formats that can be meant. Whole conversations are preferred to other columns with the same content, pairs
    to lists; `sft` and `prompts` take those with several responses only if there are no others."""
    formats = [found for layout in LAYOUTS if _serves(layout, task) for found in _bind(layout, rows, task, config)]
    if task == "prompts":
        whole = [f for f in formats if _is_conversation(f) or _is_whole(f, rows)]
        if whole and not roles(rows.first("prompt")):  # a text beside conversations repeats their prompt
            return whole[:1]
        formats = sorted((f for f in formats if f not in whole), key=lambda f: bool(f.responses))
        return list({(f.prompt, f.style): f for f in formats}.values())  # one of those that write the same prompt
    pairs = [f for f in formats if len(f.responses) == 2]
    lists = [f for f in formats if f.layout.many]
    single = [f for f in formats if f.layout.single and not (pairs and _is_prompt(f, rows))]
    if any(map(_is_conversation, single)):
        single = [f for f in single if f.style == "whole"]
    if task in ("sft", "pairs"):
        return single or pairs or lists
    return [*single, *pairs, *lists]


def _is_conversation(found: Format) -> bool:
    return found.style == "whole" and found.responses != ("text",)


def _bind(layout: Layout, rows: Rows, task: Task, config: Data) -> list[Format]:
    """The ways in which `layout` reads the columns of `rows` for `task`."""
    responses = _choices(layout.responses, rows) or (
        [()] if task == "prompts" and layout.single and layout.prompt else []
    )
    if not config.template:
        prompts = _choices(layout.prompt, rows)
    elif layout.style == "whole":
        return []
    else:
        prompts = [_template_columns(config.template, rows)]
        responses = [found for found in responses if not {*found} & {*prompts[0]}]
    formats = []
    for prompt, response, verdict in itertools.product(prompts, responses, _choices(layout.verdict, rows)):
        matched = frozenset((*prompt, *response, *verdict))
        found = Format(layout, task, prompt, response, verdict, layout.style, layout.judge, matched)
        if config.template:
            formats.append(replace(found, style="template"))
        elif not (layout.judge is labels.unless_tied and prompt and _is_whole(found, rows)):
            formats.append(_with_system_and_tools(found, rows))
    return [judged for found in formats if (judged := _judged(found, rows, config))]


def _judged(found: Format, rows: Rows, config: Data) -> Format | None:
    """`found` with the columns that score its responses for its task, or None if it lacks them."""
    names, task = rows.columns, found.task
    if found.layout.single and task in ("sft", "labels"):
        label = next((name for name in _LABELS if name in names and _is_label(name, rows, found)), "")
        if label:
            return replace(found, verdict=(label,), judge=labels.by_label)
        return None if task == "labels" else replace(found, verdict=(), judge=labels.in_order)
    if found.layout.single and task == "scores":
        score = config.score or found.layout.verdict or "score"
        if config.score and score not in names:
            raise DataError(f"data.score: no column {score!r} in {rows.source}; the columns are {', '.join(names)}")
        return replace(found, verdict=(score,), judge=labels.by_score) if score in names else None
    if task == "scores" and found.judge is labels.by_rank:
        return replace(found, verdict=("scores",)) if "scores" in names else None
    return found


def _is_label(name: str, rows: Rows, found: Format) -> bool:
    """The column says which responses are good; `sft` leaves out the others. Beside plain text, numbers are taken for
    the classes of a classification task, and `tag` is often something else."""
    if found.task == "labels" and name != "tag":
        return True
    return labels.are_labels(rows.values(name), numbers=found.responses != ("text",) or name != "label")


def _with_system_and_tools(found: Format, rows: Rows) -> Format:
    """`found` with the columns of system prompt and tools, and its style for the values in its columns."""
    if found.style in ("post", "request") or (found.layout.many and not found.prompt):
        return found
    conversation = bool(roles(rows.first((found.prompt or found.responses)[0])))
    if not (conversation or found.prompt):
        return found
    system = next((name for name in ("system", "system_prompt") if isinstance(rows.first(name), str)), "")
    tools = next((name for name in ("tools", "functions") if parse(rows.first(name))), "")
    if (system or tools) and found.style == "as_is" and not conversation:
        found = replace(found, style="question")
    return replace(found, system=system, tools=tools)


def _is_whole(found: Format, rows: Rows) -> bool:
    """The two responses are whole conversations, which contain the prompt, whatever other columns there are."""
    return len(found.responses) == 2 and roles(rows.first(found.responses[0]))[:1] not in ([], ["assistant"], ["tool"])


def _is_prompt(found: Format, rows: Rows) -> bool:
    """The conversation does not end with an answer: beside chosen and rejected it is their prompt."""
    return found.style == "whole" and roles(rows.first(found.responses[0]))[-1:] not in ([], ["assistant"])


def _is_meant(name: str, rows: Rows) -> bool:
    """The values of an optional column are of the kind that its name promises."""
    if name in ("input", "context"):
        return isinstance(rows.first(name), str)
    if name in ("history", "ranks", "rank", "scores"):
        return isinstance(parse(rows.first(name)), list)
    return name != "label" or labels.are_ties(rows.values(name))


def _choices(spec: str, rows: Rows) -> list[tuple[str, ...]]:
    """The ways to choose columns of `rows` for the columns of a layout."""
    options: list[list[tuple[str, ...]]] = []
    for word in spec.split():
        optional = word.startswith("[")
        names = [name for name in re.split(r"[|>]", word.strip("[]")) if name in rows.columns]
        found = [(name,) for name in names if not optional or _is_meant(name, rows)]
        options.append(found[: 1 if ">" in word else None] or ([()] if optional else []))
    return [tuple(itertools.chain(*choice)) for choice in itertools.product(*options)]


def _template_columns(template: str, rows: Rows) -> tuple[str, ...]:
    try:
        fields = [field for _, field, _, _ in string.Formatter().parse(template) if field is not None]
    except ValueError as error:
        raise DataError(f"data.template: {error}; write a literal brace twice, {{{{ or }}}}") from error
    for column in fields:
        if column not in rows.columns:
            raise DataError(
                f"data.template: no column {column!r} in {rows.source}; the columns are {', '.join(rows.columns)}. "
                "Correct the template, or leave it out for prompts that are complete (data.template '')"
            )
    if not fields:
        raise DataError("data.template has no {column} in it, so every prompt would be the same")
    try:
        template.format(**dict.fromkeys(fields, ""))
    except (ValueError, LookupError) as error:
        raise DataError(f"data.template: {error}; columns are text, so write {{column}} or {{column:>10}}") from error
    return tuple(dict.fromkeys(fields))


def _refuse_lost_prompt(found: Format, rows: Rows, config: Data) -> None:
    """Refuse texts without a prompt beside an unused column of text that may hold it."""
    if found.style != "common_beginning" or {*found.responses} & {*config.columns}:
        return
    texts: list[Any] = [[row.get(name) for name in found.responses] for row in rows.rows[:100]]
    if found.layout.many:
        texts = [parse(values[0]) for values in texts]
    pairs = [values for values in texts if isinstance(values, list) and all(isinstance(v, str) for v in values)]
    if not pairs or any(has_answer_mark(common_beginning(values)) for values in pairs):
        return
    others = [name for name in rows.columns if name not in found.columns and _may_be_prompt(rows.first(name))]
    if others:
        names = ", ".join(found.responses)
        raise DataError(
            f"data {rows.source}: {names} have no dialogue as their common beginning, and the prompt may be in "
            f"{' or '.join(others)}; name its column in data.columns, {{prompt: {others[0]}}}, or if there is no "
            f"prompt, {{{found.responses[0]}: {found.responses[0]}}}"
        )


def _may_be_prompt(value: Any) -> bool:
    value = parse(value)
    return " " in value.strip() if isinstance(value, str) else isinstance(value, list | dict) and bool(value)

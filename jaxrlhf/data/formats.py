"""What the columns of a file mean: recognise a format by its columns and normalise each row to one `Example`.

A task (supervised fine-tuning, pairs, prompts, labels, scores, rankings) asks for a prompt, an answer and perhaps worse
answers. Prompts come from `prompt` (a finished prompt, or messages), `question` (with `system`) or `instruction` (with
`input`), or are written by `data.template`. Answers come from `completion`, `answer`, `output`; pairs from `chosen` or
`accepted` with `rejected`; rankings from the list `responses`; `text`, `messages` and `conversations` hold everything.
What a `label`, `score` or `ranks` says is read by judgements.py. More than one possible reading is refused.
"""

import re
import string
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from typing import Any, Literal

from jaxrlhf.config import Data
from jaxrlhf.data.labels import ranked, shown
from jaxrlhf.data.sources import Row, Rows
from jaxrlhf.errors import DataError

Message = dict[str, Any]
Content = str | list[Message]
Task = Literal["sft", "pairs", "prompts", "labels", "scores", "rankings"]
Kind = Literal["text", "messages", "prompt_completion", "prompt", "preference", "ranking"]
TASKS = {
    "sft": "supervised fine-tuning",
    "pairs": "preference pairs",
    "prompts": "prompts",
    "labels": "labelled responses",
    "scores": "scored responses",
    "rankings": "ranked responses",
}
_RESPONSES = "prompt, completion | [system, ]question, answer | instruction[, input], output | messages | text"
KNOWN = {
    "sft": "text | messages | conversations | prompt, completion | instruction[, input], output | "
    "[system, ]question, answer | the preference formats (chosen is learnt)",
    "pairs": "prompt, chosen, rejected | chosen, rejected (common beginning) | accepted for chosen | "
    "[system, ]question, chosen, rejected | instruction[, input], chosen, rejected",
    "prompts": "prompt | [system, ]question | instruction[, input] | messages | conversations | chosen, rejected; "
    "other columns go to the reward function",
    "labels": f"label with {_RESPONSES}",
    "scores": f"score with {_RESPONSES}",
    "rankings": "prompt, responses (a list, best first, or in any order with ranks) | [system, ]question, responses | "
    "instruction[, input], responses | responses (conversations, or text with a common beginning)",
}
_JUDGED = {"labels": "label", "scores": "score"}
_ANSWER = {"prompt": "completion", "question": "answer", "instruction": "output"}
DECIDING = frozenset(
    ("text", "messages", "conversations", "prompt", "question", "instruction", "completion", "chosen", "accepted",
     "rejected")
)  # fmt: skip
"""Columns that a format is recognised by: beside some of these, others are read otherwise or not at all."""
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
_ROLES |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool"}
_TURN = re.compile(r"(?:^|\n)\s*(?:#+ *)?(?:Assistant|AI|Bot|Chatbot|Agent|Model|Response|Answer|Output|TL;DR) *:")


@dataclass(frozen=True)
class Reading:
    """How a task reads rows: which columns are the prompt, the answer (of a ranking, all of them), the rejected answer
    and what is said of an answer ("" where there is none).

    style: `finished` prompts are used as they stand; a `question` becomes a user turn where the tokenizer has a chat
    format; a `template` prompt is written from columns; `implicit` prompts are what all answers begin with, or of one
    conversation all before its last assistant turn.
    """

    kind: Kind
    prompt: tuple[str, ...] = ()
    answer: str = ""
    rejected: str = ""
    style: Literal["finished", "question", "template", "implicit", "whole"] = "whole"
    verdict: str = ""

    @property
    def columns(self) -> tuple[str, ...]:
        """Every column this reading uses."""
        return (*self.prompt, *filter(None, (self.answer, self.rejected, self.verdict)))

    def __str__(self) -> str:
        if self.style == "implicit" and self.kind != "messages":
            return f"{self.kind} from {', '.join(self.columns)} (the prompt is what all answers begin with)"
        used = self.prompt if self.kind == "prompt" and self.prompt else self.columns
        return f"{self.kind.replace('_', ' + ')} from {', '.join(used)}"


@dataclass(frozen=True)
class Example:
    """One row, normalised: text or messages. `prompt` is None where text or messages are learnt as a whole; `worse` are
    the answers of a ranking after the second, best first."""

    prompt: Content | None
    answer: Content | None = None
    rejected: Content | None = None
    worse: tuple[Content, ...] = ()

    @property
    def answers(self) -> list[Content]:
        """All that there are, best first."""
        return [answer for answer in (self.answer, self.rejected, *self.worse) if answer is not None]


def recognise(columns: Collection[str], task: Task, config: Data, source: str) -> Reading:
    """The one reading of `columns` for `task`; DataError when there is none, or more than one."""
    prompts = _prompts(columns, config, source)
    pairs = [
        Reading("preference", names, good, "rejected", style)
        for good in ("chosen", "accepted")
        if {good, "rejected"} <= {*columns}
        for names, style in prompts or [((), "implicit")]
    ]
    whole = [Reading("messages", answer=name) for name in ("messages", "conversations") if name in columns]
    if task == "pairs":
        levels = [pairs]
    elif task == "rankings":
        asked = prompts or [((), "implicit")]
        levels = [[Reading("ranking", names, "responses", style=style) for names, style in asked]]
        levels = levels if "responses" in columns else []
    elif task == "prompts":
        # beside a plain prompt there may be conversations that show it to be a user turn
        beside = next((name for name in ("chosen", "messages", "completion") if name in columns), "")
        asked = [Reading("prompt", names, beside if style == "finished" else "", "", style) for names, style in prompts]
        levels = [asked, [replace(reading, kind="prompt") for reading in (*whole, *pairs)]]
    else:
        answered = [
            Reading("prompt_completion", names, answer, style=style)
            for names, style in prompts
            for answer in (_ANSWER.values() if style == "template" else [_ANSWER[_key(names)]])
            if answer in columns and answer not in names
        ]
        text = [Reading("text", answer="text")] if "text" in columns else []
        if task == "sft":
            levels = [answered, pairs] if config.template else [[*text, *whole, *answered], pairs]
        else:
            single = [replace(reading, style="implicit") for reading in whole]
            single = answered if config.template else [*text, *single, *answered]
            levels = [[replace(reading, verdict=_JUDGED[task]) for reading in single]]
            levels = levels if _JUDGED[task] in columns else []
    readings = next((level for level in levels if level), [])
    if len(readings) > 1 and config.columns:  # a column the person has named decides
        readings = [r for r in readings if set(r.columns) & set(config.columns)] or readings
    if len(readings) == 1:
        return readings[0]
    have = f"data {source}: columns {', '.join(columns)}"
    if readings:
        options = "; or ".join(", ".join(r.columns) for r in readings)
        raise DataError(
            f"{have} can be read as {TASKS[task]} in more than one way: {options}. Name the columns to use in "
            "data.columns, {our name: column}"
        )
    if any(name.endswith("input_ids") for name in columns):
        raise DataError(f"{have} hold token ids; give the text they were made from, the tokenizer here makes its own")
    raise DataError(
        f"{have} are not a format known for {TASKS[task]}. Known: {KNOWN[task]}. Rename columns with data.columns, "
        "{our name: column}" + ("" if task in ("pairs", "rankings") else ", or write the prompt with data.template")
    )


def answer_column(columns: Collection[str], config: Data, source: str) -> str:
    """The column with an answer to the prompts that `recognise` finds: what belongs to their format, "" if nothing."""
    names = recognise(columns, "prompts", config, source).prompt
    expected = _ANSWER.values() if config.template else [_ANSWER[name] for name in names if name in _ANSWER]
    return next((name for name in expected if name in columns and name not in names), "")


def _key(names: tuple[str, ...]) -> str:
    return next(name for name in names if name in _ANSWER)


def _prompts(columns: Collection[str], config: Data, source: str) -> list[tuple[tuple[str, ...], Any]]:
    if config.template:
        return [(_fields(config.template, columns, source), "template")]
    found: list[tuple[tuple[str, ...], Any]] = [(("prompt",), "finished")] if "prompt" in columns else []
    if "question" in columns:
        found.append((("system", "question") if "system" in columns else ("question",), "question"))
    if "instruction" in columns:
        found.append((("instruction", "input") if "input" in columns else ("instruction",), "question"))
    return found


def _fields(template: str, columns: Collection[str], source: str) -> tuple[str, ...]:
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise DataError(f"data.template: {error}; a brace that is meant as such is written twice") from error
    fields = tuple(dict.fromkeys(field for _, field, _, _ in parts if field is not None))
    for field in fields:
        if field not in columns:
            raise DataError(f"data.template: no column {field!r} in {source}; there are {', '.join(columns)}")
    if not fields:
        raise DataError("data.template has no {column} in it, so every prompt would be the same")
    return fields


def normalise(rows: Rows, i: int, reading: Reading, config: Data, chat: bool, guard: Callable[[str], str]) -> Example:
    """Row `i` as an `Example`. Text comes back guarded (`Tokenizer.guard`), so that only the words of the template can
    be control tokens. `chat`: the tokenizer has a chat format. DataError names the row and the column."""
    row, where = rows.rows[i], f"data {rows.places[i]}"
    names = [name for name in (reading.answer, reading.rejected) if name]
    if reading.kind == "prompt" and reading.prompt:  # an answer is of interest only where it shows the prompt's turns
        names = [name for name in names if isinstance(row.get(name), list)]
    if reading.kind == "ranking":
        values = [_read(value, "responses", where) for value in ranked(row, where)]
    else:
        values = [_content(row, name, where) for name in names]
    if reading.kind in ("text", "messages"):
        value = values[0]
        if isinstance(value, str) != (reading.kind == "text"):
            raise DataError(f"{where}: column {reading.answer!r} should hold {reading.kind}")
        if reading.style == "whole":
            return Example(None, guard(value) if isinstance(value, str) else value)
    prompt: Content | None = None
    if reading.kind == "prompt" and reading.style == "whole":
        turns = _turns(values[0], "user")
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return Example(turns)
    whole = any(isinstance(value, list) and value and value[0]["role"] != "assistant" for value in values)
    if whole and reading.style != "template":
        prompt, values = _common_messages(values, where)  # whole conversations, whatever else the row holds
    elif reading.style == "implicit":
        if all(isinstance(value, str) for value in values):
            prompt, *texts = _common_text([str(value) for value in values])
            return _example(guard(prompt), map(guard, texts))
        prompt = []
    elif reading.style == "template":
        fields = {name: guard(_scalar(row, name, where)) for name in reading.prompt}
        prompt = config.template.format(**fields)
    elif reading.style == "question":
        return _question(row, reading, values, config, chat, guard, where)
    else:
        prompt = _content(row, reading.prompt[0], where)
        prompt = guard(prompt) if isinstance(prompt, str) else prompt
    if reading.style != "template" and any(isinstance(value, list) for value in [prompt, *values]):
        return _example(_turns(prompt, "user"), (_turns(value, "assistant") for value in values))
    return _example(prompt, (guard(config.completion_prefix + _said(value, where)) for value in values))


def _example(prompt: Content, answers: Iterable[Content]) -> Example:
    first, second, *worse = [*answers, None, None]
    return Example(prompt, first, second, tuple(answer for answer in worse if answer is not None))


def _question(
    row: Row, reading: Reading, values: list[Content], config: Data, chat: bool, guard: Callable[[str], str], where: str
) -> Example:
    """System, question, instruction and input: chat turns, or plain lines where there is no chat format."""
    optional = ("system", "input")
    texts = [str(_content(row, name, where, name in optional)) for name in reading.prompt]
    if chat:
        system = texts.pop(0) if reading.prompt[0] == "system" else ""
        turns = [{"role": "system", "content": system}] if system else []
        turns.append({"role": "user", "content": "\n".join(filter(None, texts))})
        return _example(turns, (_turns(value, "assistant") for value in values))
    prompt = "".join(f"{text}\n" for text in texts if text)
    return _example(guard(prompt), (guard(config.completion_prefix + _said(value, where)) for value in values))


def _turns(content: Content | None, role: str) -> list[Message]:
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _said(content: Content, where: str) -> str:
    """An answer as plain text, also where it is one assistant message."""
    if isinstance(content, list):
        if len(content) != 1 or content[0]["role"] != "assistant":
            raise DataError(f"{where}: beside a plain prompt the answer must be text or one assistant message")
        return content[0]["content"]
    return content


def _content(row: Row, column: str, where: str, optional: bool = False) -> Content:
    """Text or messages; null and missing count as "" where `optional`."""
    if optional and row.get(column) is None:
        return ""
    if column not in row:
        raise DataError(f"{where}: column {column!r} is missing")
    return _read(row[column], column, where, optional)


def _read(value: Any, column: str, where: str, text_only: bool = False) -> Content:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not text_only:
        return [_message(item, f"{where}: column {column!r}, message {n}") for n, item in enumerate(value, 1)]
    raise DataError(f"{where}: column {column!r} is {shown(value)}; text or a list of messages was expected")


def _scalar(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if isinstance(value, str) or (isinstance(value, int | float) and not isinstance(value, bool)):
        return str(value)
    raise DataError(f"{where}: column {column!r} is {shown(value)}; data.template needs text or a number")


def _message(item: Any, where: str) -> Message:
    """One message with `role` and text `content`; sharegpt's from/value and lists of text parts are translated."""
    if not isinstance(item, dict):
        raise DataError(f"{where}: is {shown(item)}; an object with role and content was expected")
    item = {key: value for key, value in item.items() if value is not None}
    if "from" in item and "value" in item:
        role = _ROLES.get(str(item["from"]))
        if role is None:
            raise DataError(f"{where}: unknown speaker {item['from']!r}; known are {', '.join(_ROLES)}")
        item = {"role": role, "content": item["value"]}
    role, content = item.get("role"), item.get("content", "")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not re.fullmatch(r"\w+", role):
        raise DataError(f"{where}: role is {shown(role)}; user, assistant, system or tool was expected")
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {shown(content)}; text was expected")
    return {**item, "role": role, "content": content}


def _common_messages(values: list[Content], where: str) -> tuple[list[Message], list[Content]]:
    """The messages two conversations begin with (of one: all before its last assistant turn), and what follows."""
    lists = [_turns(value, "assistant") for value in values]
    first = min(lists, key=len)
    shared = next((i for i, turn in enumerate(first) if any(turns[i] != turn for turns in lists)), len(first))
    while shared and (shared == len(first) or first[shared]["role"] != "assistant"):
        shared -= 1
    if not shared:
        raise DataError(f"{where}: the conversations do not begin with the same messages and end in an answer")
    return first[:shared], [turns[shared:] for turns in lists]


def _common_text(answers: list[str]) -> list[str]:
    """Prompt and the answers of dialogues given whole. The prompt ends with the last "Assistant:" (or the like) that
    all share; failing that, at the last space or line end of the common beginning."""
    first, last = min(answers, default=""), max(answers, default="")  # what these two share, all do
    differ = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    common = first[: next(differ, len(first))]
    turns = [match.end() for match in _TURN.finditer(common)]
    cut = turns[-1] if turns else max((match.start() for match in re.finditer(r"\s+", common)), default=0)
    return [common[:cut], *(text[cut:] for text in answers)]

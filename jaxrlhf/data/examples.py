"""Turn a row of any format into one `Example`: a prompt and its completions, as text or as messages."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from jaxrlhf.config import Data
from jaxrlhf.data.file_readers import Row
from jaxrlhf.data.formats import Format
from jaxrlhf.data.labels import describe, sort_by_rank
from jaxrlhf.data.sources import Rows
from jaxrlhf.errors import DataError

Message = dict[str, Any]
Content = str | list[Message]
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "model": "assistant"}
_ROLES |= {"chatgpt": "assistant", "bing": "assistant", "bard": "assistant", "system": "system", "tool": "tool"}
_ASSISTANT = re.compile(r"(?:^|\n)\s*(?:#+ *)?(?:Assistant|AI|Bot|Chatbot|Agent|Model|Response|Answer|Output|TL;DR) *:")


@dataclass(frozen=True)
class Example:
    """A prompt and its completions, best first: one, chosen and rejected, all of a ranking, or none for prompts.

    `prompt` is None for a text or conversation that is trained on as a whole. `tools` are the JSON schemas of the tools
    a conversation may call, for the chat template. A message with `train` false is not trained on.
    """

    prompt: Content | None
    completions: tuple[Content, ...] = ()
    tools: list[dict[str, Any]] | None = None


def to_example(
    rows: Rows, i: int, row_format: Format, config: Data, has_chat: bool, escape: Callable[[str], str]
) -> Example:
    """Convert row `i`. Raises DataError with the row and the column.

    has_chat: the tokenizer has a chat template. escape: applied to plain text (`Tokenizer.escape`), so that only the
    literal part of `data.template` can contain control tokens.
    """
    row, where = rows.rows[i], f"data {rows.locations[i]}"
    if row_format.kind == "ranking":
        completions = [_content(value, "responses", where) for value in sort_by_rank(row, where)]
    else:
        names = [name for name in (row_format.completion, row_format.rejected) if name]
        if row_format.kind == "prompt" and row_format.prompt:  # only conversations show its turns
            names = [name for name in names if isinstance(row.get(name), list)]
        completions = [_column(row, name, where) for name in names]
    if row_format.kind in ("text", "messages"):
        content = completions[0]
        if isinstance(content, str) != (row_format.kind == "text"):
            raise DataError(f"{where}: column {row_format.completion!r} should hold {row_format.kind}")
        if row_format.style == "none":
            return Example(None, (escape(content) if isinstance(content, str) else content,))
    if row_format.kind == "prompt" and row_format.style == "none":
        turns = _as_messages(completions[0], "user")
        while turns and turns[-1]["role"] == "assistant":
            turns = turns[:-1]
        return Example(turns)

    conversations = any(isinstance(value, list) and value and value[0]["role"] != "assistant" for value in completions)
    if conversations and row_format.style != "template":  # they include the prompt, whatever other columns hold
        return Example(*_split_conversations(completions, where))
    prompt: Content = []
    if row_format.style == "common_prefix":
        if all(isinstance(value, str) for value in completions):
            prefix, *rest = _split_texts([str(value) for value in completions])
            return Example(escape(prefix), tuple(map(escape, rest)))
    elif row_format.style == "template":
        prompt = config.template.format(**{name: escape(_scalar(row, name, where)) for name in row_format.prompt})
    elif row_format.style == "question":
        prompt = _question(row, row_format.prompt, where, has_chat)
        prompt = escape(prompt) if isinstance(prompt, str) else prompt
    else:
        prompt = _column(row, row_format.prompt[0], where)
        prompt = escape(prompt) if isinstance(prompt, str) else prompt
        if any(isinstance(value, list) for value in completions):
            prompt = _as_messages(prompt, "user")
    if isinstance(prompt, list):
        return Example(prompt, tuple(_as_messages(value, "assistant") for value in completions))
    prefix = config.completion_prefix
    return Example(prompt, tuple(escape(prefix + _plain_text(value, where)) for value in completions))


def _question(row: Row, columns: tuple[str, ...], where: str, has_chat: bool) -> Content:
    """System, question, instruction and input: chat messages, or one per line without a chat template."""
    texts = [str(_column(row, name, where, optional=name in ("system", "input"))) for name in columns]
    if not has_chat:
        return "".join(f"{text}\n" for text in texts if text)
    system = texts.pop(0) if columns[0] == "system" else ""
    messages = [{"role": "system", "content": system}] if system else []
    return [*messages, {"role": "user", "content": "\n".join(filter(None, texts))}]


def _as_messages(content: Content, role: str) -> list[Message]:
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _plain_text(content: Content, where: str) -> str:
    if isinstance(content, str):
        return content
    if len(content) != 1 or content[0]["role"] != "assistant":
        raise DataError(f"{where}: the completion of a plain text prompt must be text or one assistant message")
    return content[0]["content"]


def _column(row: Row, column: str, where: str, optional: bool = False) -> Content:
    """The text or messages of a column; `optional` columns hold text only, and null or missing reads as ""."""
    if optional and row.get(column) is None:
        return ""
    if column not in row:
        raise DataError(f"{where}: column {column!r} is missing")
    return _content(row[column], column, where, text_only=optional)


def _content(value: Any, column: str, where: str, text_only: bool = False) -> Content:
    if isinstance(value, str):
        return value
    if isinstance(value, list) and not text_only:
        return [_message(item, f"{where}: column {column!r}, message {n}") for n, item in enumerate(value, 1)]
    expected = "text" if text_only else "text or a list of messages"
    raise DataError(f"{where}: column {column!r} is {describe(value)}; expected {expected}")


def _scalar(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{where}: column {column!r} is {describe(value)}; data.template needs text or a number")


def _message(item: Any, where: str) -> Message:
    """Check that `item` has a `role` and text `content`; convert ShareGPT's from/value and lists of text parts."""
    if not isinstance(item, dict):
        raise DataError(f"{where}: is {describe(item)}; expected an object with role and content")
    item = {key: value for key, value in item.items() if value is not None}
    if "from" in item and "value" in item:
        role = _ROLES.get(str(item["from"]))
        if role is None:
            raise DataError(f"{where}: unknown speaker {item['from']!r}; known speakers are {', '.join(_ROLES)}")
        item = {"role": role, "content": item["value"]}
    role, content = item.get("role"), item.get("content", "")
    if isinstance(content, list) and all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in content):
        content = "".join(part["text"] for part in content)
    if not isinstance(role, str) or not re.fullmatch(r"\w+", role):
        raise DataError(f"{where}: role is {describe(role)}; expected user, assistant, system or tool")
    if not isinstance(content, str):
        raise DataError(f"{where}: content is {describe(content)}; expected text")
    return {**item, "role": role, "content": content}


def _split_conversations(contents: list[Content], where: str) -> tuple[list[Message], tuple[list[Message], ...]]:
    """Split conversations into their common prompt, which ends before an assistant turn, and their completions."""
    conversations = [_as_messages(content, "assistant") for content in contents]
    first = min(conversations, key=len)
    common = next((i for i, turn in enumerate(first) if any(c[i] != turn for c in conversations)), len(first))
    while common and (common == len(first) or first[common]["role"] != "assistant"):
        common -= 1
    if not common:
        raise DataError(f"{where}: the conversations have no common prompt that is followed by an assistant turn")
    return first[:common], tuple(conversation[common:] for conversation in conversations)


def _split_texts(texts: list[str]) -> list[str]:
    """Split whole dialogues: [prompt, completion of each]. The prompt ends after the last "Assistant:" (or similar) of
    their common beginning; without one, at its last whitespace."""
    first, last = min(texts, default=""), max(texts, default="")  # their common prefix is that of all texts
    differences = (i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b)
    common = first[: next(differences, len(first))]
    turns = [match.end() for match in _ASSISTANT.finditer(common)]
    end = turns[-1] if turns else max((match.start() for match in re.finditer(r"\s+", common)), default=0)
    return [common[:end], *(text[end:] for text in texts)]

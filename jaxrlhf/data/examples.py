"""Turn a row of any layout into examples: a prompt and its completions, as text or as messages."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from jaxrlhf.config import Data
from jaxrlhf.data.dialogues import split_conversations, split_texts
from jaxrlhf.data.file_readers import Row
from jaxrlhf.data.formats import Format
from jaxrlhf.data.labels import Evidence, Scores, describe
from jaxrlhf.data.messages import Message, is_conversation, parse, read_content, read_tools
from jaxrlhf.data.sources import Rows
from jaxrlhf.errors import DataError

Content = str | list[Message]


@dataclass(frozen=True)
class Example:
    """A prompt and its completions, best first: one, chosen and rejected, all of a ranking, or none for prompts.

    `prompt` is None for a text or conversation that is trained on as a whole. `tools` are the JSON schemas of the tools
    a conversation may call, for the chat template. A message with `train` false is not trained on. `scores` rate the
    completions: 1 or 0 for a label, the same number for both of a tied pair.
    """

    prompt: Content | None
    completions: tuple[Content, ...] = ()
    tools: list[dict[str, Any]] | None = None
    scores: tuple[float, ...] = ()


def to_examples(
    rows: Rows,
    i: int,
    found: Format,
    config: Data,
    has_chat: bool,
    escape: Callable[[str], str],
    notes: Counter[str],
) -> tuple[list[Example], str]:
    """Convert row `i`: its examples, or none and the reason. Several are made of a row with several scored responses.

    Raises DataError with the row and the column.

    has_chat: the tokenizer has a chat template. escape: applied to plain text (`Tokenizer.escape`), so that only the
    literal part of `data.template` can contain control tokens. notes: counts what is left out of rows.
    """
    row, where = rows.rows[i], f"data {rows.locations[i]}"
    stored = _responses(row, found, where)
    example = _read(row, stored, found, config, has_chat, escape, where)
    if found.system and _has_other_system(example, row.get(found.system)):
        notes[f"rows with another system prompt in their messages, used instead of column {found.system!r}"] += 1
    if found.tools:
        example = replace(example, tools=read_tools(row.get(found.tools), f"{where}: column {found.tools!r}"))
    if found.task == "prompts":
        return [replace(example, completions=())], ""
    if isinstance(example.prompt, list) and example.prompt and example.prompt[-1]["role"] == "assistant":
        notes["rows whose prompt ends with an assistant turn; the completion is a second one after it"] += 1
    cells = {name: row.get(name) for name in found.verdict}
    verdict = {name: None if cell == "" else parse(cell) for name, cell in cells.items()}  # "": null in CSV
    if found.task == "sft" and found.layout.single and None in verdict.values():
        verdict = dict.fromkeys(verdict, 1)  # without a label, nothing says that the response is bad
    scores = found.judge(Evidence(verdict, stored, config.score, where))
    return _select(example, scores, found, notes)


def _select(example: Example, scores: Scores, found: Format, notes: Counter[str]) -> tuple[list[Example], str]:
    """Examples of a task from all completions of a row and their scores."""
    completions = example.completions
    judged = [(score, content) for score, content in zip(scores, completions, strict=True) if score is not None]
    ranked = sorted(judged, key=lambda item: -item[0])
    if found.layout.single:
        if found.task == "sft" and ranked[0][0] == 0:
            return [], "it is labelled bad"
        return [replace(example, scores=(ranked[0][0],))], ""
    few = 1 if found.task in ("sft", "scores") else 2
    if len(completions) < few:
        return [], "fewer than two responses" if few == 2 else "no responses"
    if len(judged) < few:
        return [], "it is not judged"
    if found.task == "scores":
        return [replace(example, completions=(content,), scores=(score,)) for score, content in judged], ""
    if found.task == "pairs":
        best, worst = ranked[0], ranked[-1]
        ranked = [best, worst] if best[0] > worst[0] else [judged[0], judged[1]]
    if found.task == "rankings":
        kept = dict(reversed(ranked))  # the first of those with the same score
        if len(kept) < 2 <= len(ranked):
            return [], "all responses have the same score"
        if len(kept) < len(ranked):
            notes["responses left out of rankings, as another one has the same score"] += len(ranked) - len(kept)
        ranked = [(score, content) for score, content in sorted(kept.items(), reverse=True)]
    return [replace(example, completions=tuple(c for _, c in ranked), scores=tuple(s for s, _ in ranked))], ""


def _responses(row: Row, found: Format, where: str) -> list[Any]:
    """The responses as stored; of a prompt's only conversations, which show that it is a user turn."""
    if found.task == "prompts" and found.prompt:
        values = [row.get(name) for name in found.responses]
        return [] if found.layout.many else [v for v in values if isinstance(read_content(v, where), list)]
    for name in found.responses:
        if name not in row:
            raise DataError(f"{where}: column {name!r} is missing")
    if not found.layout.many:
        return [row[name] for name in found.responses]
    (name,) = found.responses
    stored = parse(row[name])
    if not isinstance(stored, list):
        raise DataError(f"{where}: column {name!r} is {describe(row[name])}; expected a list of responses")
    return stored


def _read(
    row: Row,
    stored: Sequence[Any],
    found: Format,
    config: Data,
    has_chat: bool,
    escape: Callable[[str], str],
    where: str,
) -> Example:
    """The prompt and all completions of a row, in their order."""
    name = found.responses[0] if found.layout.many else ""
    key = found.layout.keys.get(name, "")
    names = [name] * len(stored) if found.layout.many else found.responses
    contents = [
        _content(item.get(key) if key and isinstance(item, dict) else item, column, where)
        for item, column in zip(stored, names, strict=False)
    ]
    system = _text(row, found.system, where) if found.system else ""
    if found.style == "whole":
        return _whole(contents[0], system, found, escape, where)
    if found.style != "template" and any(map(is_conversation, contents)):  # they include the prompt
        conversations = [_with_system(_as_messages(content, "assistant"), system) for content in contents]
        return Example(*split_conversations(conversations, where))
    tools = None
    match found.style:
        case "common_beginning":
            texts = [content for content in contents if isinstance(content, str)]
            if len(texts) < len(contents):
                raise DataError(
                    f"{where}: {', '.join(found.responses)} have no messages before the assistant's answer; "
                    "name the column of the prompt in data.columns, {prompt: name in the file}"
                )
            prompt, *texts = split_texts(texts)
            return Example(escape(prompt), tuple(map(escape, texts)))
        case "template":
            values = {column: escape(_scalar(row, column, where)) for column in found.prompt}
            prompt: Content = config.template.format(**values)
        case "question":
            prompt = _question(row, found, system, has_chat, where)
        case "post":
            prompt = _post(row, found.prompt[0], where)
        case "request":
            prompt, tools = _request(row, found.prompt[0], where)
        case _:
            prompt = _column(row, found.prompt[0], where)
            if isinstance(prompt, list) or any(isinstance(content, list) for content in contents):
                prompt = _with_system(_as_messages(prompt, "user"), system)
    if isinstance(prompt, str) and found.style != "template":
        prompt = escape(prompt)
        if any(isinstance(content, list) for content in contents):
            prompt = _as_messages(prompt, "user")
    if isinstance(prompt, list):
        return Example(prompt, tuple(_as_messages(content, "assistant") for content in contents), tools)
    prefix = config.completion_prefix
    return Example(prompt, tuple(escape(prefix + _plain_text(content, where)) for content in contents))


def _whole(content: Content, system: str, found: Format, escape: Callable[[str], str], where: str) -> Example:
    """A text, or a conversation: as a whole, split before its last answer, or its prompt alone."""
    kind = "text" if found.layout.name == "text" else "messages"
    column = found.responses[0]
    if isinstance(content, str) != (kind == "text"):
        other = "messages" if kind == "text" else "text"
        raise DataError(
            f"{where}: column {column!r} should hold {kind}; if it is meant to hold {other}, say so in data.columns, "
            f"{{{other}: {column}}}"
        )
    if isinstance(content, str):
        return Example(None, (escape(content),))
    turns = _with_system(content, system)
    if found.task == "sft":
        return Example(None, (turns,))
    if found.task != "prompts":
        return Example(*split_conversations([turns], where))
    while turns and turns[-1]["role"] == "assistant":
        turns = turns[:-1]
    return Example(turns)


def _question(row: Row, found: Format, system: str, has_chat: bool, where: str) -> Content:
    """System prompt, history, question and further text: chat messages, or one per line without a chat template."""
    history = _history(row.get("history"), where) if "history" in found.prompt[1:] else []
    names = [name for name in found.prompt if name != "history" or name == found.prompt[0]]
    texts = [_text(row, name, where, found.layout.keys.get(name, ""), name != found.prompt[0]) for name in names]
    question = {"role": "user", "content": "\n".join(filter(None, texts))}
    messages = _with_system([*history, question], system)
    return messages if has_chat else "".join(f"{turn['content']}\n" for turn in messages if turn["content"])


def _history(value: Any, where: str) -> list[Message]:
    """Earlier turns, as pairs of question and answer or as messages."""
    value = parse(value) or []
    if isinstance(value, list) and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        pairs = [zip(("user", "assistant"), turn, strict=True) for turn in value]
        value = [{"role": role, "content": text} for pair in pairs for role, text in pair]
    content = read_content(value, f"{where}: column 'history'")
    if not isinstance(content, list):
        raise DataError(f"{where}: column 'history' is {describe(value)}; expected pairs of question and answer")
    return content


def _post(row: Row, column: str, where: str) -> str:
    """The prompt of summarize-from-feedback: a post of Reddit or a news article, and "TL;DR:"."""
    info = parse(row.get(column))
    fields = {key: info.get(key) for key in ("subreddit", "title", "post", "article")} if isinstance(info, dict) else {}
    if not (fields.get("post") or fields.get("article")):
        raise DataError(f"{where}: column {column!r} is {describe(info)}; expected an object with post or article")
    prefix = {"subreddit": "SUBREDDIT: r/", "title": "TITLE: ", "post": "POST: ", "article": "ARTICLE: "}
    return "".join(f"{prefix[key]}{value}\n\n" for key, value in fields.items() if value) + "TL;DR:"


def _request(row: Row, column: str, where: str) -> tuple[list[Message], list[dict[str, Any]] | None]:
    """Messages and tools of an object, as a request to OpenAI has them."""
    request = parse(row.get(column))
    if not isinstance(request, dict):
        raise DataError(f"{where}: column {column!r} is {describe(request)}; expected an object with messages")
    messages = read_content(request.get("messages"), f"{where}: messages of column {column!r}")
    if not isinstance(messages, list):
        raise DataError(f"{where}: column {column!r} has no list of messages")
    return messages, read_tools(request.get("tools"), f"{where}: tools of column {column!r}")


def _with_system(messages: list[Message], system: str) -> list[Message]:
    if not system or any(turn["role"] == "system" for turn in messages[:1]):
        return messages
    return [{"role": "system", "content": system}, *messages]


def _has_other_system(example: Example, system: Any) -> bool:
    first = (example.completions[0] if example.prompt is None else example.prompt)[:1]
    return (
        bool(system)
        and isinstance(first, list)
        and any(turn["role"] == "system" and turn["content"] != system for turn in first)
    )


def _as_messages(content: Content, role: str) -> list[Message]:
    return content if isinstance(content, list) else [{"role": role, "content": content}]


def _plain_text(content: Content, where: str) -> str:
    if isinstance(content, str):
        return content
    if len(content) != 1 or content[0]["role"] != "assistant" or "tool_calls" in content[0]:
        raise DataError(f"{where}: the completion of a plain text prompt must be text or one assistant message")
    return content[0]["content"]


def _column(row: Row, column: str, where: str) -> Content:
    """The text or messages of a column."""
    if column not in row:
        raise DataError(f"{where}: column {column!r} is missing")
    return _content(row[column], column, where)


def _content(value: Any, column: str, where: str) -> Content:
    content = read_content(value, f"{where}: column {column!r}")
    if content is None:
        raise DataError(f"{where}: column {column!r} is {describe(value)}; expected text or a list of messages")
    return content


def _text(row: Row, column: str, where: str, key: str = "", optional: bool = True) -> str:
    """The text of a column, or of a key of its object; null or missing reads as "" if it is optional."""
    value = parse(row.get(column)) if key else row.get(column)
    value = value.get(key) if key and isinstance(value, dict) else value
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        missing = "" if column in row else " (missing)"
        raise DataError(f"{where}: column {column!r} is {describe(value)}{missing}; expected text")
    return value


def _scalar(row: Row, column: str, where: str) -> str:
    value = row.get(column)
    if isinstance(value, str | int | float) and not isinstance(value, bool):
        return str(value)
    raise DataError(f"{where}: column {column!r} is {describe(value)}; data.template needs text or a number")

"""Normalise messages and tools: OpenAI's role and content, ShareGPT's from and value, JSON text, nulls of Arrow."""

import ast
import json
import re
import warnings
from typing import Any

from jaxrlhf.data.labels import describe
from jaxrlhf.errors import DataError

Message = dict[str, Any]
_SPEAKERS = {
    "system": ("system", "developer"),
    "user": ("user", "human", "prompter"),
    "assistant": ("assistant", "gpt", "model", "chatgpt", "bing", "bard", "bot", "ai"),
    "tool": ("tool", "observation", "function", "function_response", "function-response"),
}
_ROLES = {speaker: role for role, speakers in _SPEAKERS.items() for speaker in speakers}
_CALLS = ("function_call", "function-call", "tool_call")  # speakers whose text is a call
_TRAINED = ("train", "training", "loss", "weight")  # 0 or false: the message is not trained on
_REASONING = ("reasoning_content", "reasoning", "thinking")  # the first is what templates are given
_LOOKS_LIKE_MESSAGES = re.compile(r"\s*\[?\s*\{\s*['\"](?:role|from|content|value)['\"]\s*:")


def parse(value: Any, where: str = "") -> Any:
    """Return the messages, lists or objects that text spells as JSON or as Python prints them; else the value itself.

    Raises DataError for text that looks like messages and is neither.
    """
    if not isinstance(value, str) or not value.lstrip().startswith(("[", "{")):
        return value
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        pass
    try:
        with warnings.catch_warnings(action="ignore"):  # of escapes that are none
            parsed = ast.literal_eval(value.strip())
    except (ValueError, SyntaxError, MemoryError, RecursionError) as error:
        if where and _LOOKS_LIKE_MESSAGES.match(value):
            raise DataError(f"{where} holds messages as text that is not JSON; write them with json.dumps") from error
        return value
    return parsed if isinstance(parsed, list | dict) else value


def read_content(value: Any, where: str) -> str | list[Message] | None:
    """Return text, or the messages that `value` is or spells as JSON; None for anything else. Raises DataError."""
    items = _items(value, where)
    if items is None:
        return value if isinstance(value, str) else None
    turns: list[Message] = []
    for number, item in enumerate(items, 1):
        turn = _message(item, f"{where}, message {number}")
        if turns and turns[-1]["role"] == turn["role"] == "system":  # a system and a developer message
            turns[-1] = {**turns[-1], "content": f"{turns[-1]['content']}\n\n{turn['content']}"}
        else:
            turns.append(turn)
    return turns


def roles(value: Any) -> list[str]:
    """The role of each message that `value` is or spells, unchecked; [] for anything else."""
    items = _items(value, "")
    if not items or not all(map(_is_message, items)):
        return []
    speakers = [str(item.get("role") or item.get("from")).lower() for item in items]
    return [_ROLES.get(speaker, "assistant" if speaker in _CALLS else speaker) for speaker in speakers]


def _items(value: Any, where: str) -> list[Any] | None:
    """The messages, unchecked, that `value` is or spells: a list, or one as LLaMA-Factory stores chosen and rejected.

    Other JSON text is text: a model may learn to write it.
    """
    parsed = parse(value, where)
    items = [parsed] if isinstance(parsed, dict) and _is_message(parsed) else parsed
    if not isinstance(items, list):
        return None
    if isinstance(value, str):
        speakers = [item.get("role") or item.get("from") for item in items if _is_message(item) and _has_content(item)]
        known = len(speakers) == len(items) > 0 and all(str(s).lower() in (*_ROLES, *_CALLS) for s in speakers)
        return items if known else None
    return items


def _has_content(item: Message) -> bool:
    return not {"content", "value", "tool_calls", "function_call", *_REASONING}.isdisjoint(item)


def is_conversation(value: str | list[Message] | None) -> bool:
    """`value` is a list of messages that does not begin with an answer or its tools, so that it has a prompt."""
    return isinstance(value, list) and bool(value) and value[0]["role"] not in ("assistant", "tool")


def read_tools(value: Any, where: str) -> list[dict[str, Any]] | None:
    """Normalise the tools of a row, a list or JSON text, to `{"type": "function", "function": {...}}`; None if there
    are none. Raises DataError."""
    value = parse(value, where)
    items = [value] if isinstance(value, dict) else value or []
    if not isinstance(items, list):
        raise DataError(f"{where} is {describe(value)}; expected a list of tools, or JSON text of one")
    found = []
    for item in items:
        tool = without_nulls(parse(item))
        if not isinstance(tool, dict):
            raise DataError(f"{where} has a tool that is {describe(item)}; expected an object with a name")
        found.append({"type": "function", "function": tool} if "name" in tool and "function" not in tool else tool)
    return found or None


def without_nulls(value: Any) -> Any:
    """Remove keys with null values at every depth: Arrow adds every key of a struct to every row."""
    if isinstance(value, dict):
        return {key: without_nulls(item) for key, item in value.items() if item is not None}
    return [without_nulls(item) for item in value] if isinstance(value, list) else value


def _is_message(item: Any) -> bool:
    return isinstance(item, dict) and ("role" in item or ("from" in item and "value" in item))


def _message(item: Any, where: str) -> Message:
    """A message with a role, text content, and tool calls whose arguments are objects. Raises DataError."""
    if not isinstance(item, dict):
        raise DataError(f"{where}: is {describe(item)}; expected an object with role and content")
    if not _has_content(item):
        raise DataError(f"{where}: has no content, only {', '.join(item)}; rename the key of its text to content")
    item = without_nulls(item)
    named_from = "role" not in item
    speaker = item.pop("role", None) or item.pop("from", None)
    text = item.pop("content" if "content" in item else "value", "")
    item.pop("from", None)
    if not isinstance(speaker, str) or not re.fullmatch(r"[\w-]+", speaker):
        raise DataError(f"{where}: role is {describe(speaker)}; expected user, assistant, system or tool")
    role = _ROLES.get(speaker.lower(), speaker)
    if role == speaker and named_from and role not in (*_ROLES, *_CALLS):
        raise DataError(f"{where}: unknown speaker {speaker!r}; known speakers are {', '.join((*_ROLES, *_CALLS))}")
    if isinstance(text, list) and all(isinstance(part, dict) and isinstance(part.get("text"), str) for part in text):
        text = "".join(part["text"] for part in text)
    calls = parse(item.pop("tool_calls", None)) or []
    if "function_call" in item:  # OpenAI's name before tool_calls
        calls = [item.pop("function_call")]
    if speaker.lower() in _CALLS:
        role, calls, text = "assistant", parse(text, where), ""
    thoughts = [item.pop(name) for name in _REASONING if name in item]
    for name, value in (("content", text), *(("reasoning", thought) for thought in thoughts)):
        if not isinstance(value, str):
            raise DataError(f"{where}: {name} is {describe(value)}; expected text")
    message: Message = {**item, "role": role, "content": text}
    if any(thoughts):
        message[_REASONING[0]] = next(filter(None, thoughts))
    if calls:
        message["tool_calls"] = [_call(call, where) for call in (calls if isinstance(calls, list) else [calls])]
    flags = [message.pop(name) for name in _TRAINED if name in message]
    if any(flag not in (0, 1) for flag in flags):
        raise DataError(f"{where}: its weight is {describe(flags[0])}; expected 1, or 0 not to train on the message")
    if not all(flags):
        message["train"] = False
    return message


def _call(call: Any, where: str) -> dict[str, Any]:
    function = call.get("function", call) if isinstance(call, dict) else None
    if not isinstance(function, dict) or not isinstance(function.get("name"), str):
        raise DataError(f"{where}: a tool call is {describe(call)}; expected an object with name and arguments")
    arguments = function.get("arguments", {})
    if isinstance(arguments, str):
        try:
            arguments = json.loads(arguments or "{}")
        except (ValueError, RecursionError) as error:
            raise DataError(f"{where}: arguments of a tool call are not JSON ({error})") from error
    function = {**function, "arguments": arguments}
    return {**call, "function": function} if "function" in call else {"type": "function", "function": function}

"""Find messages and tools that a chat template leaves out."""

import json
from collections.abc import Iterator
from typing import Any

from jaxrlhf.data.examples import Example
from jaxrlhf.data.messages import Message
from jaxrlhf.data.tokenise import RenderedExample
from jaxrlhf.data.tokenizer import Tokenizer
from jaxrlhf.errors import DataError, counted


class Omissions:
    """Count what the chat template of a tokenizer leaves out of conversations.

    A template may ignore messages by their role or place: a rendering of markers in their stead shows it, once for all
    conversations of the same structure. Or it drops a part of a text (a thought): the text is then not in the
    rendering, except for whitespace.
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._shown: dict[tuple[Any, ...], set[str] | None] = {}
        self._messages = 0
        self._locations: list[str] = []
        self._without_tools: list[str] = []

    def add(self, example: Example, rendered: RenderedExample, location: str) -> None:
        """Count a row."""
        messages, tools = self.count(example, rendered)
        self._messages += messages
        self._locations += [location] * bool(messages)
        self._without_tools += [location] * tools

    def notes(self) -> list[str]:
        """Lines for the report."""
        lines = []
        if self._locations:
            lines.append(
                f"the chat template leaves out part of {counted(self._messages, 'message')} "
                f"({first_few(self._locations)}): their role, their reasoning or their tool calls"
            )
        if self._without_tools:
            rows = len(self._without_tools)
            lines.append(
                f"the chat template leaves out the tools of {counted(rows, 'row')} ({first_few(self._without_tools)})"
            )
        return lines

    def count(self, example: Example, rendered: RenderedExample) -> tuple[int, bool]:
        """Return (messages that the rendering shows only in part or not at all, whether it leaves out the tools)."""
        if rendered.plain:
            return 0, False
        prompt = example.prompt if isinstance(example.prompt, list) else []
        conversations = [[*prompt, *turns] for turns in example.completions if isinstance(turns, list)]
        texts = [rendered.prompt + turns.text for turns in rendered.completions]
        missing: set[tuple[int, int]] = set()
        tools = False
        for number, text in enumerate(texts or [rendered.prompt]):
            messages = conversations[number] if texts else prompt
            while texts and messages[-1]["role"] != "assistant":  # not rendered: nothing is learnt from them
                messages = messages[:-1]
            shown = self._markers_shown(messages, example.tools, generation=not texts)
            tools |= bool(example.tools) and shown is not None and "tools" not in shown
            for i, message in enumerate(messages):
                if any(
                    (shown is not None and f"{name}{i}" not in shown) or not self._occurs(part, text)
                    for name, part in _parts(message)
                ):
                    missing.add((number if i >= len(prompt) else 0, i))
        return len(missing), tools

    def _markers_shown(self, messages: list[Message], tools: Any, *, generation: bool) -> set[str] | None:
        """The parts (`content0`, ..., `tools`) whose markers are rendered; None if the template refuses markers."""
        parts = [(f"{name}{i}", message, name) for i, message in enumerate(messages) for name, _ in _parts(message)]
        key = (tuple((name, message["role"]) for name, message, _ in parts), len(messages), bool(tools), generation)
        if key not in self._shown:
            marked = [dict(message) for message in messages]
            for i, message in enumerate(messages):
                for name, _ in _parts(message):
                    value = _marker(f"{name}{i}")
                    marked[i][name] = _renamed(message[name], value) if name == "tool_calls" else value
            try:
                text = self._tokenizer.render(marked, generation, tools and _renamed(tools, _marker("tools")))
                names = [name for name, _, _ in parts] + ["tools"]
                self._shown[key] = {name for name in names if _marker(name) in text}
            except DataError:
                self._shown[key] = None
        return self._shown[key]

    def _occurs(self, part: str, text: str) -> bool:
        part = self._tokenizer.escape(part.strip())
        if part in text:
            return True
        quoted = (json.dumps(part, ensure_ascii=ascii_only)[1:-1] for ascii_only in (False, True))
        return any(form in text for form in quoted) or "".join(part.split()) in "".join(text.split())


def first_few(locations: list[str]) -> str:
    """The first five locations, for a report."""
    return ", ".join(locations[:5]) + ", ..." * (len(locations) > 5)


def _parts(message: Message) -> Iterator[tuple[str, str]]:
    """The (key, text) parts of a message that a rendering should show: content, reasoning, names of called tools."""
    for name in ("content", "reasoning_content"):
        if message.get(name, "").strip():
            yield name, message[name]
    for call in message.get("tool_calls") or []:
        yield "tool_calls", str(_function(call).get("name", ""))


def _function(tool: dict[str, Any]) -> dict[str, Any]:
    return tool["function"] if isinstance(tool.get("function"), dict) else tool


def _renamed(tools: list[dict[str, Any]], name: str) -> list[dict[str, Any]]:
    return [
        {**tool, "function": {**tool["function"], "name": name}}
        if _function(tool) is not tool
        else {**tool, "name": name}
        for tool in tools
    ]


def _marker(name: str) -> str:
    return f"qzk{name}xj"

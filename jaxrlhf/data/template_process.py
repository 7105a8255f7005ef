"""Main loop of the process that renders chat templates; imports jinja2 and little else.

A chat template is a program that comes with a model. Jinja's sandbox keeps it from files and from Python's internals,
but a few characters of it can run for years or fill any memory (`{{ 'a' * 3000000000 }}`, loops in loops, a text
doubled in a loop). So templates are compiled and run in a process that has little memory and can be killed.

Templates see what transformers shows them (https://huggingface.co/docs/transformers/chat_templating_writing):
`raise_exception`, `strftime_now`, `tojson` without HTML escapes, `break` and `continue`, and {% generation %} blocks.
"""

import datetime
import gc
import json
import resource
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jinja2
from jinja2 import ext, meta, nodes, parser, runtime, sandbox

from jaxrlhf.errors import first_line
from jaxrlhf.workers.serve import Message, serve

MEMORY = 2**30  # bytes that the process may allocate
LONGEST = 16_000_000  # characters of a rendered conversation
_REASONING = ("reasoning_content", "thinking", "reasoning")


class Generation(ext.Extension):
    """The block {% generation %} ... {% endgeneration %}: its text is that of its body, and its place is recorded."""

    tags = {"generation"}  # noqa: RUF012
    written = 0
    """Characters rendered before the block."""

    def __init__(self, environment: jinja2.Environment) -> None:
        super().__init__(environment)
        self.spans: list[tuple[int, int]] = []

    def parse(self, parser: parser.Parser) -> nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.CallBlock(self.call_method("record"), [], [], body).set_lineno(line)

    def record(self, caller: runtime.Macro) -> str:
        text = caller()
        self.spans.append((self.written, self.written + len(text)))
        return text


class Templates:
    """The templates that were rendered, compiled, by their text."""

    def __init__(self) -> None:
        self.environment = sandbox.ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[Generation, ext.loopcontrols],
            optimized=False,  # a compiled template would hold its constants, such as 'a' * 100000000
        )
        self.environment.filters["tojson"] = _to_json
        self.environment.globals |= {"raise_exception": _raise, "strftime_now": self._date}
        self._generation: Any = self.environment.extensions[Generation.identifier]
        self._compiled: dict[str, jinja2.Template] = {}
        self._today = datetime.datetime.now()

    def render(self, template: str, date: str, variables: dict[str, Any]) -> Message:
        """{"text", "spans"} of the conversation in `variables`; spans are the characters of its {% generation %}
        blocks. `date` is today for `strftime_now`."""
        if template not in self._compiled:
            self._compiled[template] = self.environment.from_string(template)
        self._today, self._generation.spans, self._generation.written = datetime.datetime.fromisoformat(date), [], 0
        pieces: list[str] = []
        variables["messages"] = [*map(_with_reasoning, variables["messages"])]
        for piece in self._compiled[template].generate(variables):
            pieces.append(piece)
            self._generation.written += len(piece)
            if self._generation.written > LONGEST:
                raise ValueError(f"it renders a conversation to more than {LONGEST:,} characters")
        return {"text": "".join(pieces), "spans": self._generation.spans}

    def variables(self, templates: Sequence[str]) -> Message:
        """{"variables"}: the names that templates read and that are not given to every template."""
        given = {*self.environment.globals, "messages", "tools", "documents", "add_generation_prompt"}
        read = set().union(*(meta.find_undeclared_variables(self.environment.parse(text)) for text in templates))
        return {"variables": sorted(read - given)}

    def _date(self, format: str) -> str:
        return self._today.strftime(format)


def main(spec: str, options: dict[str, Any], parent: int) -> None:
    """Serve requests: the arguments of `Templates.render` or of `Templates.variables`."""

    def start() -> tuple[Message, Callable[[Message], Message]]:
        templates = Templates()
        _limit_memory()

        def answer(request: Message) -> Message:
            try:
                return templates.variables(**request) if "templates" in request else templates.render(**request)
            except MemoryError:
                return {"error": f"it needs more than {MEMORY >> 20} MB of memory"}
            except Exception as error:  # a template can raise anything
                return {"error": first_line(error)}

        def answer_and_forget(request: Message) -> Message:
            reply = answer(request)
            if "error" in reply:
                gc.collect()  # the traceback and what it holds, which can be hundreds of megabytes
            return reply

        return {}, answer_and_forget

    serve(start, parent)


def _limit_memory() -> None:
    if sys.platform == "linux":
        used = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * resource.getpagesize()
        resource.setrlimit(resource.RLIMIT_AS, (used + MEMORY, used + MEMORY))


def _with_reasoning(message: dict[str, Any]) -> dict[str, Any]:
    """The message with its reasoning, if it has any, also under the other names that templates read it by."""
    found = next((message[name] for name in _REASONING if message.get(name) is not None), None)
    return message if found is None else {"thinking": found, **message, "reasoning_content": found}


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise(message: str) -> None:
    raise jinja2.TemplateError(message)

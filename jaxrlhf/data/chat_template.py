"""The chat template of a tokenizer: which one, its arguments and its date."""

import datetime
import hashlib
import json
import re
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.config import TokenizerSource
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import DataError, first_line, quoted
from jaxrlhf.files import missing_or_kind
from jaxrlhf.workers import WorkerProcess

Template = str | dict[str, str]
SECONDS = 10.0  # in which a conversation must be rendered
CHATML = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
_MARK = re.compile(r"\{%[-+]?\s*generation\s*[-+]?%\}")


class ChatTemplate:
    """The chat template of a transformers tokenizer, with `arguments` and a fixed date (YYYY-MM-DD).

    A tokenizer may have one template for conversations with tools (`tool_use`) beside its default.
    marks_generation: it has {% generation %} blocks. digest: a hash of the template.
    Raises DataError for arguments that the template does not read.
    """

    def __init__(self, hf: Any, arguments: Mapping[str, Any], date: str) -> None:
        self._hf, self._arguments = hf, dict(arguments)
        self._date = datetime.datetime.fromisoformat(date)
        template: Template = hf.chat_template
        texts = list(template.values()) if isinstance(template, dict) else [template]
        self._dated = any("strftime_now" in text for text in texts)
        self.marks_generation = any(_MARK.search(text) for text in texts)
        self.digest = hashlib.sha256(json.dumps(template).encode()).hexdigest()
        names = set(_ask({"templates": texts})["variables"]) if self._arguments else set()
        for name in self._arguments:
            if name not in names:
                raise DataError(
                    f"tokenizer.template_kwargs: the chat template reads no variable {name!r}"
                    f"{did_you_mean(name, sorted(names))}; it reads {', '.join(sorted(names)) or 'none'}"
                )

    def __str__(self) -> str:
        """The arguments and, if the template writes it, the date."""
        text = "".join(f", {name} is {json.dumps(value)}" for name, value in self._arguments.items())
        return text + (f", its date is {self._date.date()}" if self._dated else "")

    def render(
        self, messages: list[dict[str, Any]], tools: list[dict[str, Any]] | None, **options: Any
    ) -> tuple[str, list[tuple[int, int]]]:
        """Return the rendered text and the characters of its {% generation %} blocks. Raises DataError if the template
        fails, or takes too much time or memory."""
        names = {k: v for k, v in self._hf.special_tokens_map.items() if isinstance(v, str)}
        variables = {**names, "documents": None, **self._arguments, **options, "messages": messages, "tools": tools}
        template = self._hf.get_chat_template(None, tools)
        reply = _ask({"template": template, "date": str(self._date.date()), "variables": variables})
        return reply["text"], [(begin, end) for begin, end in reply["spans"]]

    def with_defaults(self) -> Template:
        """Return the template with its arguments as defaults, for programs that render it without them."""
        lines = [
            f"{{%- if {name} is not defined %}}{{%- set {name} = {_literal(value)} %}}{{%- endif %}}\n"
            for name, value in self._arguments.items()
        ]
        template: Template = self._hf.chat_template
        if isinstance(template, dict):
            return {name: "".join(lines) + text for name, text in template.items()}
        return "".join(lines) + template


def select_chat_template(hf: Any, source: TokenizerSource) -> Template | None:
    """Return the chat template that `source` selects, None for plain text. Raises DataError."""
    choice = source.chat_template
    if source.template_kwargs and (choice == "none" or (choice == "auto" and not hf.chat_template)):
        raise DataError(
            "tokenizer.template_kwargs is set and there is no chat template to read it; remove it, or set "
            "tokenizer.chat_template"
        )
    if choice in ("none", "chatml"):
        return CHATML if choice == "chatml" else None
    if choice != "auto":
        return _read_template(choice)
    texts = hf.chat_template.values() if isinstance(hf.chat_template, dict) else [hf.chat_template or ""]
    for text in texts:
        if not isinstance(text, str):
            raise DataError(
                f"the tokenizer's chat template is {quoted(text)}, not text; give another one in "
                "tokenizer.chat_template, or none"
            )
    if isinstance(hf.chat_template, dict) and "default" not in hf.chat_template:
        raise DataError(
            f"the tokenizer has several chat templates ({', '.join(hf.chat_template)}) and none called default; "
            "save the one to use as a .jinja file and give its path as tokenizer.chat_template"
        )
    return hf.chat_template


def _read_template(choice: str) -> str:
    path = Path(choice).expanduser()
    try:
        if not (reason := missing_or_kind(path)):
            return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = str(error)
    raise DataError(
        f"tokenizer.chat_template: {choice!r} is not auto, none, chatml or a readable .jinja file ({reason})"
    )


class _Renderer:
    """The process that renders templates (template_process.py), started when it is needed."""

    def __init__(self) -> None:
        self._process: WorkerProcess | None = None
        self._lock = threading.Lock()

    def ask(self, line: bytes) -> dict[str, Any]:
        """Send a request and return the reply. Raises TimeoutError, or EOFError if the process ends twice."""
        with self._lock:
            for last in (False, True):
                if self._process is None:
                    self._process = WorkerProcess("jaxrlhf.data.template_process", "", "chat template", {})
                elif self._process.ended:
                    self._process.start()
                try:
                    return self._process.exchange(line, SECONDS)
                except EOFError:  # ended from outside: the kernel ends it with the thread that has started it
                    if last:
                        raise
        raise AssertionError


_renderer = _Renderer()


def _ask(request: dict[str, Any]) -> dict[str, Any]:
    """The reply of the process that renders templates. Raises DataError if it has none."""
    try:
        reply = _renderer.ask(json.dumps(request, default=_plain).encode() + b"\n")
        reason = reply.get("error")
    except TimeoutError:
        reply, reason = {}, f"it takes longer than {SECONDS:g} s"
    except EOFError:
        reply, reason = {}, "it ends the process that renders it"
    except (ValueError, RecursionError) as error:
        reply, reason = {}, first_line(error)
    if reason:
        raise DataError(
            f"the chat template fails on a conversation ({reason}); give another one in tokenizer.chat_template"
        )
    return reply


def _plain(value: Any) -> Any:
    """A value of a message that JSON does not have: a scalar of NumPy as a number, else its type, as transformers gives
    it to templates."""
    return value.item() if hasattr(value, "item") and getattr(value, "ndim", 1) == 0 else f"<{type(value).__name__}>"


def _literal(value: Any) -> str:
    """A value as a Jinja expression."""
    match value:
        case None:
            return "none"
        case bool() | int() | float() | str():
            return json.dumps(value)
        case dict():
            return "{" + ", ".join(f"{json.dumps(str(k))}: {_literal(v)}" for k, v in value.items()) + "}"
        case _:
            return "[" + ", ".join(map(_literal, value)) + "]"

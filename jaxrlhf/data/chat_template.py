"""The chat template of a tokenizer: which one, its arguments and its date."""

import datetime
import hashlib
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxrlhf.config import TokenizerSource
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import DataError

Template = str | dict[str, str]
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
        names = _variables(texts) if self._arguments else set()
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
        """Return the rendered text and, with `return_assistant_tokens_mask`, the characters of its {% generation %}
        blocks. Raises DataError if the template fails."""
        from transformers.utils.chat_template_utils import render_jinja_template

        names = {k: v for k, v in self._hf.special_tokens_map.items() if isinstance(v, str)}
        try:
            template = self._hf.get_chat_template(None, tools)
            variables = _compiled(template).globals
            variables["strftime_now"] = self._date.strftime
            try:
                rendered, spans = render_jinja_template(  # type: ignore[misc]
                    conversations=[messages],
                    tools=tools,  # type: ignore[arg-type]
                    chat_template=template,
                    **{**names, **self._arguments, **options},
                )
            finally:
                del variables["strftime_now"]  # other users of the compiled template keep the clock
        except Exception as error:  # a template is a program and can raise anything
            raise DataError(
                f"the chat template fails on a conversation ({error}); give another one in tokenizer.chat_template"
            ) from error
        return rendered[0], list(spans[0]) if spans else []  # type: ignore[arg-type]

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
        try:
            return Path(choice).expanduser().read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise DataError(
                f"tokenizer.chat_template: {choice!r} is not auto, none, chatml or a readable .jinja file ({error})"
            ) from error
    if isinstance(hf.chat_template, dict) and "default" not in hf.chat_template:
        raise DataError(
            f"the tokenizer has several chat templates ({', '.join(hf.chat_template)}) and none called default; "
            "save the one to use as a .jinja file and give its path as tokenizer.chat_template"
        )
    return hf.chat_template


def _compiled(template: str) -> Any:
    """The compiled template that transformers renders: compiled once and kept."""
    from transformers.utils.chat_template_utils import _compile_jinja_template

    return _compile_jinja_template(template)


def _variables(templates: list[str]) -> set[str]:
    """The variables that templates read, other than those that every rendering sets."""
    from jinja2 import meta

    names: set[str] = set()
    for template in templates:
        compiled = _compiled(template)
        read = meta.find_undeclared_variables(compiled.environment.parse(template))
        names |= read - set(compiled.environment.globals) - {"messages", "tools", "documents", "add_generation_prompt"}
    return names


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

"""Configs as YAML text: `dump` writes a run's config, `render_new` the commented template of `jaxrlhf new`."""

import dataclasses
import inspect
import textwrap
import typing
from typing import Any

import yaml

from jaxrlhf.config import RewardSource
from jaxrlhf.config.base import default_of
from jaxrlhf.config.schema import element_class
from jaxrlhf.config.yaml12 import Dumper


def dump(config: Any) -> str:
    """A config as YAML with every key. Loading it gives an equal config."""
    return yaml.dump(dataclasses.asdict(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def render_new(method: str, cls: type) -> str:
    """A config file for `method` with every key at its default and its documentation as a comment."""
    default = cls()
    lines = [
        *_comment(f"jaxrlhf {method}: {inspect.getdoc(cls)}", ""),
        *_comment(
            f"All values are defaults; null is None. Set the required keys, then run: jaxrlhf {method} FILE.yaml", ""
        ),
    ]
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            doc = field_doc(cls, field.name)
            lines += ["", *_comment(f"{inspect.getdoc(value)} {doc}".strip(), ""), f"{field.name}:"]
            for inner in dataclasses.fields(value):
                lines += _entry(type(value), inner, getattr(value, inner.name), "  ")
                lines += [f"  {line}" for line in render_element(inner.type)]
        else:
            lines += ["", *_entry(cls, field, value, "")]
    return "\n".join(lines) + "\n"


def render_element(annotation: Any) -> list[str]:
    """For a list of sections (`tuple[Section, ...]`), an element with every key at its default, as comments."""
    cls = element_class(annotation)
    if cls is None:
        return []
    lines: list[str] = []
    for i, field in enumerate(dataclasses.fields(cls)):
        *doc, entry = _entry(cls, field, default_of(cls, field.name), "")
        lines += [f"#   {line}" for line in doc]
        lines.append(f"# {'  ' if i else '- '}{entry}")
    return lines


def _entry(cls: type, field: dataclasses.Field, value: Any, indent: str) -> list[str]:
    doc = field_doc(cls, field.name)
    if typing.get_origin(field.type) is typing.Literal:
        choices = ", ".join(choice or "''" for choice in typing.get_args(field.type))
        doc = f"{doc} One of: {choices}.".strip()
    mark = ""
    if cls is RewardSource and field.name in ("model", "function", "components"):
        mark = "  # required: at least one of model, function and components"
    elif doc.endswith(" Required."):
        mark = "  # required"
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return [*_comment(doc.removesuffix(" Required."), indent), f"{indent}{field.name}: {text}{mark}"]


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(text, 110, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)


def field_doc(cls: type, name: str) -> str:
    """The docstring under a field of a config class, or of the base class that it comes from; "" if there is none."""
    fields = (vars(base).get("__pydantic_fields__", {}).get(name) for base in cls.__mro__)
    return next((" ".join(field.description.split()) for field in fields if field and field.description), "")

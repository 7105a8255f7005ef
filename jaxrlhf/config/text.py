"""Configs as YAML text: `dump` writes a run's config, `render_new` the commented template of `jaxrlhf new`."""

import dataclasses
import inspect
import textwrap
import typing
from typing import Any

import yaml

from jaxrlhf.config import RewardSource
from jaxrlhf.config.base import default_of
from jaxrlhf.config.schema import Address, allowed_types, element_class, field_doc, is_text
from jaxrlhf.config.yaml12 import Dumper
from jaxrlhf.secrets import escape, redact_value


def dump(config: Any) -> str:
    """A config as YAML with every key, but without secrets. Loading it gives an equal config, but for these."""
    return yaml.dump(as_mapping(config), Dumper=Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def as_mapping(config: Any) -> dict[str, Any]:
    """A config or section as a mapping to write down: every key, without secrets."""
    fields = dataclasses.fields(config)
    return {field.name: kept(getattr(config, field.name), field.type, field.name) for field in fields}


def kept(value: Any, annotation: Any, name: str) -> Any:
    """The value of a key as it is written down."""
    if dataclasses.is_dataclass(value):
        return as_mapping(value)
    if isinstance(value, dict):
        return redact_value(value, name)
    if isinstance(value, tuple):
        return tuple(kept(item, annotation, name) for item in value)
    if not isinstance(value, str) or is_text(annotation):
        return value
    return redact_value(value) if annotation == Address else escape(redact_value(value))


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
            lines += ["", *_section(cls, field, value)]
        else:
            lines += ["", *_entry(cls, field, value, "")]
    return "\n".join(lines) + "\n"


def render_help(cls: type, defaults: Any = None, prefix: str = "--") -> str:
    """Every option of a config class as a flag, with the form of its value, its documentation and its default.

    `defaults` is an instance with the default values; None: those of the class.
    """
    lines: list[str] = []
    for field in dataclasses.fields(cls):
        flag, annotation = f"{prefix}{field.name}", field.type
        default = default_of(cls, field.name) if defaults is None else getattr(defaults, field.name)
        if isinstance(annotation, type) and dataclasses.is_dataclass(annotation):
            text = f"{inspect.getdoc(annotation)} {field_doc(cls, field.name)}".strip()
            lines += [
                "",
                *textwrap.wrap(text, 110, break_on_hyphens=False),
                render_help(annotation, default, f"{flag}."),
            ]
            continue
        doc = f"{field_doc(cls, field.name).removesuffix(' Required.')} (default: {value_text(default)})".strip()
        lines += [f"  {flag} {form(annotation)}", *_indented(doc)]
        if element := element_class(annotation):
            lines += [f"  {flag}.N.KEY VALUE", *_indented(f"One key of element N (from 0) of {flag}:")]
            lines.append(textwrap.indent(render_help(element, None, f"{flag}.N."), "  "))
        if dict in allowed_types(annotation):
            lines += [f"  {flag}.NAME VALUE", *_indented(f"One value of {flag}.")]
    return "\n".join(lines)


def form(annotation: Any) -> str:
    """The form of an option's value, in YAML."""
    origin, args = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return form(args[0])
    if origin is typing.Literal:
        return "{" + ",".join(choice or "''" for choice in args) + "}"
    if origin is tuple:
        return f"[{', '.join('...' if arg is ... else form(arg) for arg in args)}]"
    if origin is dict or dataclasses.is_dataclass(annotation):
        return "{NAME: VALUE, ...}"
    if args:  # a union with None
        return "|".join(form(arg) for arg in args)
    return {bool: "{true,false}", int: "INT", float: "FLOAT", str: "TEXT", type(None): "null"}[annotation]


def _indented(text: str) -> list[str]:
    return textwrap.wrap(text, 110, initial_indent=" " * 6, subsequent_indent=" " * 6, break_on_hyphens=False)


def value_text(value: Any) -> str:
    """A value as YAML on one line."""
    text = yaml.dump(value, Dumper=Dumper, default_flow_style=True, width=10**6)
    return text.removesuffix("...\n").strip()


def render_element(annotation: Any) -> list[str]:
    """For a list of sections (`tuple[Section, ...]`), an element with every key at its default, as comments."""
    cls = element_class(annotation)
    if cls is None:
        return []
    lines = _keys(cls, {field.name: default_of(cls, field.name) for field in dataclasses.fields(cls)})
    first = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    return [f"# {'- ' if i == first else '  '}{line}" for i, line in enumerate(lines)]


def _section(cls: type, field: dataclasses.Field, value: Any) -> list[str]:
    doc = f"{inspect.getdoc(value)} {field_doc(cls, field.name)}".strip()
    body = _keys(type(value), {inner.name: getattr(value, inner.name) for inner in dataclasses.fields(value)})
    return [*_comment(doc, ""), f"{field.name}:", *(f"  {line}" for line in body)]


def _keys(cls: type, values: dict[str, Any]) -> list[str]:
    """The keys of a section with their documentation as comments, and after a list of sections an element of it."""
    lines: list[str] = []
    for field in dataclasses.fields(cls):
        value = values[field.name]
        if dataclasses.is_dataclass(value):
            lines += _section(cls, field, value)
        else:
            lines += [*_entry(cls, field, value, ""), *render_element(field.type)]
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
    return [*_comment(doc.removesuffix(" Required."), indent), f"{indent}{field.name}: {value_text(value)}{mark}"]


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(text, 110, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)

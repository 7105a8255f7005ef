"""Types of config keys, and readable descriptions of validation errors."""

import dataclasses
import os
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from jaxrlhf.config import trl
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.secrets import redact, redact_value

Text = typing.Annotated[str, "for the model"]
"""Text that a model reads or writes, in which `\\n` is meant as a newline."""


Address = typing.Annotated[str, "resolved at use"]
"""Address of a server, which may hold secrets and references `${NAME}` to environment variables."""


def keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """All dotted keys of a config class, sections included, each with its annotation."""
    for field in dataclasses.fields(cls):
        yield prefix + field.name, field.type
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")


def element_class(annotation: Any) -> type | None:
    """The section class of a list of sections (`tuple[Section, ...]`), or None for other annotations."""
    args = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else ()
    return args[0] if args and dataclasses.is_dataclass(args[0]) else None  # type: ignore[return-value]


def is_text(annotation: Any) -> bool:
    """True for `Text`, also in a union or a tuple."""
    return annotation == Text or any(is_text(part) for part in typing.get_args(annotation))


def known_keys(cls: type, key: str, prefix: str = "") -> dict[str, Any]:
    """The dotted keys of a config class, or of the innermost list element that `key` is in, with their annotations."""
    annotations = dict(keys(cls, prefix))
    for name, annotation in annotations.items():
        element = element_class(annotation)
        if element and (match := re.match(rf"{re.escape(name)}\.\d+\.", key)):
            return known_keys(element, key, match[0])
    return annotations


def unknown(cls: type, key: str) -> str:
    """The message for a dotted `key` that a config class does not have."""
    known = known_keys(cls, key)
    return f"unknown key '{key}'{trl.answer(key, known) or did_you_mean(key, list(known))}"


def field_doc(cls: type, name: str) -> str:
    """The docstring under a field of a config class, or of the base class that it comes from; "" if there is none."""
    fields = (vars(base).get("__pydantic_fields__", {}).get(name) for base in cls.__mro__)
    return next((" ".join(field.description.split()) for field in fields if field and field.description), "")


def key_doc(cls: type, key: str) -> str:
    """The docstring of a dotted key, which may be inside a list element; "" if there is none."""
    *sections, name = key.split(".")
    for part in sections:
        annotation = {field.name: field.type for field in dataclasses.fields(cls)}.get(part)
        inner = cls if part.isdecimal() else element_class(annotation) or annotation
        if not isinstance(inner, type) or not dataclasses.is_dataclass(inner):
            return ""
        cls = inner
    return field_doc(cls, name)


def allowed_types(annotation: Any) -> set[Any]:
    """The types that an annotation allows: {int, NoneType} for `Count | None`, {Literal} for any Literal."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return allowed_types(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(allowed_types(arg) for arg in typing.get_args(annotation)))
    return {origin or annotation}


_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_EXPECTED = {
    "int_type": "a whole number",
    "int_from_float": "a whole number",
    "float_type": "a number",
    "float_parsing": "a number",
    "finite_number": "a finite number",
    "bool_type": "true or false",
    "string_type": "text",
    "dict_type": "a mapping {name: value}",
    "tuple_type": "a list [a, b]",
    "dataclass_type": "a section, a mapping of keys to values",
}


_OPTIONS = {
    "loss=wpo": "dpo.use_weighting, with any loss",
    "loss=ld_dpo": "dpo.ld_alpha, with any loss",
    "loss=lddpo": "dpo.ld_alpha, with any loss",
}
"""Methods that are looked for among the values of an option."""


def message(cls: type, error: Any) -> str:
    """All problems of a pydantic ValidationError of a config class, each with its key, the value and what to do."""
    problems = [(key, problem(cls, key, item)) for key, item in located(error)]
    if len(problems) == 1:
        (key, text), *_ = problems
        return f"{cls.__name__}: {text}" if key else text
    return "\n  ".join([f"{cls.__name__} cannot be used:", *(text for _, text in problems)])


def located(error: Any) -> Iterator[tuple[str, Any]]:
    """The single errors of a pydantic ValidationError with their dotted keys. Of an option that is a name or a list of
    names, those of the kind that was given."""
    for item in error.errors(include_url=False):
        parts = [str(part) for part in item["loc"]]
        kinds = [part for part in parts if part.startswith(("literal[", "tuple["))]
        if kinds and kinds[0].startswith("literal[") and isinstance(item["input"], list | tuple):
            continue
        if kinds and kinds[0].startswith("tuple[") and item["type"] == "tuple_type":
            continue
        yield ".".join(part for part in parts if part not in kinds), item


def problem(cls: type, key: str, error: Any) -> str:
    """Describe a pydantic error at the dotted `key` of a config class."""
    kind, value = error["type"], error["input"]
    if kind == "value_error":  # raised by the checks of a section or config
        reason = str(error["ctx"]["error"])
        return f"{key}: {reason}" if key else reason
    if kind == "unexpected_keyword_argument":
        return unknown(cls, key)
    if kind == "unexpected_positional_argument":
        first = next(iter(dataclasses.fields(cls))).name
        return f"{show(value)} has no name; options are given by name, {first}=... for example"
    text = f"{key}: {describe(error)}"
    if kind == "literal_error" and (
        option := _OPTIONS.get(f"{key.rpartition('.')[2]}={value}".lower().replace("-", "_"))
    ):
        return f"{text.partition('; did you mean')[0]}; it is an option of its own: {option}"
    if kind == "dataclass_type" and isinstance(value, str) and f"{key}.path" in known_keys(cls, key):
        return f"{text}; did you mean '{key}.path'?"
    if kind == "dataclass_type" and isinstance(value, list | tuple) and f"{key}.mix" in known_keys(cls, key):
        return f"{text}; write the list as '{key}.mix'"
    if (kind in _BOUNDS or value is None) and (doc := key_doc(cls, key)):
        return f"{text}. {doc}"
    return text


def describe(error: Any) -> str:
    """Describe a pydantic error: the allowed values, and the value given."""
    kind, value, context = error["type"], error["input"], error.get("ctx", {})
    if kind == "literal_error":
        choices = re.findall(r"'([^']*)'", context["expected"])
        hint = did_you_mean(value, choices, 1) if isinstance(value, str) else ""
        return f"{show(value)} is not one of {', '.join(map(repr, choices))}{hint}"
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"must be {words} {context[name]:.12g}, got {show(value)}"
    if kind in _EXPECTED:
        path = "; write str(path)" if kind == "string_type" and isinstance(value, os.PathLike) else ""
        return f"must be {_EXPECTED[kind]}, got {show(value)}{path}"
    return f"{error['msg']}, got {show(value)}"


def show(value: Any) -> str:
    """A value as written in a config file."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else f"the list {redact(repr(redact_value(value)))}"
    if isinstance(value, bool):
        return str(value).lower()
    return "nothing (null)" if value is None else redact(repr(value))

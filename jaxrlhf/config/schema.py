"""Types of config keys, and readable descriptions of validation errors."""

import dataclasses
import re
import types
import typing
from collections.abc import Iterator
from typing import Any

from jaxrlhf.config.spelling import did_you_mean


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
        return f"must be {_EXPECTED[kind]}, got {show(value)}"
    return f"{error['msg']}, got {show(value)}"


def show(value: Any) -> str:
    """A value as written in a config file."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else f"the list {value}"
    if isinstance(value, bool):
        return str(value).lower()
    return "nothing (null)" if value is None else repr(value)

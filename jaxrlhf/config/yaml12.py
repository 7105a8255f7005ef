"""PyYAML loader and dumper for the scalar types of YAML 1.2 (PyYAML itself implements YAML 1.1)."""

import re
from typing import Any

import yaml

_RESOLVERS = (  # core schema, section 10.3.2: tag, pattern, first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


def _add_resolvers(cls: Any) -> None:
    for tag, pattern, first in _RESOLVERS:
        cls.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), first)


class Loader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # pyright: ignore[reportIncompatibleVariableOverride]


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as another type, or None. Writes tuples as lists."""


_add_resolvers(Loader)
_add_resolvers(Dumper)
Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


def _represent_text(dumper: Dumper, text: str) -> yaml.Node:
    quoted = "\\n" in text or text == "None"  # see ConfigReader
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


Dumper.add_representer(str, _represent_text)


def scalar(node: yaml.Node) -> str | int | float | bool | None:
    """The value of a scalar node."""
    text = node.value
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text

"""PyYAML loader and dumper for the scalar types of YAML 1.2 (PyYAML itself implements YAML 1.1), for files of others.

A few lines of YAML can stand for any number of values, as aliases may refer to lists of aliases: texts are limited in
length, depth and the number of values that they stand for.
"""

import re
from typing import Any

import yaml

MAX_CHARACTERS = 500_000
MAX_VALUES = 20_000  # with all aliases written out
MAX_DEPTH = 100
MAX_DIGITS = 1000
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


class Limit(yaml.YAMLError):
    """A text that is longer, deeper or larger than any config, or refers to itself."""


def _check_depth(levels: int) -> None:
    if levels > MAX_DEPTH:
        raise Limit(f"its values are nested deeper than {MAX_DEPTH} levels")


def _check_count(values: int) -> None:
    if values > MAX_VALUES:
        raise Limit(f"it stands for more than {MAX_VALUES:,} values, with its aliases written out")


class Loader(yaml.SafeLoader):
    """Resolves plain scalars as YAML 1.2. Raises Limit before it has read a text that is too deep or too large."""

    yaml_implicit_resolvers = {}  # noqa: RUF012  # pyright: ignore[reportIncompatibleVariableOverride]

    def __init__(self, stream: Any) -> None:
        super().__init__(stream)
        self._levels = self._values = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        self._levels, self._values = self._levels + 1, self._values + 1
        _check_depth(self._levels)
        _check_count(self._values)
        node = super().compose_node(parent, index)
        self._levels -= 1
        return node


class Dumper(yaml.SafeDumper):
    """Quotes text that YAML 1.1 or YAML 1.2 would read as another type, or None. Writes tuples as lists."""


_add_resolvers(Loader)
_add_resolvers(Dumper)
Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


def _represent_text(dumper: Dumper, text: str) -> yaml.Node:
    quoted = "\\n" in text or text == "None"  # see ConfigReader
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style='"' if quoted else None)


Dumper.add_representer(str, _represent_text)


def compose(text: str) -> yaml.Node | None:
    """The nodes of a YAML text; None if it is empty. Raises yaml.YAMLError."""
    if len(text) > MAX_CHARACTERS:
        raise Limit(f"its {len(text):,} characters are more than the {MAX_CHARACTERS:,} allowed")
    node = yaml.compose(text, Loader=Loader)
    if node is not None:
        _measure(node, set(), {})
    return node


def _measure(node: yaml.Node, around: set[int], known: dict[int, tuple[int, int]]) -> tuple[int, int]:
    """(number of values, levels) of a node with all aliases in it written out. `around`: the nodes that contain it."""
    if id(node) in around:
        raise Limit("an alias refers to the mapping or list that contains it")
    if id(node) in known:
        return known[id(node)]
    parts: list[yaml.Node] = []
    if isinstance(node, yaml.SequenceNode):
        parts = node.value
    elif isinstance(node, yaml.MappingNode):
        parts = [part for pair in node.value for part in pair]
    around.add(id(node))
    inside = [_measure(part, around, known) for part in parts]
    around.remove(id(node))
    count, levels = 1 + sum(n for n, _ in inside), 1 + max((n for _, n in inside), default=0)
    _check_depth(levels)
    _check_count(count)
    known[id(node)] = count, levels
    return count, levels


def load(text: str) -> Any:
    """The value of a YAML text, as plain Python values. Raises yaml.YAMLError."""
    node = compose(text)
    return None if node is None else _value(node)


def _value(node: yaml.Node) -> Any:
    if isinstance(node, yaml.SequenceNode):
        return [_value(item) for item in node.value]
    if isinstance(node, yaml.MappingNode):
        if not all(isinstance(key, yaml.ScalarNode) for key, _ in node.value):
            raise yaml.YAMLError("a key is not plain text")
        return {scalar(key): _value(value) for key, value in node.value}
    return scalar(node)


def scalar(node: yaml.Node) -> str | int | float | bool | None:
    """The value of a scalar node. Raises Limit for an integer of thousands of digits."""
    text = node.value
    match node.tag.rpartition(":")[2]:
        case "null":
            return None
        case "bool":
            return text.lower() == "true"
        case "int":
            if len(text) > MAX_DIGITS:
                raise Limit(f"an integer of {len(text):,} digits is longer than the {MAX_DIGITS:,} allowed")
            return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
        case "float":
            return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
    return text

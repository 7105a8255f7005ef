"""YAML and command-line overrides to a validated config. Imports no jax, transformers or datasets.

Values are read as YAML 1.2 (1e-4 is a number; on, off, yes and no are text). Overrides are merged into the file's
mapping and the whole is validated once, so every problem is reported together, each with its key and its place.
"""

import dataclasses
import itertools
import re
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pydantic
import yaml

from jaxrlhf.config import DPOConfig, GRPOConfig, PPOConfig, RewardConfig, SFTConfig
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.config.text import field_docs, resolve_as_yaml_1_2
from jaxrlhf.errors import ConfigError

METHODS: dict[str, type] = {
    "sft": SFTConfig,
    "reward": RewardConfig,
    "dpo": DPOConfig,
    "ppo": PPOConfig,
    "grpo": GRPOConfig,
}
REQUIRED = ("model.path", "data.path")
_TEXT = (str, types.NoneType)
_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers = {}  # noqa: RUF012  # pyright: ignore[reportIncompatibleVariableOverride]


resolve_as_yaml_1_2(_Loader)


def read(method: str, path: Path | None, overrides: Sequence[tuple[str, str]] = (), *, partial: bool = False) -> Any:
    """The config of `method` from a YAML file (None: the defaults) with `overrides` (dotted key, text) merged in.

    `partial` skips the check that what must be given is given. Raises ConfigError listing every problem.
    """
    cls = METHODS[method]
    reader = _Reader(cls, str(path) if path else "command line")
    mapping = reader.file(path) if path else {}
    for key, text in overrides:
        reader.override(mapping, key, text)
    config = reader.validate(mapping)
    if not partial:
        reader.required(method, mapping)
    if reader.problems:
        raise ConfigError(
            "\n".join(["the config cannot be used:", *(f"  {p}" for p in sorted(reader.problems, key=_line))])
        )
    return config


def method_of(path: Path) -> str:
    """The method that a config file is for: the one its first comment names (`# jaxrlhf ppo`), or the only one that
    knows all its sections. Raises ConfigError where neither says."""
    lines = _lines(path)
    comment = " ".join(itertools.takewhile(lambda line: line.startswith("#"), lines))
    if named := re.search(rf"jaxrlhf ({'|'.join(METHODS)})\b", comment):
        return named[1]
    known = fitting(path)
    if len(known) == 1:
        return known[0]
    raise ConfigError(
        f"{path} does not say what it is for: its sections fit {' and '.join(known) or 'no method'}; "
        f"give --method {'|'.join(METHODS)}"
    )


def fitting(path: Path) -> list[str]:
    """The methods that know all sections of a config file. Raises ConfigError where there is none."""
    lines = _lines(path)
    sections = {line.partition(":")[0] for line in lines if re.match(r"\w+\s*:", line)}
    return [m for m, cls in METHODS.items() if sections <= {field.name for field in dataclasses.fields(cls)}]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error


def keys(cls: type, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Every dotted key below a config class, sections included, with its annotation."""
    for field in dataclasses.fields(cls):
        yield prefix + field.name, field.type
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            yield from keys(field.type, f"{prefix}{field.name}.")


def _element(annotation: Any) -> type | None:
    """The section that the elements of a list are, for `tuple[Section, ...]`."""
    parts = typing.get_args(annotation) if typing.get_origin(annotation) is tuple else ()
    return parts[0] if parts and dataclasses.is_dataclass(parts[0]) else None  # type: ignore[return-value]


def _line(problem: str) -> int:
    place = re.match(r".*?:(\d+): ", problem)
    return int(place[1]) if place else 10**9


class _Reader:
    """One reading: what was met where, and everything that is wrong with it."""

    def __init__(self, cls: type, name: str) -> None:
        self.cls, self.name = cls, name
        self.known = dict(keys(cls))
        self.places: dict[str, str] = {}
        self.problems: list[str] = []

    def file(self, path: Path) -> dict[str, Any]:
        try:
            node = yaml.compose(path.read_text(encoding="utf-8"), Loader=_Loader)
            value = self._value(node, "", self.cls, self.name) if node else {}
        except OSError as error:
            raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error
        except UnicodeDecodeError as error:
            raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error
        except RecursionError as error:
            raise ConfigError(f"{path}: an alias refers to the mapping it stands in") from error
        except yaml.MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {error.problem}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {error}") from error
        if isinstance(value, dict):
            return value
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {_show(value)}")

    def override(self, mapping: dict[str, Any], key: str, text: str) -> None:
        key = key.replace("-", "_")
        kind = self._kind(key)
        if kind is None:
            self.problems.append(f"override: {self._unknown(key)}")
            return
        quoted = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        if _kinds(kind) <= set(_TEXT) and not quoted and not (text == "null" and types.NoneType in _kinds(kind)):
            value: Any = text  # text is taken as it stands, braces and colons included
            self.places[key] = "override"
        else:
            try:
                node = yaml.compose(text, Loader=_Loader)
            except yaml.YAMLError as error:
                self.problems.append(f"override: {key}: {text!r} is not YAML: {getattr(error, 'problem', error)}")
                return
            value = self._value(node, key, kind, "") if node else None
        self.places[key] = "override"
        here: Any = mapping
        *path, leaf = key.split(".")
        for i, part in enumerate(path):
            if isinstance(here, list):  # an element by its number, or the next one
                if int(part) > len(here):
                    found = f"has {len(here)} elements, numbered from 0"
                    self.problems.append(f"override: {key}: {'.'.join(path[:i])} {found}")
                    return
                here.extend([{}] * (int(part) == len(here)))
                here = here[int(part)]
            else:
                empty = [] if _element(self._kind(".".join(path[: i + 1]))) else {}
                if not isinstance(here.get(part), type(empty)):
                    here[part] = empty
                here = here[part]
        _merge(here, leaf, value)

    def validate(self, mapping: dict[str, Any]) -> Any:
        try:
            return pydantic.TypeAdapter(self.cls).validate_python(mapping)
        except pydantic.ValidationError as error:
            for item in error.errors(include_url=False):
                key = ".".join(str(part) for part in item["loc"])
                message = str(item.get("ctx", {}).get("error"))
                if item["type"] == "value_error" and key:
                    self.problems.append(f"{self._place(key)}: {key}: {message}")
                elif item["type"] == "value_error":  # several keys that do not go together
                    named = [k for k in self.places if re.search(rf"\b{re.escape(k)}\b", message)]
                    key = max(named, key=lambda k: (self.places[k] == "override", len(k)), default="")
                    self.problems.append(f"{self._place(key)}: {message}")
                elif item["type"] == "unexpected_keyword_argument":
                    self.problems.append(f"{self._place(key)}: {self._unknown(key)}")
                else:
                    hint = f"; did you mean '{key}.path'?" if isinstance(item["input"], str) else ""
                    hint = hint if item["type"] == "dataclass_type" and f"{key}.path" in self.known else ""
                    self.problems.append(f"{self._place(key)}: {key}: {_complaint(item)}{hint}")
            return None

    def required(self, method: str, mapping: Mapping[str, Any]) -> None:
        def given(key: str) -> bool:
            section, _, leaf = key.partition(".")
            here = mapping.get(section)
            return not isinstance(here, dict | types.NoneType) or bool((here or {}).get(leaf))

        docs = field_docs()
        for key in REQUIRED:
            if not given(key):
                section, _, leaf = key.partition(".")
                doc = docs[self.known[section].__name__, leaf].removesuffix(" Required.")
                self.problems.append(f"{self._place(key)}: {key} is required. {doc}")
        if method in ("ppo", "grpo") and not any(map(given, ("reward.model", "reward.function", "reward.components"))):
            self.problems.append(
                f"{self._place('reward')}: a reward is required: reward.model (a reward model's folder), "
                "reward.function (path.py:name), reward.components (a list), or several of them"
            )

    def _unknown(self, key: str) -> str:
        leaf = key.rpartition(".")[2]
        if leaf in self.known and "." in leaf:
            section, _, name = leaf.rpartition(".")
            return f"'{leaf}' is written as '{name}:' below '{section}:' in a file"
        near = list(self.known)
        if found := self._in_element(key):
            near = [f"{found[0]}.{name}" for name, _ in keys(found[1])]
        return f"unknown key '{key}'{did_you_mean(key, near)}"

    def _in_element(self, key: str) -> tuple[str, type, str] | None:
        """("reward.components.1", Component, "weight") for a key inside an element of a list."""
        for name, kind in self.known.items():
            cls = _element(kind)
            if cls and (match := re.fullmatch(rf"({re.escape(name)}\.\d+)\.(.+)", key)):
                return match[1], cls, match[2]
        return None

    def _kind(self, key: str) -> Any:
        """The annotation of a dotted key, also of one in a list's element or in a mapping; None if there is no such."""
        known = self.known
        if found := self._in_element(key):
            key, known = found[2], dict(keys(found[1]))
        if key in known:
            return known[key]
        parent = known.get(key.rpartition(".")[0])
        return typing.get_args(parent)[1] if dict in _kinds(parent) else None

    def _place(self, key: str) -> str:
        """The place of `key` or of the section it stands in."""
        while key and key not in self.places:
            key = key.rpartition(".")[0]
        return self.places.get(key, self.name)

    def _value(self, node: yaml.Node, key: str, kind: Any, name: str) -> Any:
        """A YAML node as plain data; what is met is noted in `places`, what is wrong in `problems`."""
        place = f"{name}:{node.start_mark.line + 1}" if name else "override"
        if node.tag.rpartition(":")[2] not in _TAGS:
            self.problems.append(f"{place}: the YAML tag {node.tag} is not supported; plain values only")
            return None
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.places[f"{key}.{i}"] = f"{name}:{item.start_mark.line + 1}" if name else "override"
            return [self._value(item, f"{key}.{i}", None, name) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for name_node, value_node in node.value:
                inner = f"{key}.{name_node.value}" if key else str(name_node.value)
                here = f"{name}:{name_node.start_mark.line + 1}" if name else "override"
                if not isinstance(name_node, yaml.ScalarNode):
                    self.problems.append(f"{here}: a key must be plain text")
                elif name_node.value in mapping:
                    self.problems.append(f"{here}: duplicate key '{inner}' (first at {self.places[inner]})")
                else:
                    self.places[inner] = here
                    mapping[name_node.value] = self._value(value_node, inner, self._kind(inner), name)
            return mapping
        value = _scalar(node)
        if kind is str and value is None:  # `key:` with nothing after it
            return ""
        as_text = str in _kinds(kind) or (float in _kinds(kind) and isinstance(value, bool))
        return node.value if as_text and value is not None else value  # 1234567 can be a commit; true is not 1.0


def _scalar(node: yaml.Node) -> str | int | float | bool | None:
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


def _merge(mapping: dict[str, Any], key: str, value: Any) -> None:
    old = mapping.get(key)
    if isinstance(old, dict) and isinstance(value, dict):
        for name, inner in value.items():
            _merge(old, name, inner)
    else:
        mapping[key] = value


def _kinds(annotation: Any) -> set[Any]:
    """The plain types a value may have: {int, NoneType} for `Count | None`, {"choice"} for a Literal."""
    origin = typing.get_origin(annotation)
    if origin is typing.Annotated:
        return _kinds(typing.get_args(annotation)[0])
    if origin in (typing.Union, types.UnionType):
        return set().union(*(_kinds(part) for part in typing.get_args(annotation)))
    return {"choice"} if origin is typing.Literal else {origin or annotation}


def _show(value: Any) -> str:
    """A value as it would stand in the file."""
    if isinstance(value, dict | list):
        return "a mapping" if isinstance(value, dict) else f"the list {value}"
    if isinstance(value, bool):
        return str(value).lower()
    return "nothing (null)" if value is None else repr(value)


_BOUNDS = {
    "greater_than": ("greater than", "gt"),
    "greater_than_equal": ("at least", "ge"),
    "less_than": ("less than", "lt"),
    "less_than_equal": ("at most", "le"),
}
_NEEDED = {
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


def _complaint(item: Any) -> str:
    """One pydantic error in our words: what is allowed, and what was given."""
    kind, value, context = item["type"], item["input"], item.get("ctx", {})
    if kind == "literal_error":
        allowed = re.findall(r"'([^']*)'", context["expected"])
        hint = did_you_mean(value, allowed, 1) if isinstance(value, str) else ""
        return f"{_show(value)} is not one of {', '.join(map(repr, allowed))}{hint}"
    if kind in _BOUNDS:
        words, name = _BOUNDS[kind]
        return f"must be {words} {context[name]:.12g}, got {_show(value)}"
    if kind in _NEEDED:
        return f"must be {_NEEDED[kind]}, got {_show(value)}"
    return f"{item['msg']}, got {_show(value)}"

"""Reads and validates one config, keeping the location of every key for error messages."""

import re
import types
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import pydantic
import yaml

from jaxrlhf.config import schema, yaml12
from jaxrlhf.config.schema import Address, Text, allowed_types, element_class, field_doc, is_text, keys, show
from jaxrlhf.errors import ConfigError, quoted
from jaxrlhf.files import missing_or_kind
from jaxrlhf.secrets import redact, redact_value, resolve

MOST_PROBLEMS = 50
"""Problems of a config that are listed."""
_REQUIRED = ("model.path", "data.path")
_YAML_TAGS = ("null", "bool", "int", "float", "str", "seq", "map")


class Location(NamedTuple):
    """The place where a key is set: a line of the config file, or by an override."""

    source: str
    line: int | None = None

    def __str__(self) -> str:
        return self.source if self.line is None else f"{self.source}:{self.line}"


_OVERRIDE = Location("override")


class ConfigReader:
    """Reads one config and collects the locations of its keys and all problems."""

    def __init__(self, cls: type, source: str) -> None:
        self.cls, self.source = cls, source
        self.annotations = dict(keys(cls))
        self._sections = {key.rpartition(".")[0] for key in self.annotations}
        self.locations: dict[str, Location] = {}
        self.problems: list[tuple[Location, str]] = []

    def read_file(self, path: Path) -> dict[str, Any]:
        """The file's mapping. Raises ConfigError if the file is not a YAML mapping."""
        try:
            node = yaml12.compose(read_config(path))
            value = self._to_python(node, "", self.cls, self.source) if node else {}
        except yaml12.Limit as error:
            raise ConfigError(f"{path}: {error}") from error
        except yaml.MarkedYAMLError as error:
            mark, problem = error.problem_mark or error.context_mark, str(error.problem)
            if "stream" in problem and error.context_mark:  # something is still open at the end of the file
                mark, kind = error.context_mark, "quote" if "quoted" in str(error.context) else "bracket"
                problem = f"the {kind} opened here is not closed"
            raise ConfigError(f"{path}:{mark.line + 1 if mark else 1}: not YAML: {problem}") from error
        except yaml.YAMLError as error:
            raise ConfigError(f"{path}: not YAML: {error}") from error
        if isinstance(value, dict):
            return value
        raise ConfigError(f"{path}: expected a mapping of keys to values, found {show(value)}")

    def apply_override(self, mapping: dict[str, Any], key: str, text: str) -> None:
        """Set `key` in `mapping`, creating sections and list elements as needed."""
        key = key.replace("-", "_")
        annotation = self._annotation(key)
        if annotation is None:
            self.problems.append((_OVERRIDE, self._unknown(key)))
            return
        allowed = allowed_types(annotation)
        in_quotes = len(text) > 1 and text[0] == text[-1] and text[0] in "'\""
        is_null = text in ("null", "None") and types.NoneType in allowed
        if allowed <= {str, types.NoneType} and not in_quotes and not is_null:
            # verbatim, braces and colons included
            value: Any = _with_newlines(text) if is_text(annotation) else text
        else:
            try:
                node = yaml12.compose(text)
            except yaml.YAMLError as error:
                reason = getattr(error, "problem", error)
                shown = redact(quoted(redact_value(text, key.rpartition(".")[2])))
                self.problems.append((_OVERRIDE, f"{key}: {shown} is not YAML: {reason}"))
                return
            value = self._to_python(node, key, annotation, None) if node else None
        self.locations[key] = _OVERRIDE
        target: Any = mapping
        *path, leaf = key.split(".")
        for i, part in enumerate(path):
            if isinstance(target, list):  # an existing element by its index, or a new one at the end
                if int(part) > len(target):
                    name = ".".join(path[:i])
                    self.problems.append((_OVERRIDE, f"{key}: {name} has {len(target)} elements, numbered from 0"))
                    return
                target.extend([{}] * (int(part) == len(target)))
                target = target[int(part)]
            else:
                empty = [] if element_class(self._annotation(".".join(path[: i + 1]))) else {}
                if not isinstance(target.get(part), type(empty)):
                    target[part] = empty
                target = target[part]
        _merge(target, leaf, value)

    def validate(self, mapping: dict[str, Any]) -> Any:
        """The config, or None if there are problems. `${NAME}` in a value is the environment variable, read as YAML if
        the option takes no text, except in texts for a model; addresses and mappings keep it until they are used."""
        try:
            return pydantic.TypeAdapter(self.cls).validate_python(self._with_variables(mapping, ""))
        except pydantic.ValidationError as error:
            for key, item in schema.located(error):
                if len(self.problems) < MOST_PROBLEMS:
                    self._add_validation_error(key, item)
                else:  # they are only counted: looking for similar names takes time
                    self.problems.append((self._location(key), key))
            return None

    def _with_variables(self, value: Any, key: str) -> Any:
        annotation = self._annotation(key) if key else self.cls
        if isinstance(value, dict):
            if dict in allowed_types(annotation):
                return value
            return {name: self._with_variables(item, f"{key}.{name}" if key else name) for name, item in value.items()}
        if isinstance(value, list):
            return [self._with_variables(item, f"{key}.{i}") for i, item in enumerate(value)]
        if annotation is None:
            annotation = self._annotation(key.rpartition(".")[0])  # of an element of a list
        if not isinstance(value, str) or annotation == Address or is_text(annotation):
            return value
        try:
            found = resolve(value, key)
            return found if found == value or str in allowed_types(annotation) else yaml12.load(found)
        except (ConfigError, yaml.YAMLError) as error:
            self.problems.append((self._location(key), str(error)))
            return value

    def _add_validation_error(self, key: str, error: Any) -> None:
        unknown = error["type"] == "unexpected_keyword_argument"
        message = self._unknown(key) if unknown else schema.problem(self.cls, key, error)
        if error["type"] == "value_error":
            reason, prefix = str(error["ctx"]["error"]), f"{key}." if key else ""
            mentioned = [
                k for k in self.locations if k.startswith(prefix) and re.search(rf"\b{re.escape(k)}\b", reason)
            ]
            if mentioned:  # of conflicting keys, blame an override first
                key = max(mentioned, key=lambda k: (self.locations[k] == _OVERRIDE, len(k)))
                message = reason
            others = [k for k in mentioned if self.locations[k] != _OVERRIDE and k not in self._sections]
            if others and self.locations[key] == _OVERRIDE:
                message += f"; {' and '.join(others)} {'is' if len(others) == 1 else 'are'} set by {self.source}"
        self.problems.append((self._location(key), message))

    def check_required(self, config: Any, method: str, mapping: Mapping[str, Any]) -> None:
        """Add a problem for each required key that is not set. `config` is that of `validate`."""

        def is_set(key: str) -> bool:
            section, _, leaf = key.partition(".")
            values = mapping.get(section)
            if values is not None and not isinstance(values, dict):
                return True  # not a section: reported by validation
            return bool((values or {}).get(leaf))

        for key in (*_REQUIRED, *(["teacher.path"] if "teacher.path" in self.annotations else [])):
            if not is_set(key) and not (key == "data.path" and is_set("data.mix")):
                section, _, leaf = key.partition(".")
                doc = field_doc(self.annotations[section], leaf).removesuffix(" Required.")
                self.problems.append((self._location(key), f"{key} is required. {doc}"))
        if method not in ("ppo", "grpo"):
            return
        if config is None:  # an option that may replace the reward is set, rightly or not
            needs_reward = not mapping.get("environment") and not is_set("grpo.rejected_text")
        else:
            needs_reward = config.needs_reward
        if needs_reward and not any(map(is_set, ("reward.model", "reward.function", "reward.components"))):
            message = (
                "a reward is required: reward.model (a reward model's folder), reward.function (path.py:name), "
                "reward.components (a list), or several of them"
            )
            self.problems.append((self._location("reward"), message))

    def _unknown(self, key: str) -> str:
        if key in self.annotations:  # a dotted key as one word of the file
            section, _, name = key.rpartition(".")
            return f"'{key}' is written as '{name}:' below '{section}:' in a file"
        return schema.unknown(self.cls, key)

    def _annotation(self, key: str) -> Any:
        """The annotation of a dotted key, which may be inside a list element or a mapping; None if unknown."""
        annotations = schema.known_keys(self.cls, key)
        if key in annotations:
            return annotations[key]
        parent = annotations.get(key.rpartition(".")[0])
        return typing.get_args(parent)[1] if dict in allowed_types(parent) else None

    def _location(self, key: str) -> Location:
        """The location of `key`, or of the closest section around it."""
        while key and key not in self.locations:
            key = key.rpartition(".")[0]
        return self.locations.get(key, Location(self.source))

    def _to_python(self, node: yaml.Node, key: str, annotation: Any, source: str | None) -> Any:
        """Convert a YAML node to plain data, recording locations and problems. `source` is None for overrides."""

        def location(of: yaml.Node) -> Location:
            return Location(source, of.start_mark.line + 1) if source else _OVERRIDE

        if node.tag.rpartition(":")[2] not in _YAML_TAGS:
            self.problems.append((location(node), f"the YAML tag {node.tag} is not supported; use plain values"))
            return None
        if isinstance(node, yaml.SequenceNode):
            for i, item in enumerate(node.value):
                self.locations[f"{key}.{i}"] = location(item)
            of_items = Text if is_text(annotation) else None
            return [self._to_python(item, f"{key}.{i}", of_items, source) for i, item in enumerate(node.value)]
        if isinstance(node, yaml.MappingNode):
            mapping: dict[str, Any] = {}
            for key_node, value_node in node.value:
                inner = f"{key}.{key_node.value}" if key else str(key_node.value)
                if not isinstance(key_node, yaml.ScalarNode):
                    self.problems.append((location(key_node), "a key must be plain text"))
                elif key_node.value in mapping:
                    message = f"duplicate key '{inner}' (first at {self.locations[inner]})"
                    self.problems.append((location(key_node), message))
                else:
                    self.locations[inner] = location(key_node)
                    mapping[key_node.value] = self._to_python(value_node, inner, self._annotation(inner), source)
            return mapping
        assert isinstance(node, yaml.ScalarNode)
        allowed = allowed_types(annotation)
        try:
            value = yaml12.scalar(node)
        except yaml12.Limit as error:
            self.problems.append((location(node), f"{key}: {error}"))
            return None
        if allowed == {str} and value is None:  # `key:` without a value
            return ""
        if types.NoneType in allowed and node.value == "None" and node.style is None:
            return None
        if is_text(annotation) and "\\n" in node.value and node.style in (None, "'"):
            if source is None:
                return _with_newlines(node.value)
            self.problems.append(
                (location(node), f"{key}: \\n is a newline only in double quotes; write the text in double quotes")
            )
        # text keys keep digits as written (a commit 1234567); a boolean for a number is left to validation to reject
        as_text = str in allowed or (float in allowed and isinstance(value, bool))
        return node.value if as_text and value is not None else value


def read_config(path: Path) -> str:
    """The text of a config file. Raises ConfigError if it cannot be read or is longer than any config."""
    try:
        if problem := missing_or_kind(path):  # a named pipe would wait for a writer
            raise ConfigError(f"cannot read the config file {path}: {problem}")
        if (size := path.stat().st_size) > 4 * yaml12.MAX_CHARACTERS:
            raise ConfigError(f"{path}: {size:,} bytes are more than any config has; is it a data file?")
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"{path} is not UTF-8 text: byte {error.start} cannot be read") from error
    except OSError as error:
        raise ConfigError(f"cannot read the config file {path}: {error.strerror}") from error


def _with_newlines(text: str) -> str:
    """The text with newlines for `\\n`, and `\\n` for `\\\\n`."""
    return re.sub(r"\\(\\n|n)", lambda match: "\n" if match[1] == "n" else match[1], text)


def _merge(mapping: dict[str, Any], key: str, value: Any) -> None:
    """Set `mapping[key]`, merging mappings recursively."""
    old = mapping.get(key)
    if isinstance(old, dict) and isinstance(value, dict):
        for name, inner in value.items():
            _merge(old, name, inner)
    else:
        mapping[key] = value

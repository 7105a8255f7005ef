"""A config as text: the resolved YAML of a run, and the commented YAML that `jaxrlhf new` prints."""

import ast
import dataclasses
import functools
import inspect
import re
import textwrap
import typing
from typing import Any

import yaml

from jaxrlhf.config import RewardSource, dpo, grpo, lora, methods, ppo, rewards, sections

_RESOLVERS = (  # the core schema of YAML 1.2, section 10.3.2: tag, pattern, first characters
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", list("-+0123456789")),
    (
        "float",
        r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)",
        list("-+.0123456789"),
    ),
)


def resolve_as_yaml_1_2(cls: Any) -> None:
    """Add the scalars of YAML 1.2's core schema to a PyYAML loader or dumper class."""
    for tag, pattern, first in _RESOLVERS:
        cls.add_implicit_resolver(f"tag:yaml.org,2002:{tag}", re.compile(rf"^(?:{pattern})$"), first)


class _Dumper(yaml.SafeDumper):
    """Quotes what either YAML 1.1 or YAML 1.2 would read as something other than text."""


resolve_as_yaml_1_2(_Dumper)
_Dumper.add_representer(tuple, lambda dumper, value: dumper.represent_list(value))


def dump(config: Any) -> str:
    """A config as YAML, every key written out. Reading it gives an equal config."""
    return yaml.dump(dataclasses.asdict(config), Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=10**6)


def render_new(method: str, cls: type) -> str:
    """A config file for `method` with every key at its default, and the comment that stands under it in config/."""
    default = cls()
    lines = [
        *_comment(f"jaxrlhf {method}: {inspect.getdoc(cls)}", ""),
        *_comment(f"Every value is the default. Fill in what is required, then: jaxrlhf {method} THIS_FILE.yaml", ""),
    ]
    for field in dataclasses.fields(cls):
        value = getattr(default, field.name)
        if dataclasses.is_dataclass(value):
            doc = field_docs().get((cls.__name__, field.name), "")
            lines += ["", *_comment(f"{inspect.getdoc(value)} {doc}".strip(), ""), f"{field.name}:"]
            for inner in dataclasses.fields(value):
                lines += _entry(type(value), inner, getattr(value, inner.name), "  ")
                lines += [f"  {line}" for line in render_element(inner.type)]
        else:
            lines += ["", *_entry(cls, field, value, "")]
    return "\n".join(lines) + "\n"


def render_element(annotation: Any) -> list[str]:
    """For a list of sections (`tuple[Section, ...]`), an element with every key at its default, as comments."""
    cls = (typing.get_args(annotation) or (None,))[0]
    if typing.get_origin(annotation) is not tuple or not dataclasses.is_dataclass(cls):
        return []
    lines: list[str] = []
    for field in dataclasses.fields(cls):
        default = cls.__pydantic_fields__[field.name].get_default(call_default_factory=True)  # type: ignore[union-attr]
        *doc, entry = _entry(cls, field, default, "")  # type: ignore[arg-type]
        lines += [f"#   {line}" for line in doc]
        lines.append(f"# {'  ' if any(line.startswith('# - ') for line in lines) else '- '}{entry}")
    return lines


def _entry(cls: type, field: dataclasses.Field, value: Any, indent: str) -> list[str]:
    doc = field_docs().get((cls.__name__, field.name), "")
    choices = typing.get_args(field.type) if typing.get_origin(field.type) is typing.Literal else ()
    if choices:
        named = ", ".join(choice or "''" for choice in choices)
        doc = f"{doc} One of: {named}.".strip()
    if cls is RewardSource and field.name in ("model", "function", "components"):
        mark = "  # required: model, function or components, or several of them"
    else:
        mark = "  # required" if doc.endswith(" Required.") else ""
    text = yaml.dump(value, Dumper=_Dumper, default_flow_style=True, width=10**6).removesuffix("...\n").strip()
    return [*_comment(doc.removesuffix(" Required."), indent), f"{indent}{field.name}: {text}{mark}"]


def _comment(text: str, indent: str) -> list[str]:
    prefix = f"{indent}# "
    return textwrap.wrap(text, 110, initial_indent=prefix, subsequent_indent=prefix, break_on_hyphens=False)


@functools.cache
def field_docs() -> dict[tuple[str, str], str]:
    """The text under each field of config/, by (class, field)."""
    docs: dict[tuple[str, str], str] = {}
    for cls in [
        node
        for module in (dpo, grpo, lora, methods, ppo, rewards, sections)
        for node in ast.parse(inspect.getsource(module)).body
    ]:
        if not isinstance(cls, ast.ClassDef):
            continue
        for field, text in zip(cls.body, cls.body[1:], strict=False):
            match field, text:
                case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(doc))):
                    docs[cls.name, name] = " ".join(doc.split())
    return docs

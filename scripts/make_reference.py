"""Write the generated pages of docs/: `python scripts/make_reference.py`.

configuration.md, from the config classes; metrics.md, from the definitions of all metrics; and in trl.md the table of
arguments, from the names that error messages answer.
"""

import dataclasses
import inspect
import re
import typing
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from jaxrlhf.config import trl
from jaxrlhf.config.base import default_of
from jaxrlhf.config.file import METHODS
from jaxrlhf.config.schema import element_class, field_doc
from jaxrlhf.config.text import form, value_text
from jaxrlhf.metrics.keys import COMPONENT, METRICS

DOCS = Path(__file__).resolve().parents[1] / "docs"
TITLES = {
    "sft": "SFT",
    "reward": "reward models",
    "dpo": "DPO",
    "ppo": "PPO",
    "grpo": "GRPO",
    "distill": "distillation",
}

CONFIGURATION = """\
# Configuration

Every option of every method, with the form of its value, its default and what it does. This page is made from the
config classes in `jaxrlhf/config/` by `scripts/make_reference.py`.

An option is a key of a YAML file, a flag of the command line and an argument of a config class:

```yaml
optim: {learning_rate: 1e-5}
```

```bash
jaxrlhf ppo my.yaml --optim.learning_rate 1e-5
```

```python
PPOConfig(optim={"learning_rate": 1e-5})
```

`jaxrlhf new METHOD` prints a file with all options of a method, `jaxrlhf METHOD --help` lists its flags, and
`jaxrlhf METHOD FILE --dry-run` prints every option of a run as it was understood. An unknown key is an error that names
the nearest known one. Files are YAML 1.2: `1e-4` is a number; `on`, `off`, `yes` and `no` are text.

## Without a section
"""

METRICS_PAGE = """\
# Metrics

What each number in a run's `metrics.jsonl` means. This page is made from `jaxrlhf/metrics/keys.py` by
`scripts/make_reference.py`; a key that is not defined there is an error of the program.

Log-probabilities, entropies and KL are in nats, lengths in tokens. A mean over tokens is the sum over the real tokens
of the whole batch divided by their number. Where the numbers go, and TRL's names for them: [logging.md](logging.md).
"""

GROUPS = {
    "": ("Training", "SFT, reward models, DPO and its relatives; the first ones also PPO and GRPO."),
    "rewards/": (
        "Implicit rewards",
        "DPO and its relatives: beta log(policy / reference), or without a reference beta log p per token.",
    ),
    "logps/": ("Log-probabilities of pairs", "DPO and its relatives."),
    "share/": ("Labels", "KTO."),
    "objective/": ("Objective", "PPO and GRPO: scores, KL and entropy of the responses of an update."),
    "rewards/NAME": ("Components of the score", "PPO and GRPO: one set for each component of `reward`."),
    "policy/": ("Policy", "PPO and GRPO: the optimizer steps of an update."),
    "critic/": ("Critic", "PPO."),
    "loss/": ("Losses", "PPO and GRPO."),
    "val/": ("Values and checks", "PPO and GRPO: the value model; do the sampler, the old and the new policy agree?"),
    "tokens/": ("Responses", "PPO and GRPO."),
    "groups/": ("Groups", "GRPO and its relatives: the responses to one prompt."),
    "eval/": ("Held out", "Supervised methods: all held-out rows. PPO and GRPO: validation on held-out prompts."),
    "alarm/": ("Alarms", "PPO and GRPO: [`alarms`](configuration.md#alarms). All methods: `gradient` and `scores`."),
    "distill/": ("Distillation", "Student and teacher on the tokens of the completions, at `distill.temperature`."),
    "perf/": ("Speed", "The only metrics that differ between runs with equal configs."),
}


def configuration() -> str:
    """The page configuration.md: the options outside sections, then each section with the methods that have it."""
    fields: dict[str, dict[str, dataclasses.Field]] = {}
    for method, cls in METHODS.items():
        for field in dataclasses.fields(cls):
            fields.setdefault(field.name, {})[method] = field
    plain = {name: users for name, users in fields.items() if not dataclasses.is_dataclass(_only(users.values()).type)}
    parts = [CONFIGURATION]
    for name, users in plain.items():
        for text, methods in _by_text((method, field_doc(METHODS[method], name)) for method in users):
            defaults = {method: default_of(METHODS[method], name) for method in methods}
            parts.append(_entry(name, users[methods[0]], f"{text}{_users(methods)}", defaults))
    for name, users in fields.items():
        if name not in plain:
            parts += _section(name, _only(users.values()).type, list(users))
    return "\n".join(parts)


def _section(name: str, cls: Any, methods: list[str]) -> list[str]:
    """The heading of a section, what it is for, and its options."""
    parts = [f"## {name}\n"]
    about = [_doc(cls) + _users(methods)]
    for text, of in _by_text((method, field_doc(METHODS[method], name)) for method in methods):
        about += [f"{_names(of)}: {text}"] if text else []
    parts.append("\n\n".join(map(_escaped, about)) + "\n")
    for field in dataclasses.fields(cls):
        defaults = {method: getattr(default_of(METHODS[method], name), field.name) for method in methods}
        parts.append(_entry(f"{name}.{field.name}", field, field_doc(cls, field.name), defaults))
    for field in dataclasses.fields(cls):
        if element := element_class(field.type):
            parts.append(f"### An element of {name}.{field.name}\n\n{_escaped(_doc(element))}\n")
            parts += _keys(f"{name}.{field.name}.N", element)
    return parts


def _keys(prefix: str, cls: Any) -> list[str]:
    """The options of an element of a list, those of its own sections and of the elements of its lists included."""
    parts = []
    for field in dataclasses.fields(cls):
        key, text = f"{prefix}.{field.name}", field_doc(cls, field.name)
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            parts.append(f"**`{key}`** · a section<br>\n{_escaped(f'{_doc(field.type)} {text}'.strip())}\n")
            parts += _keys(key, field.type)
            continue
        parts.append(_entry(key, field, text, {"": default_of(cls, field.name)}))
        if element := element_class(field.type):
            parts += _keys(f"{key}.N", element)
    return parts


def _entry(key: str, field: dataclasses.Field, text: str, defaults: dict[str, Any]) -> str:
    """An option: its key, the form of a value, the default or those of the methods, and its documentation."""
    if typing.get_origin(field.type) is typing.Literal:
        shape = "one of " + ", ".join(f"`{choice or repr('')}`" for choice in typing.get_args(field.type))
    else:
        shape = " or ".join(f"`{part}`" for part in form(field.type).split("|"))
    values = _by_text((method, value_text(value)) for method, value in defaults.items())
    default = ", ".join(f"`{value}`{f' ({_names(of)})' if len(values) > 1 else ''}" for value, of in values)
    needed = " Required." in text
    about = f"<br>\n{_escaped(text.replace(' Required.', ''))}" if text else ""
    return f"**`{key}`** · {shape} · {'required' if needed else f'default {default}'}{about}\n"


def _by_text(items: Iterable[tuple[str, str]]) -> list[tuple[str, list[str]]]:
    """Each text with the methods that have it."""
    found: dict[str, list[str]] = {}
    for method, text in items:
        found.setdefault(text, []).append(method)
    return list(found.items())


def _names(methods: list[str]) -> str:
    return ", ".join(TITLES[method] for method in methods)


def _users(methods: list[str]) -> str:
    return "" if len(methods) == len(METHODS) else f" Only in {_names(methods)}."


def _doc(cls: type) -> str:
    return " ".join((inspect.getdoc(cls) or "").split())


def _only(fields: Iterable[dataclasses.Field]) -> dataclasses.Field:
    """The field of an option or section that all methods define alike."""
    first, *others = fields
    assert all(field.type == first.type for field in others), first.name
    return first


def _escaped(text: str) -> str:
    """Text in which Markdown sees no HTML, no emphasis and no end of a cell, code aside."""
    parts = re.split(r"(`[^`]*`)", text)
    return "".join(part if part.startswith("`") else re.sub(r"([*<|])", r"\\\1", part) for part in parts)


def metrics() -> str:
    """The page metrics.md: a table for each prefix."""
    found: dict[str, list[tuple[str, str]]] = {prefix: [] for prefix in GROUPS}
    longest_first = sorted(GROUPS, key=len, reverse=True)
    for key, text in (METRICS | COMPONENT).items():
        found[next(prefix for prefix in longest_first if key.startswith(prefix))].append((key, text))
    parts = [METRICS_PAGE]
    for prefix, rows in found.items():
        title, about = GROUPS[prefix]
        table = [f"| `{key}` | {_escaped(text)} |" for key, text in rows]
        parts.append("\n".join([f"## {title}\n", f"{about}\n", "| key | definition |", "|---|---|", *table, ""]))
    return "\n".join(parts)


def arguments() -> str:
    """The table of trl.md: a name there, our options, a remark."""
    rows = [
        f"| `{name}` | {', '.join(f'`{option}`' for option in options)} | {remark} |"
        for name, (options, remark) in trl.NAMES.items()
    ]
    return "\n".join(["| there | here | |", "|---|---|---|", *rows])


def pages() -> dict[Path, str]:
    """Each page that is made here, as it should be; of trl.md, only the part between two comments is."""
    page = DOCS / "trl.md"
    begin, end = "<!-- made by scripts/make_reference.py -->\n", "\n<!-- end of what is made -->"
    before, rest = page.read_text(encoding="utf-8").split(begin)
    _, after = rest.split(end)
    return {
        DOCS / "configuration.md": configuration(),
        DOCS / "metrics.md": metrics(),
        page: f"{before}{begin}\n{arguments()}\n{end}{after}",
    }


if __name__ == "__main__":
    for path, text in pages().items():
        path.write_text(text, encoding="utf-8")

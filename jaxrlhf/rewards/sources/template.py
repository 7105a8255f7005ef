"""The text that a component judges, written from prompt, response and columns."""

import string
from collections.abc import Callable, Collection

from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError
from jaxrlhf.rewards.sources.answers import Request


def fields(template: str) -> list[str]:
    """The names of the {fields}, in order. Raises ConfigError if there is none, or for more than a plain name."""
    try:
        parts = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(
            f"reward template {template!r}: {error}; a brace that is meant as such is written twice"
        ) from error
    names = [name for _, name, _, _ in parts if name is not None]
    for _, name, form, conversion in parts:
        if name is not None and (form or conversion or not name.isidentifier()):
            raise ConfigError(
                f"reward template {template!r}: a field is a plain name in braces, such as {{prompt}}, not "
                f"'{{{name}{'!' + conversion if conversion else ''}{':' + form if form else ''}}}'"
            )
    if not names:
        raise ConfigError(f"reward template {template!r} has no field: every completion would be judged alike")
    return names


def check(template: str, columns: Collection[str]) -> None:
    """Raises ConfigError for a template that `fill` could not fill."""
    there = ["prompt", "response", *(name for name in columns if name not in ("prompt", "response"))]
    for name in fields(template):
        if name not in there:
            raise ConfigError(
                f"reward template {template!r}: there is no '{name}'; the fields are {', '.join(there)}"
                f"{did_you_mean(name, there)}"
            )


def fill(template: str, request: Request, guard: Callable[[str], str] = str) -> list[str]:
    """The text of each completion. What stands in a field goes through `guard`, so that only the template's own words
    can be control tokens. `prompt` and `response` come before columns of that name."""
    names = set(fields(template))
    texts = []
    for i, (prompt, response) in enumerate(zip(request.prompts, request.completions, strict=True)):
        values = {name: column[i] for name, column in request.columns.items() if name in names}
        values |= {"prompt": prompt, "response": response}
        shown = {name: guard("" if value is None else str(value)) for name, value in values.items()}
        texts.append(template.format_map(shown))
    return texts

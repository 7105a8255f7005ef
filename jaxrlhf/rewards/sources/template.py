"""Templates: the text that a component scores, built from prompt, response and data columns."""

import string
from collections.abc import Callable, Collection

from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError
from jaxrlhf.rewards.sources.protocol import ScoreRequest


def fields(template: str) -> list[str]:
    """Names of the {fields}, in order. Raises ConfigError if there is none, or for anything but a plain name."""
    try:
        parsed = list(string.Formatter().parse(template))
    except ValueError as error:
        raise ConfigError(f"reward template {template!r}: {error}; write a literal brace twice") from error
    names = [name for _, name, _, _ in parsed if name is not None]
    for _, name, spec, conversion in parsed:
        if name is not None and (spec or conversion or not name.isidentifier()):
            raise ConfigError(
                f"reward template {template!r}: a field is a plain name in braces, such as {{prompt}}, not "
                f"'{{{name}{'!' + conversion if conversion else ''}{':' + spec if spec else ''}}}'"
            )
    if not names:
        raise ConfigError(f"reward template {template!r} has no field: every completion would get the same score")
    return names


def check(template: str, columns: Collection[str]) -> None:
    """Raise ConfigError if a field is neither prompt, response nor a column of the data."""
    known = ["prompt", "response", *(name for name in columns if name not in ("prompt", "response"))]
    for name in fields(template):
        if name not in known:
            raise ConfigError(
                f"reward template {template!r}: there is no '{name}'; the fields are {', '.join(known)}"
                f"{did_you_mean(name, known)}"
            )


def fill(template: str, request: ScoreRequest, escape: Callable[[str], str] = str) -> list[str]:
    """Fill the template for each completion.

    Field values pass through `escape`, so that only the template's own words can be control tokens. `prompt` and
    `response` take precedence over columns of the same name.
    """
    names = set(fields(template))
    texts = []
    for i, (prompt, response) in enumerate(zip(request.prompts, request.completions, strict=True)):
        values = {name: column[i] for name, column in request.columns.items() if name in names}
        values |= {"prompt": prompt, "response": response}
        texts.append(
            template.format_map({name: escape("" if value is None else str(value)) for name, value in values.items()})
        )
    return texts

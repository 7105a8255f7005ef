"""Building blocks of the config sections: strict types, the `section` decorator and `replace`."""

import dataclasses
import functools
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field

from jaxrlhf.config import schema
from jaxrlhf.config.spelling import did_you_mean
from jaxrlhf.errors import ConfigError, quoted
from jaxrlhf.files import path_problem

T = TypeVar("T")


def _usable_path(path: str) -> str:
    if problem := path_problem(path):
        raise ValueError(f"{quoted(path)} {problem}")
    return path


FilePath = Annotated[str, pydantic.AfterValidator(_usable_path)]
"""A path, or something else of which a path is one kind: a hub id, `path.py:name`."""
Count = Annotated[int, Field(strict=True, ge=1, le=2**53)]  # larger ones are no whole numbers as floats
Natural = Annotated[int, Field(strict=True, ge=0, le=2**53)]
BatchSize = Annotated[int, Field(strict=True, ge=1, le=2**20)]  # far more are a slip, and lists that fill the memory
Passes = Annotated[int, Field(strict=True, ge=1, le=2**16)]  # optimizer steps are counted in 32 bits
Rank = Annotated[int, Field(strict=True, ge=1, le=2**16)]  # no model is so wide, and XLA aborts on sizes far beyond
AxisSize = Annotated[int, Field(strict=True, ge=-1)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]  # PRNG keys keep 32 bits: larger seeds would collide
Bool = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
LearningRate = Annotated[float, Field(strict=True, ge=2**-126, allow_inf_nan=False)]  # smaller ones are 0 in float32
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
PositiveFraction = Annotated[float, Field(strict=True, gt=0, le=1)]
FractionBelowOne = Annotated[float, Field(strict=True, ge=0, lt=1)]
FlipProbability = Annotated[float, Field(strict=True, ge=0, lt=0.5)]
AboveOne = Annotated[float, Field(strict=True, gt=1)]
AutoBool = Annotated[
    Literal["auto", "true", "false"],
    pydantic.BeforeValidator(lambda value: str(value).lower() if isinstance(value, bool) else value),
]
Text = schema.Text
Address = schema.Address
DType = Literal["auto", "float32", "bfloat16"]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """Make `cls` a frozen, keyword-only dataclass that is validated by pydantic and rejects unknown keys.

    Its constructor, and so `dataclasses.replace`, raises ConfigError that lists all problems.
    """
    wrap = pydantic.dataclasses.dataclass(
        frozen=True, kw_only=True, config=ConfigDict(extra="forbid", use_attribute_docstrings=True)
    )
    made = wrap(cls)
    validate = made.__init__

    @functools.wraps(validate)
    def init(self: Any, *args: Any, **options: Any) -> None:
        try:
            validate(self, *args, **options)
        except pydantic.ValidationError as error:
            raise ConfigError(schema.message(made, error)) from None

    made.__init__ = init
    return made  # type: ignore[return-value]


def replace(config: T, **changes: Any) -> T:
    """Return a validated copy of `config` with `changes`. Keys may be dotted: `**{"ppo.kl_coef": 0.1}`. Raises
    ConfigError."""
    fields: dict[str, Any] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        known = dict(schema.keys(type(config)))
        inner = fields.get(head, getattr(config, head, None))
        if head not in known or (rest and not dataclasses.is_dataclass(inner)):
            raise ConfigError(f"unknown key '{key}'{did_you_mean(key, list(known))}")
        fields[head] = replace(inner, **{rest: value}) if rest else value
    return dataclasses.replace(config, **fields)  # type: ignore[type-var]


def constant(value: Any, number: int) -> bool:
    """Return True if `value` is this number, in jitted programs too, where 0 and 1 are static and other numbers are
    traced (`jaxrlhf.traced`)."""
    return isinstance(value, int | float) and value == number


def check_divides(key: str, value: int, of: str, total: int) -> None:
    """Raise ValueError unless the option `key` divides `total`, which the message calls `of`."""
    if total % value:
        nearest = max(n for n in range(1, min(value, total) + 1) if total % n == 0)
        raise ValueError(f"{key} ({value}) must divide {of}; {nearest} would")


def check_used(config: Any, users: dict[str, tuple[str, ...]], choice: str, where: str) -> None:
    """Raise ValueError for an option of `config` that is set although its `users` are choices other than `choice`."""
    for key, choices in users.items():
        value = getattr(config, key)
        if choice not in choices and value != default_of(type(config), key):
            raise ValueError(
                f"{key} ({value!r}) has no meaning {where}, only with {' or '.join(choices)}; leave it out"
            )


def default_of(cls: type, name: str) -> Any:
    """The default of a section's field."""
    return cls.__pydantic_fields__[name].get_default(call_default_factory=True)  # type: ignore[attr-defined]

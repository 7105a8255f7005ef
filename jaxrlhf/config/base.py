"""What the sections of a config are made of: strict types, and a frozen dataclass that refuses unknown keys."""

import dataclasses
from typing import Annotated, Any, Literal, TypeVar, dataclass_transform

import pydantic
from pydantic import ConfigDict, Field

from jaxrlhf.errors import ConfigError

T = TypeVar("T")
Count = Annotated[int, Field(strict=True, ge=1)]
Natural = Annotated[int, Field(strict=True, ge=0)]
Seed = Annotated[int, Field(strict=True, ge=0, lt=2**32)]  # more would be cut to 32 bits, and meet another seed
Bool = Annotated[bool, Field(strict=True)]
Positive = Annotated[float, Field(strict=True, gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(strict=True, ge=0, allow_inf_nan=False)]
Real = Annotated[float, Field(strict=True, allow_inf_nan=False)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
DType = Literal["auto", "float32", "bfloat16"]


@dataclass_transform(kw_only_default=True, frozen_default=True)
def section(cls: type[T]) -> type[T]:
    """A frozen, keyword-only dataclass that pydantic validates and that refuses unknown keys."""
    wrap = pydantic.dataclasses.dataclass(frozen=True, kw_only=True, config=ConfigDict(extra="forbid"))
    return wrap(cls)  # type: ignore[return-value]


def replace(config: T, **changes: Any) -> T:
    """A copy of `config` with `changes`, validated like the first. Keys may be dotted: `**{"ppo.kl_coef": 0.1}`."""
    here: dict[str, Any] = {}
    for key, value in changes.items():
        head, _, rest = key.partition(".")
        if head not in {f.name for f in dataclasses.fields(config)}:  # type: ignore[arg-type]
            raise ConfigError(f"unknown key '{key}'")
        here[head] = replace(here.get(head, getattr(config, head)), **{rest: value}) if rest else value
    return dataclasses.replace(config, **here)  # type: ignore[type-var]


def nearest_divisor(wanted: int, whole: int) -> int:
    """The largest divisor of `whole` that is not above `wanted`."""
    return max(n for n in range(1, wanted + 1) if whole % n == 0)

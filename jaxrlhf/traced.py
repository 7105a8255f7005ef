"""Settings as arguments of jitted programs: their numbers are traced and everything else is static, so that another
learning rate, clip range or temperature runs the program that is there.

Numbers are floats other than 0 and 1: these leave a term or a factor out of a program, and are static. In a program
`config.base.constant` tells them from traced numbers, on which `if` and `==` raise. Integers are static too, as most of
them are sizes, except in the fields that a class is registered with.
"""

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, TypeVar

import jax
from jax.sharding import NamedSharding, PartitionSpec

from jaxrlhf import config
from jaxrlhf.config.base import constant

T = TypeVar("T")
_always: dict[type, tuple[str, ...]] = {}  # the registered classes


class _Node(NamedTuple):
    """A registered class or a tuple in the structure of settings."""

    cls: type
    parts: tuple[Any, ...]


_NUMBER = _Node(float, ())
"""The place of a number in a structure."""
_MEMORY = "_flat"
"""Attribute of settings that have been flattened: their numbers, and their structure."""


def settings(*always: str) -> Callable[[type[T]], type[T]]:
    """A class decorator for frozen dataclasses that jitted programs take as arguments. The fields `always` are traced
    whatever integer or float they are, 0 aside. Settings may hold others, also in tuples."""

    def register(cls: type[T]) -> type[T]:
        _always[cls] = always
        jax.tree_util.register_pytree_node(cls, _flatten, _unflatten)
        return cls

    return register


def place(value: T, mesh: jax.sharding.Mesh) -> T:
    """Settings with their numbers on the devices of a mesh, so that a step takes nothing from the host. They stay
    Python's for a mesh whose devices are not all of this process."""
    if not set(mesh.devices.flat) <= {*jax.local_devices()}:
        return value
    return jax.device_put(value, NamedSharding(mesh, PartitionSpec()))


def _flatten(value: Any) -> tuple[tuple[Any, ...], _Node]:
    known = value.__dict__.get(_MEMORY)
    if known is None:
        numbers: list[Any] = []
        structure = _structure(value, numbers)
        known = tuple(numbers), structure
        object.__setattr__(value, _MEMORY, known)
    return known


def _unflatten(structure: _Node, numbers: Any) -> Any:
    numbers = tuple(numbers)
    value = _joined(structure, iter(numbers))
    object.__setattr__(value, _MEMORY, (numbers, structure))
    return value


def _structure(value: Any, numbers: list[Any], *, always: bool = False) -> Any:
    """The structure of a value, hashable; its numbers are appended to `numbers`."""
    if isinstance(value, tuple):
        return _Node(type(value), tuple(_structure(part, numbers) for part in value))
    if type(value) in _always:
        names = [field.name for field in dataclasses.fields(value)]
        parts = (_structure(getattr(value, name), numbers, always=name in _always[type(value)]) for name in names)
        return _Node(type(value), tuple(parts))
    number = isinstance(value, jax.Array | float) or (always and isinstance(value, int))
    if not number or constant(value, 0) or (constant(value, 1) and not always):
        return value
    numbers.append(value)
    return _NUMBER


def _joined(structure: Any, numbers: Iterator[Any]) -> Any:
    """The inverse of `_structure`, without the checks of constructors, which are for Python's numbers."""
    if structure == _NUMBER:
        return next(numbers)
    if not isinstance(structure, _Node):
        return structure
    parts = [_joined(part, numbers) for part in structure.parts]
    if structure.cls not in _always:
        return structure.cls(*parts) if hasattr(structure.cls, "_fields") else tuple(parts)
    value = object.__new__(structure.cls)
    for field, part in zip(dataclasses.fields(value), parts, strict=True):
        object.__setattr__(value, field.name, part)
    return value


@settings()
@dataclasses.dataclass(frozen=True)
class Number:
    """Settings that are a single number."""

    value: float


for section, always in {
    config.PPO: ("total_episodes", "num_train_epochs"),
    config.GRPO: ("total_episodes", "num_train_epochs", "max_refills"),
    config.DPO: (),
    config.Distill: (),
    config.Reference: ("sync_every",),
    config.Sampling: ("min_length", "top_k"),
    config.Scores: ("overlong_buffer",),
}.items():
    settings(*always)(section)

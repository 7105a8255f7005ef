"""Checked reading of values from a config.json; every error names the file, the key and the value."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from jaxrlhf.errors import DataError, quoted


@dataclass(frozen=True)
class Fields:
    """A JSON object and its location for messages. As in transformers, null counts as absent.

    Without a default the key is required, unless a method says otherwise. All methods raise DataError.
    """

    values: dict[str, Any]
    where: str

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise the DataError that `key` is not `expected`."""
        actual = f"is {quoted(self.values[key], 200)}" if key in self.values else "is missing"
        raise DataError(f"{self.where}: {key} {actual}; expected {expected}")

    def refuse_if_set(self, key: str, advice: str) -> None:
        """Refuse a truthy value: an option that is not implemented."""
        if self.values.get(key):
            raise DataError(f"{self.where}: {key} is {quoted(self.values[key], 200)}, which is not supported; {advice}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        return self._get(key, default, lambda v: type(v) is int and v >= 1, "a whole number of at least 1")

    def number(self, key: str, default: float | None = None, least: float | None = None) -> float:
        """A finite number above 0, or of at least `least`."""
        expected = "a number above 0" if least is None else f"a number of at least {least}"
        self._get(key, default, lambda v: type(v) in (int, float) and v < float("inf"), "a number")
        return float(self._get(key, default, lambda v: v > 0 if least is None else v >= least, expected))

    def boolean(self, key: str, default: bool) -> bool:
        return self._get(key, default, lambda v: isinstance(v, bool), "true or false")

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str | None:
        """One of `allowed`; an absent key gives the default."""
        return self._get(key, default, lambda v: v is default or v in allowed, f"one of {', '.join(allowed)}")

    def strings(self, key: str) -> list[str]:
        """A list of strings, empty if the key is absent."""

        def is_strings(value: Any) -> bool:
            return isinstance(value, list) and all(isinstance(item, str) for item in value)

        return self._get(key, [], is_strings, "a list of strings")

    def numbers(self, key: str, count: int) -> tuple[float, ...]:
        """A list of `count` finite numbers above 0."""

        def is_numbers(value: Any) -> bool:
            usable = isinstance(value, list) and all(type(v) in (int, float) and 0 < v < float("inf") for v in value)
            return usable and len(value) == count

        return tuple(map(float, self._get(key, None, is_numbers, f"a list of {count} numbers above 0")))

    def mapping(self, key: str) -> dict[str, Any]:
        """A JSON object, empty if the key is absent."""
        return self._get(key, {}, lambda v: isinstance(v, dict), "a JSON object")

    def _get(self, key: str, default: Any, is_valid: Callable[[Any], bool], expected: str) -> Any:
        value = self.values.get(key)
        value = default if value is None else value
        if not is_valid(value):
            self.refuse(key, expected)
        return value

"""Checked reading of values from a config.json; every error names the file, the key and the value."""

from dataclasses import dataclass
from typing import Any, NoReturn

from jaxrlhf.errors import DataError


@dataclass(frozen=True)
class Fields:
    """A JSON object and its location for messages. As in transformers, null counts as absent.

    Without a default the key is required, unless a method says otherwise. All methods raise DataError.
    """

    values: dict[str, Any]
    where: str

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raise the DataError that `key` is not `expected`."""
        actual = f"is {self.values[key]!r}" if key in self.values else "is missing"
        raise DataError(f"{self.where}: {key} {actual}; expected {expected}")

    def refuse_if_set(self, key: str, advice: str) -> None:
        """Refuse a truthy value: an option that is not implemented."""
        if self.values.get(key):
            raise DataError(f"{self.where}: {key} is {self.values[key]!r}, which is not supported; {advice}")

    def has(self, key: str) -> bool:
        return self.values.get(key) is not None

    def integer(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1."""
        value = self._get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None, least: float | None = None) -> float:
        """A finite number above 0, or of at least `least`."""
        value = self._get(key, default)
        if not isinstance(value, int | float) or isinstance(value, bool) or not value < float("inf"):
            self.refuse(key, "a number")
        if value <= 0 if least is None else value < least:
            self.refuse(key, "a number above 0" if least is None else f"a number of at least {least}")
        return float(value)

    def boolean(self, key: str, default: bool) -> bool:
        value = self._get(key, default)
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str | None:
        """One of `allowed`; an absent key gives the default."""
        value = self.values.get(key)
        if value is not None and value not in allowed:
            self.refuse(key, f"one of {', '.join(allowed)}")
        return default if value is None else value

    def strings(self, key: str) -> list[str]:
        """A list of strings, empty if the key is absent."""
        value = self._get(key, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            self.refuse(key, "a list of strings")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A JSON object, empty if the key is absent."""
        value = self._get(key, {})
        if not isinstance(value, dict):
            self.refuse(key, "a JSON object")
        return value

    def _get(self, key: str, default: Any) -> Any:
        value = self.values.get(key)
        return default if value is None else value

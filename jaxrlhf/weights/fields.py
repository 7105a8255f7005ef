"""Reading values out of a config.json that a person may have edited: every complaint names file, key and value."""

from dataclasses import dataclass
from typing import Any, NoReturn

from jaxrlhf.errors import DataError


@dataclass(frozen=True)
class Fields:
    """A JSON object and the name of where it stands. A key that is null counts as absent, as in transformers."""

    values: dict[str, Any]
    where: str

    def refuse(self, key: str, expected: str) -> NoReturn:
        """Raises the DataError that `key` is not `expected`."""
        found = f"is {self.values[key]!r}" if key in self.values else "is missing"
        raise DataError(f"{self.where}: {key} {found}; expected {expected}")

    def has(self, key: str) -> bool:
        """Whether `key` has a value."""
        return self.values.get(key) is not None

    def count(self, key: str, default: int | None = None) -> int:
        """A whole number of at least 1; without a default the key must be there."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            self.refuse(key, "a whole number of at least 1")
        return value

    def number(self, key: str, default: float | None = None, least: float | None = None) -> float:
        """A number above 0, or of at least `least`; without a default the key must be there."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, int | float) or isinstance(value, bool) or not value < float("inf"):
            self.refuse(key, "a number")
        if value <= 0 if least is None else value < least:
            self.refuse(key, "a number above 0" if least is None else f"a number of at least {least}")
        return float(value)

    def flag(self, key: str, default: bool) -> bool:
        """true or false."""
        value = self.values.get(key)
        value = default if value is None else value
        if not isinstance(value, bool):
            self.refuse(key, "true or false")
        return value

    def choice(self, key: str, allowed: tuple[str, ...], default: str | None = None) -> str | None:
        """One of `allowed`, or the default where the key is absent."""
        value = self.values.get(key)
        if value is None:
            return default
        if value not in allowed:
            self.refuse(key, f"one of {', '.join(allowed)}")
        return value

    def names(self, key: str) -> list[str]:
        """A list of strings, empty where the key is absent."""
        value = self.values.get(key)
        if value is None:
            return []
        if not isinstance(value, list) or not all(isinstance(name, str) for name in value):
            self.refuse(key, "a list of strings")
        return value

    def mapping(self, key: str) -> dict[str, Any]:
        """A JSON object, empty where the key is absent."""
        value = self.values.get(key)
        if value is None:
            return {}
        if not isinstance(value, dict):
            self.refuse(key, "a JSON object")
        return value

    def refuse_set(self, key: str, advice: str) -> None:
        """Raises DataError if `key` switches something on that is not implemented."""
        if self.values.get(key):
            raise DataError(f"{self.where}: {key} is {self.values[key]!r}, which is not supported; {advice}")

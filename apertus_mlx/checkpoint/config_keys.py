"""Typed, bounded reading of a JSON object's keys, and the account of which keys were read."""

from __future__ import annotations

from collections.abc import Mapping, Set
from typing import Any, TypeVar

from apertus_mlx.errors import RejectedError

T = TypeVar("T")


class KeyReader:
    """Reads each key of `values` once, by type; `refuse_unread` then names what nobody read.

    Errors name the file, the key, what was expected and what was found.
    """

    def __init__(self, values: Mapping[str, Any], name: str) -> None:
        self._values = values
        self._name = name
        self._read: set[str] = set()

    def __contains__(self, key: str) -> bool:
        return self._values.get(key) is not None

    def integer(self, key: str, low: int, high: int) -> int:
        """A required integer in `[low, high]`; booleans, strings and fractions are refused."""
        return self._required(key, self.optional_integer(key, low, high))

    def optional_integer(self, key: str, low: int, high: int) -> int | None:
        """An integer in `[low, high]`, or None where the key is absent or null."""
        value = self._take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int):
            raise self.error(key, "an integer", value)
        if not low <= value <= high:
            raise self.error(key, f"an integer from {low} to {high}", value)
        return value

    def number(self, key: str, low: float, high: float) -> float:
        """A required finite number in `(low, high]`; integers are accepted as numbers."""
        return self._required(key, self.optional_number(key, low, high))

    def optional_number(self, key: str, low: float, high: float) -> float | None:
        """A finite number in `(low, high]`, or None where the key is absent or null."""
        value = self._take(key)
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise self.error(key, "a number", value)
        # Neither NaN nor infinity passes, and an integer of any size can be compared.
        if not low < value <= high:
            raise self.error(key, f"a number above {low} and up to {high}", value)
        return float(value)

    def optional_boolean(self, key: str) -> bool | None:
        """A JSON boolean, or None where the key is absent or null."""
        return self._typed(key, bool, "true or false")

    def text(self, key: str) -> str:
        """A required JSON string."""
        return self._required(key, self.optional_text(key))

    def optional_text(self, key: str) -> str | None:
        """A JSON string, or None where the key is absent or null."""
        return self._typed(key, str, "a string")

    def either_text(self, key: str, older: str) -> str | None:
        """A text under one of two keys, or the same under both."""
        new, old = self.optional_text(key), self.optional_text(older)
        if new and old and new != old:
            raise RejectedError(f"{self._name}: {key} {new!r} and {older} {old!r} disagree")
        return new or old

    def mapping(self, key: str) -> Mapping[str, Any] | None:
        """A JSON object, or None where the key is absent or null."""
        return self._typed(key, dict, "an object or null")

    def integers(self, key: str, low: int, high: int) -> tuple[int, ...]:
        """An integer or a list of integers, as a tuple; empty where absent or null."""
        value = self._take(key)
        items = [] if value is None else value if isinstance(value, list) else [value]
        for item in items:
            if isinstance(item, bool) or not isinstance(item, int):
                raise self.error(key, "an integer or a list of integers", value)
            if not low <= item <= high:
                raise self.error(key, f"ids from {low} to {high}", value)
        return tuple(items)

    def ignore(self, keys: Set[str]) -> None:
        """Mark keys that cannot change what the model computes."""
        self._read.update(keys)

    def unread(self) -> list[str]:
        """The keys that nothing has read, but for comments (`_...`) and those that are null."""
        return sorted(
            key
            for key in self._values.keys() - self._read
            if not key.startswith("_") and self._values[key] is not None
        )

    def refuse_unread(self) -> None:
        """Refuse the first keys that nothing has read: they may change the model's meaning."""
        if unread := self.unread():
            shown = ", ".join(repr(key[:60]) for key in unread[:10])
            raise RejectedError(
                f"{self._name}: not an Apertus we implement: unknown key {shown}; "
                "remove it only if it does not change what the model computes"
            )

    def error(self, key: str, expected: str, value: object) -> RejectedError:
        """The error for a key whose value is not what is expected."""
        return RejectedError(f"{self._name}: {key}: expected {expected}, found {_shown(value)}")

    def _take(self, key: str) -> Any:
        self._read.add(key)
        return self._values.get(key)

    def _typed(self, key: str, kind: type[T], expected: str) -> T | None:
        value = self._take(key)
        if value is not None and not isinstance(value, kind):
            raise self.error(key, expected, value)
        return value

    def _required(self, key: str, value: T | None) -> T:
        if value is None:
            state = "null" if key in self._values else "missing"
            raise RejectedError(f"{self._name}: {key}: required, but {state}")
        return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."

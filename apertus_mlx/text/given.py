"""Values that a request brings, each with its place, such as `messages[3].tool_call_id`."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

from apertus_mlx.errors import UsageError, WrongTypeError

MAX_DEPTH = 64
MAX_ITEMS = 1_000_000
FUNCTION_NAME = re.compile("[a-zA-Z0-9_-]{1,64}")
# A model may call what is no function, such as `functions.f`. Templates write it as it is.
CALLED_NAME = re.compile('[^"\\\\\x00-\x1f\x7f\ud800-\udfff]{1,64}')
_SURROGATE = re.compile("[\ud800-\udfff]")
# Without those that stand for bytes of no UTF-8, which the tokenizer writes as these bytes.
_NO_BYTE = re.compile("[\ud800-\udc7f\udd00-\udfff]")


@dataclass(frozen=True, slots=True)
class Given:
    """A value and its place, with which every message about it begins."""

    value: Any
    place: str

    def __getitem__(self, key: str) -> Given:
        """Return what an object holds under `key`; without it, None."""
        self.object()
        return Given(self.value.get(key), f"{self.place}.{key}")

    def refuse(self, words: str) -> NoReturn:
        """Refuse the value: `words` continue its place."""
        raise UsageError(f"{self.place}: {words}")

    def object(self) -> Mapping[str, Any]:
        """Return the value, an object of JSON."""
        if not isinstance(self.value, Mapping):
            self._wrong("an object")
        return self.value

    def list(self, words: str = "a list") -> list[Given]:
        """Return the items of the value, a list; `words` are what is expected."""
        if not isinstance(self.value, Sequence) or isinstance(self.value, str | bytes | bytearray):
            self._wrong(words)
        return [Given(item, f"{self.place}[{index}]") for index, item in enumerate(self.value)]

    def text(self, words: str = "a text") -> str:
        """Return the value, a text that may hold bytes of no UTF-8 as `surrogateescape` has them.

        `words` are what is expected.
        """
        if not isinstance(self.value, str):
            self._wrong(words)
        if found := _NO_BYTE.search(self.value):
            self.refuse(f"holds a lone surrogate ({found.group()!r}), which is no character")
        return self.value

    def called_name(self) -> str:
        """Return the value, the name in a call."""
        text = self.text()
        if not CALLED_NAME.fullmatch(text):
            self.refuse(f"{text[:64]!r}: expected 1 to 64 characters without quotes or controls")
        return text

    def name(self) -> str:
        """Return the value, the name of a function."""
        text = self.text()
        if not FUNCTION_NAME.fullmatch(text):
            self.refuse(f"{text[:64]!r}: expected 1 to 64 of the characters a-z A-Z 0-9 _ -")
        return text

    def json(self) -> str:
        """Return the value in JSON, if it is data: no deeper than `MAX_DEPTH`, without NaN."""
        self._weigh()
        try:
            text = json.dumps(self.value, ensure_ascii=False, allow_nan=False, default=_plain)
        except ValueError:
            self.refuse("holds an integer of thousands of digits")
        if found := _SURROGATE.search(text):
            self.refuse(f"holds a lone surrogate ({found.group()!r}), which is no character")
        return text

    def _weigh(self) -> None:
        """Refuse what is no data."""
        level, count = [self], 0
        for _ in range(MAX_DEPTH):
            count += len(level)
            if count > MAX_ITEMS:
                break
            inner: list[Given] = []
            for each in level:
                value = each.value
                if isinstance(value, Mapping):
                    if wrong := [key for key in value if not isinstance(key, str)]:
                        raise WrongTypeError(f"{each.place}: has a key {wrong[0]!r:.40}, no text")
                    inner += [each[key] for key in value]
                elif isinstance(value, float) and not abs(value) < float("inf"):
                    each.refuse(f"{value} is no number of JSON")
                elif not isinstance(value, str | int | float | None):
                    inner += each.list("data as JSON has it")
            level = inner
            if not level:
                return
        self.refuse(f"is nested more than {MAX_DEPTH} deep, holds itself, or is too large")

    def _wrong(self, expected: str) -> NoReturn:
        found = "null" if self.value is None else type(self.value).__name__
        raise WrongTypeError(f"{self.place}: expected {expected}, not {found}")


def _plain(value: Any) -> Any:
    """Return what is like an object or a list as one, for `json`."""
    return dict(value) if isinstance(value, Mapping) else list(value)

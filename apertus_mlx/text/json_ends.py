"""Where a JSON object or string ends, in a text that comes in pieces."""

from __future__ import annotations

import json
import re

from apertus_mlx.system.strict_json import parse_object

MAX_DEPTH = 64
BLANKS = " \t\r\n"

_STRING = re.compile(r'[^"\\]*')
_OUTSIDE = re.compile(r'[^"{}\[\]]*')
_BEGUN_ESCAPE = re.compile(r"\\(?:u[0-9a-fA-F]{0,3})?\Z")
_HALF_OF_PAIR = re.compile("[\ud800-\udbff]\\Z")
_PAIRS = {"}": "{", "]": "["}


class JsonObject:
    """Finds the end of a JSON object: brackets and strings, not yet whether it is valid.

    Attributes:
        is_wrong: a bracket closes another kind, or they are nested too deeply.
    """

    def __init__(self) -> None:
        self._open: list[str] = []
        self._string: JsonString | None = None
        self.is_wrong = False

    @property
    def closed(self) -> bool:
        """Whether all brackets so far are closed."""
        return not self._open

    def read(self, text: str, start: int) -> int:
        """Go on at `start`; returns where the object ends, or what is wrong, or the text."""
        while start < len(text):
            if self._string is not None:
                start = self._string.read(text, start)
                if self._string.closed:
                    self._string = None
                continue
            start = end_of(_OUTSIDE, text, start)
            if start == len(text):
                break
            character = text[start]
            start += 1
            if character == '"':
                self._string = JsonString()
            elif character in "{[":
                self._open.append(character)
                self.is_wrong = len(self._open) > MAX_DEPTH
            else:
                self.is_wrong = self._open.pop() != _PAIRS[character]
            if self.is_wrong or not self._open:
                break
        return start


class JsonString:
    """Finds the end of a JSON string; begins after its quote.

    Attributes:
        closed: the quote that ends it has been read.
    """

    def __init__(self) -> None:
        self._escaped = False
        self._parts: list[str] = []
        self.closed = False

    def read(self, text: str, start: int) -> int:
        """Go on at `start`; returns where the string, or the text, ends."""
        begin = start
        while start < len(text) and not self.closed:
            if self._escaped:
                self._escaped = False
            else:
                start = end_of(_STRING, text, start)
                if start == len(text):
                    break
                self._escaped = text[start] == "\\"
                self.closed = not self._escaped
            start += 1
        self._parts.append(text[begin : start - self.closed])
        return start

    def value(self) -> str:
        """What it says; of a string that is not closed, the characters that are whole.

        Raises:
            ValueError: it is no valid JSON, or no text.
        """
        text = "".join(self._parts)
        if not self.closed and (escape := _BEGUN_ESCAPE.search(text[-5:])):
            before = text[: len(text) - len(escape[0])]
            if (len(before) - len(before.rstrip("\\"))) % 2 == 0:
                text = before
        value: str = json.loads(f'"{text}"')
        if not self.closed:
            value = _HALF_OF_PAIR.sub("", value)
        value.encode()
        return value


def require_object(text: str) -> None:
    """Refuse a text that is no JSON object.

    Raises:
        RejectedError, ValueError: it is none.
    """
    inner = text.strip(BLANKS)
    scanned = JsonObject()
    if not inner.startswith("{") or scanned.read(inner, 0) < len(inner) or not scanned.closed:
        raise ValueError("no object, or nested too deeply")
    parse_object(inner.encode(), "arguments")


def end_of(pattern: re.Pattern[str], text: str, start: int) -> int:
    """Return where a match of `pattern` at `start` ends; `start` if there is none."""
    found = pattern.match(text, start)
    return found.end() if found else start

"""The JSON of a block of tool calls, read as it comes: `[{"NAME": {ARGUMENTS}}, ...]`.

What a call is: an object with one key, the tool's name, whose value is an object, null for none, or
a string with the text of an object. A block is a list of calls, or one call alone.
"""

from __future__ import annotations

import enum
import re
from collections.abc import Callable, Collection

from apertus_mlx.errors import RejectedError
from apertus_mlx.system.strict_json import parse_object
from apertus_mlx.text.given import CALLED_NAME
from apertus_mlx.text.json_ends import BLANKS, JsonObject, JsonString, end_of, require_object
from apertus_mlx.text.pieces import CallPiece

MAX_BLOCK_BYTES = 2**20

_SPACE = re.compile(f"[{BLANKS}]*")


class _Expects(enum.Enum):
    """What may come next."""

    BLOCK = enum.auto()
    FIRST_CALL = enum.auto()
    CALL = enum.auto()
    KEY = enum.auto()
    NAME = enum.auto()
    COLON = enum.auto()
    VALUE = enum.auto()
    OBJECT = enum.auto()
    STRING = enum.auto()
    NULL = enum.auto()
    CALL_END = enum.auto()
    COMMA = enum.auto()
    NOTHING = enum.auto()


# By what is expected: which characters may come, and what is expected after each.
_STEPS = {
    _Expects.BLOCK: {"[": _Expects.FIRST_CALL, "{": _Expects.KEY},
    _Expects.FIRST_CALL: {"{": _Expects.KEY, "]": _Expects.NOTHING},
    _Expects.CALL: {"{": _Expects.KEY},
    _Expects.KEY: {'"': _Expects.NAME, "}": _Expects.COMMA},
    _Expects.COLON: {":": _Expects.VALUE},
    _Expects.VALUE: {"{": _Expects.OBJECT, '"': _Expects.STRING, "n": _Expects.NULL},
    _Expects.CALL_END: {"}": _Expects.COMMA},
    _Expects.COMMA: {",": _Expects.CALL, "]": _Expects.NOTHING},
    _Expects.NOTHING: {},
}


class CallScanner:
    """Reads one block; each character is looked at once, and checked again when its call is whole.

    The last brace of a call's arguments is held back until the call has proved valid.

    Attributes:
        failed: the block is malformed; nothing more is read.
        rest: then, all text since the last whole call.
        index: of the next call.
    """

    def __init__(
        self, index: int, new_id: Callable[[], str], names: Collection[str] | None = None
    ) -> None:
        """Start a block.

        Args:
            index: of its first call.
            new_id: makes the id of a call.
            names: the block has to be a list of calls with these names; None for any names, and a
                call alone.
        """
        self.failed = False
        self.rest = ""
        self.index = index
        self._first = index
        self._new_id = new_id
        self._names = names
        self._expects = _Expects.BLOCK
        self._is_list = False
        self._bytes = 0
        self._unsettled: list[str] = []
        self._settled = 0
        self._begin("")

    def _begin(self, name: str) -> None:
        self._name = name
        self._opened = False
        self._object: JsonObject | None = None
        self._string = JsonString()
        self._value: list[str] = []
        self._null = ""

    @property
    def is_whole(self) -> bool:
        """Whether all that was opened is closed, and there is at least one call."""
        return self._expects is _Expects.NOTHING and self.index > self._first

    def feed(self, text: str) -> list[CallPiece]:
        """Read on; returns what is certain of the calls now."""
        pieces: list[CallPiece] = []
        self._bytes += len(text.encode())
        if self._bytes > MAX_BLOCK_BYTES:
            self._fail(pieces)
        position = self._settled = 0
        while position < len(text) and not self.failed:
            position = self._read(text, position, pieces)
        self._unsettled.append(text[self._settled :])
        if self.failed:
            self.rest = "".join(self._unsettled)
        return pieces

    def finish(self, cut: bool) -> list[CallPiece]:
        """End the block; if it was cut, its last call ends as far as it has come."""
        pieces: list[CallPiece] = []
        if cut:
            self._cut(pieces)
        elif self._expects not in (_Expects.BLOCK, _Expects.NOTHING):
            self._fail(pieces)
        if self.failed:
            self.rest = "".join(self._unsettled)
        return pieces

    def _read(self, text: str, start: int, pieces: list[CallPiece]) -> int:
        """Read one thing; returns where it ends."""
        if self._expects is _Expects.NAME:
            return self._read_name(text, start, pieces)
        if self._expects is _Expects.OBJECT:
            return self._read_object(text, start, pieces)
        if self._expects is _Expects.STRING:
            start = self._string.read(text, start)
            if self._string.closed:
                self._expects = _Expects.CALL_END
            return start
        if self._expects is _Expects.NULL:
            self._null += text[start]
            if not "null".startswith(self._null):
                self._fail(pieces)
            elif self._null == "null":
                self._expects = _Expects.CALL_END
            return start + 1
        start = end_of(_SPACE, text, start)
        return self._step(text[start], start, pieces) if start < len(text) else start

    def _step(self, character: str, start: int, pieces: list[CallPiece]) -> int:
        """Read a character between names and values; returns where it ends."""
        before = self._expects
        following = _STEPS[before].get(character)
        if following is None or (following is _Expects.KEY and self._is_bare_object(before)):
            self._fail(pieces)
            return start
        self._expects = following
        if before is _Expects.BLOCK:
            self._is_list = character == "["
        elif following is _Expects.NAME:
            self._begin("")
        elif following is _Expects.OBJECT:
            self._object = JsonObject()
            self._open(pieces)
        elif before is _Expects.CALL_END:
            self._close(pieces)
        if following is _Expects.COMMA and not self._is_list:
            self._expects = _Expects.NOTHING
        if following in (_Expects.COMMA, _Expects.NOTHING) and not self.failed:
            self._unsettled.clear()
            self._settled = start + 1
        # An object and null begin with the character that tells them.
        return start if following in (_Expects.OBJECT, _Expects.NULL) else start + 1

    def _is_bare_object(self, before: _Expects) -> bool:
        return before is _Expects.BLOCK and self._names is not None

    def _read_name(self, text: str, start: int, pieces: list[CallPiece]) -> int:
        start = self._string.read(text, start)
        if self._string.closed:
            try:
                self._begin(self._string.value())
            except ValueError:
                self._name = ""
            self._expects = _Expects.COLON
            # A later prompt could not say another name.
            if not CALLED_NAME.fullmatch(self._name) or (
                self._names is not None and self._name not in self._names
            ):
                self._fail(pieces)
        return start

    def _read_object(self, text: str, start: int, pieces: list[CallPiece]) -> int:
        assert self._object is not None
        end = self._object.read(text, start)
        self._value.append(text[start:end])
        if self._object.is_wrong:
            self._fail(pieces)
        elif certain := text[start : end - self._object.closed]:
            pieces.append(CallPiece(self.index, arguments=certain))
        if self._object.closed:
            self._expects = _Expects.CALL_END
        return end

    def _open(self, pieces: list[CallPiece]) -> None:
        self._opened = True
        pieces.append(CallPiece(self.index, self._new_id(), self._name))

    def _close(self, pieces: list[CallPiece]) -> None:
        """End a call whose value is whole, if it is valid."""
        last = "}"
        try:
            if self._object is not None:
                parse_object("".join(self._value).encode(), "arguments")
            elif self._null:
                last = "{}"
            else:
                last = self._string.value()
                require_object(last)
        except (RejectedError, ValueError):
            self._fail(pieces)
            return
        if not self._opened:
            self._open(pieces)
        pieces.append(CallPiece(self.index, arguments=last))
        self.index += 1
        self._begin("")

    def _cut(self, pieces: list[CallPiece]) -> None:
        """End a call in the middle; without a whole name there is none."""
        if self._expects is _Expects.CALL_END:
            self._close(pieces)
        elif self._expects is _Expects.STRING:
            try:
                text = self._string.value()
            except ValueError:
                self._fail(pieces)
                return
            if text.strip(BLANKS) and not text.lstrip(BLANKS).startswith("{"):
                self._fail(pieces)
                return
            self._open(pieces)
            if text:
                pieces.append(CallPiece(self.index, arguments=text))
        elif self._expects in (_Expects.COLON, _Expects.VALUE, _Expects.NULL):
            self._open(pieces)

    def _fail(self, pieces: list[CallPiece]) -> None:
        self.failed = True
        if self._opened:
            pieces.append(CallPiece(self.index, withdrawn=True))
            self.index += 1
            self._opened = False

"""Generated token ids to pieces of answer, thought and tool call; ids decide, not spelling."""

from __future__ import annotations

import secrets
import string
from collections.abc import Callable, Collection, Sequence

from apertus_mlx.text.call_scanner import CallScanner
from apertus_mlx.text.pieces import CallPiece, Piece
from apertus_mlx.text.roles import Role
from apertus_mlx.text.stream import StopStrings, TextStream
from apertus_mlx.text.tokenizer import Tokenizer

_ID_ALPHABET = string.ascii_letters + string.digits
_ID_LENGTH = 24


def new_call_id() -> str:
    """Return a call's id that no other call has."""
    return "call_" + "".join(secrets.choice(_ID_ALPHABET) for _ in range(_ID_LENGTH))


class AnswerParser:
    """Splits what a model writes, id by id, into pieces; control tokens are never text.

    Stop strings end the answer alone; a thought or an argument may well hold one.

    Attributes:
        stopped: a stop string was found; further ids are ignored.
        stop_string: which one; None: none.
        ended_with_calls: the answer has ended, and the last of it are calls that are whole.
        malformed: how many calls were no valid JSON; what the model wrote is text then.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        *,
        thinking: bool = False,
        tool_names: Collection[str] | None = None,
        new_id: Callable[[], str] = new_call_id,
    ) -> None:
        """Start at the beginning of an answer.

        Args:
            tokenizer: whose ids are pushed.
            stop_strings: the answer ends before the first of them.
            thinking: the prompt leaves a deliberation open.
            tool_names: an answer that is nothing but a list of calls of these tools is one, though
                no control token says so. Text is held back while it can still become one.
            new_id: makes the id of a call.

        Raises:
            UsageError: a stop string is empty.
        """
        self.stopped = False
        self.ended_with_calls = False
        self.malformed = 0
        self._tokenizer = tokenizer
        self._stop_strings = stop_strings
        self._names = tool_names
        self._new_id = new_id
        self._thinking = thinking
        self._calls = 0
        self._begin()

    @property
    def stop_string(self) -> str | None:
        """See the class."""
        return self._stops.found

    def push(self, token_id: int) -> list[Piece]:
        """Take the next id; returns what is certain now."""
        roles = self._tokenizer.roles
        if self.stopped or (token_id == Role.TOOLS.end and self._block is None):
            return []
        self.ended_with_calls = False
        is_thought = token_id in roles.thought_starts
        if is_thought or token_id in roles.thought_ends:
            pieces = self._end()
            self._thinking = is_thought
            self._begin()
        elif token_id == Role.TOOLS.start:
            pieces = self._end()
            self._begin(CallScanner(self._calls, self._new_id))
        elif token_id == Role.TOOLS.end:
            pieces = self._end()
            self._begin()
        else:
            return self._take(self._text.push(token_id))
        return pieces

    def finish(self, cut: bool = False) -> list[Piece]:
        """Return what was held back: no id follows, though the model would go on if `cut`."""
        if self.stopped:
            return []
        pieces = self._end(cut, last=True)
        self.stopped = True
        return pieces

    def _begin(self, block: CallScanner | None = None) -> None:
        """Start the part that a control token opens."""
        self._text = TextStream(self._tokenizer)
        self._stops = StopStrings(self._stop_strings)
        self._block = block
        self._bare: _BareCalls | None = None
        if self._names and block is None:
            self._bare = _BareCalls(CallScanner(self._calls, self._new_id, self._names))

    def _take(self, text: str) -> list[Piece]:
        if not text:
            return []
        if self._block is not None:
            return self._from_block(self._block, self._block.feed(text))
        if self._thinking:
            return [Piece(text, is_thought=True)]
        if self._bare is not None:
            if self._bare.take(text):
                return []
            text, self._bare = self._bare.text, None
        return self._answer(text)

    def _answer(self, text: str) -> list[Piece]:
        text = self._stops.push(text)
        self.stopped = self._stops.stopped
        return [Piece(text)] if text else []

    def _from_block(self, block: CallScanner, calls: list[CallPiece]) -> list[Piece]:
        """Return the pieces of calls, and of a malformed block the rest, as the text it is."""
        pieces = [Piece("", call=call) for call in calls]
        self._calls = block.index
        if block.failed:
            self.malformed += 1
            self._block = None
            pieces += self._take(block.rest)
        return pieces

    def _end(self, cut: bool = False, last: bool = False) -> list[Piece]:
        """Return what was held back of a part; a character that is cut is left out."""
        pieces = [] if cut else self._take(self._text.finish())
        if self._block is not None:
            self.ended_with_calls = self._block.is_whole
            pieces += self._from_block(self._block, self._block.finish(cut))
        elif self._bare is not None:
            if last and self._bare.scanner.is_whole:
                self.ended_with_calls = True
                pieces += self._from_block(self._bare.scanner, self._bare.calls)
            else:
                pieces += self._answer(self._bare.text)
        if not self._thinking and (text := self._stops.finish()):
            pieces.append(Piece(text))
        return pieces


class _BareCalls:
    """The beginning of an answer that may turn out to be a list of calls."""

    def __init__(self, scanner: CallScanner) -> None:
        self.scanner = scanner
        self.calls: list[CallPiece] = []
        self._texts: list[str] = []

    def take(self, text: str) -> bool:
        """Take more of the answer; returns whether it can still become calls."""
        self._texts.append(text)
        self.calls += self.scanner.feed(text)
        return not self.scanner.failed

    @property
    def text(self) -> str:
        return "".join(self._texts)

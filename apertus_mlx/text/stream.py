"""Generated token ids to text as it becomes certain, and stop strings in it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from apertus_mlx.errors import UsageError
from apertus_mlx.text.tokenizer import Tokenizer


class TextStream:
    """Turns token ids into text, never showing a broken character or a part of a stop string.

    The texts that `push` and `finish` return make up the decoded text of all ids, cut before the
    first stop string. The work per token does not grow with the length of the text.
    """

    def __init__(self, tokenizer: Tokenizer, stop_strings: Sequence[str] = ()):
        """Start an empty stream.

        Args:
            tokenizer: Whose ids are pushed.
            stop_strings: The text ends before the first of them.

        Raises:
            UsageError: a stop string is empty.
        """
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = StopStrings(stop_strings)

    @property
    def stopped(self) -> bool:
        """Whether a stop string was found; further tokens are ignored."""
        return self._stops.stopped

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now."""
        if token_id in self._tokenizer.special_ids:
            return ""
        return self._stops.push(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """Return what was held back: no token follows."""
        return self._stops.push(self._utf8.decode(b"", final=True)) + self._stops.finish()


class StopStrings:
    """Cuts a text that comes in pieces before the first stop string in it.

    Attributes:
        stopped: A stop string was found, or the text has ended; further text is ignored.
        found: The stop string that was found; None: none.
    """

    def __init__(self, stop_strings: Sequence[str]):
        """Start with an empty text.

        Raises:
            UsageError: a stop string is empty.
        """
        if "" in stop_strings:
            raise UsageError("a stop string must not be empty")
        self.stopped = False
        self.found: str | None = None
        self._stops = tuple(stop_strings)
        self._held = ""

    def push(self, text: str) -> str:
        """Take more text; return what is certain now."""
        if self.stopped:
            return ""
        text = self._held + text
        found = [(at + len(stop), at) for stop in self._stops if (at := text.find(stop)) >= 0]
        if found:
            self.stopped = True
            end, at = min(found)
            self.found = text[at:end]
            return text[:at]
        held = max((_overlap(text, stop) for stop in self._stops), default=0)
        self._held = text[len(text) - held :]
        return text[: len(text) - held]

    def finish(self) -> str:
        """Return what was held back: no text follows."""
        if self.stopped:
            return ""
        self.stopped = True
        return self._held


def _overlap(text: str, stop: str) -> int:
    """Return the length of the longest end of `text` that begins `stop`."""
    lengths = range(min(len(text), len(stop) - 1), 0, -1)
    return next((n for n in lengths if stop.startswith(text[-n:])), 0)

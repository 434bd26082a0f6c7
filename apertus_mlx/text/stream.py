"""Generated token ids to text as it becomes certain, and stop strings in it."""

from __future__ import annotations

import codecs
from collections.abc import Sequence

from apertus_mlx.errors import UsageError
from apertus_mlx.text.tokenizer import Tokenizer


class TextStream:
    """Turns token ids into text, never showing a broken character or a part of a stop string.

    The text of all `push` calls and `finish` together is the decoded text of all ids, cut before
    the first stop string. Work per token depends on that token and on what is still held back, not
    on the length of the text.

    Attributes:
        stopped: A stop string was found; further tokens are ignored.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        stop_strings: Sequence[str] = (),
        *,
        show_special: bool = False,
    ):
        """Start an empty stream.

        Args:
            tokenizer: Whose ids are pushed.
            stop_strings: The text ends before the first of them.
            show_special: Whether special tokens appear by their names.

        Raises:
            UsageError: a stop string is empty.
        """
        self.stopped = False
        self._tokenizer = tokenizer
        self._show_special = show_special
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._stops = _StopStrings(stop_strings) if stop_strings else None

    def push(self, token_id: int) -> str:
        """Take the next token; return the text that is certain now."""
        if self.stopped:
            return ""
        if token_id in self._tokenizer.special_ids and not self._show_special:
            return ""
        return self._scan(self._utf8.decode(self._tokenizer.token_bytes(token_id)))

    def finish(self) -> str:
        """Return what was held back: no token follows."""
        if self.stopped:
            return ""
        text = self._scan(self._utf8.decode(b"", final=True))
        if self._stops is not None and not self.stopped:
            text += self._stops.held_back()
        self.stopped = True
        return text

    def _scan(self, text: str) -> str:
        if self._stops is None or not text:
            return text
        certain, self.stopped = self._stops.feed(text)
        return certain


class _StopStrings:
    """Finds the first of several strings in text that comes in pieces (Aho and Corasick, 1975)."""

    def __init__(self, strings: Sequence[str]):
        if any(not string for string in strings):
            raise UsageError("a stop string must not be empty")
        # State 0 is the root; a state is a prefix of some string, and knows its length.
        self._next: list[dict[str, int]] = [{}]
        self._depth = [0]
        self._match = [0]
        for string in strings:
            state = 0
            for character in string:
                following = self._next[state].get(character)
                if following is None:
                    following = len(self._next)
                    self._next[state][character] = following
                    self._next.append({})
                    self._depth.append(self._depth[state] + 1)
                    self._match.append(0)
                state = following
            self._match[state] = len(string)
        self._fallback = self._link()
        self._state = 0
        self._held = ""

    def _link(self) -> list[int]:
        fallback = [0] * len(self._next)
        queue = list(self._next[0].values())
        for state in queue:
            for character, following in self._next[state].items():
                fallback[following] = self._step(fallback, fallback[state], character)
                queue.append(following)
            # Ends of shorter strings inside this prefix count too; the longest starts first.
            self._match[state] = max(self._match[state], self._match[fallback[state]])
        return fallback

    def _step(self, fallback: list[int], state: int, character: str) -> int:
        while state and character not in self._next[state]:
            state = fallback[state]
        return self._next[state].get(character, 0)

    def feed(self, text: str) -> tuple[str, bool]:
        """Take more text; return what is certain now, and whether a stop string ended it."""
        text = self._held + text
        for position in range(len(self._held), len(text)):
            self._state = self._step(self._fallback, self._state, text[position])
            if length := self._match[self._state]:
                self._held = ""
                return text[: position + 1 - length], True
        keep = self._depth[self._state]
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep], False

    def held_back(self) -> str:
        """Return the text that could have begun a stop string."""
        return self._held

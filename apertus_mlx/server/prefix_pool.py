"""Caches of requests that have ended, for later ones that begin with the same tokens."""

from __future__ import annotations

import logging
from collections.abc import Sequence

from apertus_mlx.generation.cached_prefix import CachedPrefix, shared_length
from apertus_mlx.text.tokenizer import Tokenizer

_log = logging.getLogger(__name__)
# A shorter prefix than this is no reason to take another conversation's cache.
LEAST_SHARED = 16


class PrefixPool:
    """Whole caches, the most recently used last. Each belongs to one request at a time."""

    def __init__(self, most: int) -> None:
        """Keep up to `most` caches."""
        self._most = most
        self._idle: list[CachedPrefix] = []
        self.hits = 0

    def __len__(self) -> int:
        return len(self._idle)

    @property
    def positions(self) -> list[int]:
        """How many positions each holds."""
        return [len(each.tokens) for each in self._idle]

    def take(self, prompt: Sequence[int], tokenizer: Tokenizer) -> CachedPrefix | None:
        """The cache that shares most with `prompt`, which is then no longer here."""
        best, most = None, LEAST_SHARED - 1
        for each in self._idle:
            shared = shared_length(each.tokens, prompt)
            if shared > most:
                best, most = each, shared
        if best is None:
            return None
        self._idle.remove(best)
        self.hits += 1
        held = best.tokens
        if most < min(len(held), len(prompt)) and _log.isEnabledFor(logging.DEBUG):
            before, now = (tokenizer.decode([ids[most]], skip_special=False)
                           for ids in (held, prompt))  # fmt: skip
            _log.debug("prompts part at token %d: %r before, %r now", most, before, now)
        return best

    def give(self, prefix: CachedPrefix) -> None:
        """Keep a cache that nobody uses any more."""
        if self._most and prefix.tokens:
            self._idle.append(prefix)
            del self._idle[: -self._most]

    def drop_oldest(self) -> bool:
        """Forget the cache that was used least recently; returns whether there was one."""
        if not self._idle:
            return False
        del self._idle[0]
        return True

    def clear(self) -> None:
        """Forget all."""
        self._idle.clear()

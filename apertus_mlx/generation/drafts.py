"""What guesses the next tokens: a small model of the same ids, or a look back at the text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from apertus_mlx.cache import Cache, rewind
from apertus_mlx.generation.cached_prefix import shared_length
from apertus_mlx.generation.decode import prefill
from apertus_mlx.generation.draft_pace import MeasuredPace, Pace
from apertus_mlx.generation.speculate import Draft, Draw
from apertus_mlx.model.language_model import LanguageModel

# From so many tokens on, those that a draft has not read yet are read as a prompt.
PROMPT = 16
# Runs of so many tokens are looked for, the longest first.
LONGEST_RUN, SHORTEST_RUN = 4, 2
# What these ids mean differs between Apertus v1 and v1.1.
NEVER_DRAFTED = (3, 10)


@dataclass(frozen=True, slots=True)
class Drafting:
    """A draft and how far it guesses, for one answer after the other."""

    draft: Draft
    pace: Pace = field(default_factory=MeasuredPace)


class LookupDraft:
    """Guesses that what followed the latest tokens when they last came follows again."""

    def __init__(self) -> None:
        self._known = 0
        # Behind the latest place of each run of tokens.
        self._places: dict[tuple[int, ...], int] = {}

    @property
    def ended(self) -> str | None:
        """Never."""
        return None

    def begin(self, ids: Sequence[int]) -> None:  # noqa: ARG002
        """See `Draft.begin`."""
        self._places.clear()
        self._known = 0

    def propose(self, ids: Sequence[int], most: int, draw: Draw) -> mx.array | None:  # noqa: ARG002
        """See `Draft.propose`."""
        # Nothing stands behind the last run yet.
        for end in range(self._known, len(ids)):
            for size in range(SHORTEST_RUN, min(LONGEST_RUN, end) + 1):
                self._places[tuple(ids[end - size : end])] = end
        self._known = len(ids)
        for size in range(LONGEST_RUN, SHORTEST_RUN - 1, -1):
            place = self._places.get(tuple(ids[-size:]))
            if place is not None and len(ids) > size:
                return mx.array(list(ids[place : place + most]))
        return None


class ModelDraft:
    """A small model with a cache of its own, in full precision.

    Args:
        model: has the ids of the one that it drafts for.
        context: most positions that it was made for.
        width: how many logits the other model has.
        head: its logits `[1, L, n]` of hidden states, if they are not those of `model`.
    """

    def __init__(
        self,
        model: LanguageModel,
        context: int,
        width: int,
        head: Callable[[mx.array], mx.array] | None = None,
    ) -> None:
        self._model, self._context, self._width, self._head = model, context, width, head
        self._barred = [token for token in NEVER_DRAFTED if token < width]
        # None while they are being changed: after an interrupt nothing is held.
        self._layers: list[Cache] | None = None
        self._held: list[int | mx.array] = []
        # How many of the tokens held are known to be those of the text that is being written.
        self._agreed = 0
        self.ended: str | None = None

    def begin(self, ids: Sequence[int]) -> None:
        """See `Draft.begin`."""
        self._agreed = shared_length([int(token) for token in self._held], ids)
        self.ended = None

    def propose(self, ids: Sequence[int], most: int, draw: Draw) -> mx.array | None:
        """See `Draft.propose`."""
        if len(ids) + most > self._context:
            self.ended = f"the draft's context of {self._context} tokens is full"
            self._layers, self._held, self._agreed = None, [], 0
            return None
        layers = self._go_back(ids)
        logits = self._read(ids[len(self._held) :], layers)
        guesses: list[mx.array] = []
        while (token := draw(self._fitted(logits))) is not None:
            guesses.append(token)
            if len(guesses) == most:
                break
            logits = self._logits(token.reshape(1, 1), layers)
        self._held += [*ids[len(self._held) :], *(guesses if token is None else guesses[:-1])]
        self._agreed, self._layers = len(ids), layers
        return mx.stack(guesses) if guesses else None

    def _go_back(self, ids: Sequence[int]) -> list[Cache]:
        """Hold what `ids` begins with and no more, at least the last one left out."""
        layers, self._layers = self._layers, None
        most = min(len(self._held), len(ids) - 1)
        shared = min(self._agreed, most)
        while shared < most and int(self._held[shared]) == ids[shared]:
            shared += 1
        if layers is None or not rewind(layers, len(self._held) - shared):
            layers, shared = self._model.make_cache(), 0
        del self._held[shared:]
        return layers

    def _read(self, ids: Sequence[int], layers: list[Cache]) -> mx.array:
        """The logits behind `ids`, once they are read."""
        if len(ids) >= PROMPT:
            prefill(self._model, ids[:-1], layers)
            ids = ids[-1:]
        return self._logits(mx.array([list(ids)]), layers)

    def _logits(self, ids: mx.array, layers: list[Cache]) -> mx.array:
        if self._head is None:
            return self._model.next_token_logits(ids, layers).values
        return self._head(self._model.model(ids, layers)[:, -1:])[0, 0]

    def _fitted(self, logits: mx.array) -> mx.array:
        """As many logits as the other model has: random noise depends on their number."""
        logits = logits.astype(mx.float32)
        missing = self._width - logits.size
        if missing > 0:
            logits = mx.concatenate([logits, mx.full((missing,), -mx.inf)])
        elif missing < 0:
            logits = logits[: self._width]
        return logits.at[mx.array(self._barred)].add(-mx.inf) if self._barred else logits

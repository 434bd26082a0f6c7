"""Decode steps of one row of a batch with a draft: several tokens from one pass over the weights.

What is handed out is what plain steps hand out, as in `speculate.py`; here a row keeps the token
that is drawn last, so that a plain step, with other rows beside it, can follow at any time.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from collections.abc import Set as AbstractSet
from typing import NamedTuple

import mlx.core as mx

from apertus_mlx.cache import allow_cut, rewind
from apertus_mlx.cache.protocol import Cache
from apertus_mlx.errors import UsageError
from apertus_mlx.generation.drafts import Drafting
from apertus_mlx.generation.row import Row
from apertus_mlx.generation.speculate import Speculation
from apertus_mlx.model.language_model import LanguageModel, NextTokenLogits


class Guessed(NamedTuple):
    """The next token of `row`, what may follow it, and the logits `[n, vocabulary]` after each."""

    row: Row
    value: int
    guesses: list[int]
    logits: mx.array
    started_s: float


class GuessedSteps:
    """A draft for whichever row decodes alone.

    Args:
        model: checks the guesses.
        drafting: the draft, and how far it guesses.
        stop_ids: behind which nothing is handed out.
        clock: seconds.
    """

    def __init__(
        self,
        model: LanguageModel,
        drafting: Drafting,
        stop_ids: AbstractSet[int] = frozenset(),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._model, self._stop_ids, self._clock = model, stop_ids, clock
        self._draft, self._pace = drafting.draft, drafting.pace
        # Whose text the draft knows, and whether nothing more is guessed for it.
        self._row: Row | None = None
        self._given_up = False
        # Plain steps that the pace has not been told of.
        self._plain, self._plain_s = 0, 0.0
        # Whether it has read all of it, so that a pass takes its usual time.
        self._caught_up = False

    def prepare(self, caches: list[Cache]) -> None:
        """Have new caches of a row be cut back as far as guesses may be wrong.

        Raises:
            UsageError: their form does not allow it.
        """
        if not allow_cut(caches, self._pace.most):
            raise UsageError(
                "--draft: this cache cannot be cut back to what the model accepts; leave out "
                "--draft, --kv-bits or --max-kv"
            )

    def ahead(self, row: Row) -> int:
        """How many tokens to guess behind the next one of `row`; 0: a plain step comes now."""
        if row is not self._row:
            self._row, self._given_up, self._caught_up = row, False, False
            self._plain, self._plain_s = 0, 0.0
            self._draft.begin(row.ids)
            row.speculation = row.speculation or Speculation(row_costs=self._pace.row_costs)
        if self._given_up or self._draft.ended:
            return 0
        return min(self._pace.ahead, row.left - 1)

    def rested(self, row: Row, seconds: float) -> None:
        """A plain step of `row`, alone, took so long."""
        self._note(row, 1)
        self._caught_up = False
        self._plain += 1
        self._plain_s += seconds
        if self._pace.ahead == 0 and self._plain >= self._pace.rest:
            self._pace.rested(self._plain, self._plain_s)
            self._plain, self._plain_s = 0, 0.0

    def compute(self, row: Row, ahead: int) -> Guessed:
        """Guess what follows the next token of `row`, and compute the logits after all of them.

        Raises:
            RejectedError: the next token was drawn from logits that are not finite or all the same.
        """
        assert row.caches is not None
        started, value = self._clock(), row.value()
        guesses = self._guess(row, value, ahead)
        logits = self._model(mx.array([[value, *guesses]]), row.caches)[0]
        mx.eval(logits)
        return Guessed(row, value, guesses, logits, started)

    def hand_out(self, guessed: Guessed) -> Iterator[tuple[int, mx.array]]:
        """Hand out the next token of a row, and those behind it that were guessed right.

        Yields each with the logits `[vocabulary]` that it was drawn from. In the end, whatever ends
        it, the row's caches hold its ids.

        Raises:
            RejectedError: a token was drawn from logits that are not finite or all the same.
            UsageError: the grammar of the row's rules became too complex.
        """
        row, value, guesses, logits, started = guessed
        before, handed = len(row.ids), 0
        assert row.caches is not None
        try:
            for following in logits:
                if handed:
                    value = row.value()
                    if value != guesses[handed - 1]:
                        break
                drawn_from = row.logits
                row.follow(NextTokenLogits(following))
                row.hand_out(value)
                handed += 1
                yield value, drawn_from
                if row.left == 0 or value in self._stop_ids:
                    break
        finally:
            if not rewind(row.caches, row.caches[0].offset - len(row.ids)):
                raise RuntimeError(f"a cache in {row.form} could not forget wrong guesses")
            self._note(row, len(row.ids) - before, len(guesses), max(handed - 1, 0))
        # What is read for the first time, or caught up with, takes no usual time.
        caught_up, self._caught_up = self._caught_up, True
        self._pace.passed(len(guesses), handed - 1, self._clock() - started if caught_up else None)

    def give_up(self, row: Row) -> None:
        """Guess no more for `row`: a pass has failed."""
        assert row.speculation is not None
        self._given_up = True
        row.speculation.off = "a pass has failed"

    def _note(self, row: Row, tokens: int, drafted: int = 0, accepted: int = 0) -> None:
        found = row.speculation
        assert found is not None
        found.passes += 1
        found.tokens += tokens
        found.drafted += drafted
        found.accepted += accepted
        if not self._given_up:
            found.off = self._draft.ended or self._pace.off

    def _guess(self, row: Row, value: int, most: int) -> list[int]:
        """Up to `most` ids that may follow `row.ids` and `value`, drawn as the row will draw."""
        sampler, before = row.sampler, row.sampler.state
        following = None if row.rules is None else row.rules.copy()

        def draw(logits: mx.array) -> mx.array | None:
            allowed = None if following is None else following.allowed
            token = sampler(NextTokenLogits(logits), allowed)
            if following is not None:
                if not following.allows(int(token)):
                    return None
                following.accept(int(token))
            return token

        if value in self._stop_ids:
            return []
        try:
            if following is not None:
                following.accept(value)
            found = self._draft.propose([*row.ids, value], most, draw)
        finally:
            sampler.state = before
        return [] if found is None else [int(each) for each in found.tolist()]  # type: ignore[union-attr, arg-type]

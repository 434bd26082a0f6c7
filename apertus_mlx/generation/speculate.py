"""Decoding with a draft: several tokens are guessed cheaply, and one pass of the model checks them.

Same key, same text. A draft draws each token with the random key, penalties and mask that the model
will use at that position, so it often draws the same one. What is handed out is always the model's
own draw; a guess only decides whether the logits behind it, computed in the same pass, are of use.
So the text is that of plain decoding, up to rounding: a product of several rows may round otherwise
than that of one.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterator, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from typing import Protocol

import mlx.core as mx

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.backend.memory_limits import clear_pool
from apertus_mlx.generation.decode import (
    CLEAR_INTERVAL,
    draw_tokens,
    is_finite,
    tell_apart,
    unsound,
)
from apertus_mlx.generation.draft_pace import Pace
from apertus_mlx.generation.sampling import Sampler, SamplerState
from apertus_mlx.generation.structured import AnswerRules
from apertus_mlx.model.language_model import NextTokenLogits

# Draws a token from logits `[n]` of the first n ids; None where no token may follow.
Draw = Callable[[mx.array], mx.array | None]


class Draft(Protocol):
    """Guesses what comes next."""

    def begin(self, ids: Sequence[int]) -> None:
        """Be asked about an answer to the prompt `ids` from now on."""

    def propose(self, ids: Sequence[int], most: int, draw: Draw) -> mx.array | None:
        """Up to `most` ids `[n]` that may follow `ids`; None: no guess.

        A draft with logits has `draw` choose from them, once for each token.
        """

    @property
    def ended(self) -> str | None:
        """Why it will guess no more; None while it may."""


class Target(Protocol):
    """The model that checks, and what its cache holds; see `cached_prefix.Run`."""

    def step(self, token: mx.array) -> NextTokenLogits:
        """Logits after one more token (shape `[]`)."""

    def check(self, tokens: mx.array) -> mx.array:
        """Logits `[n, vocabulary]` after each of more tokens `[n]`."""

    def keep(self, length: int) -> None:
        """Cut away all but the first `length` tokens."""


@dataclass(slots=True)
class Speculation:
    """What a draft was good for in one answer.

    Attributes:
        drafted: tokens that it guessed.
        accepted: those among them that the model drew as well.
        passes: of the model over its weights, for all tokens after the first.
        tokens: how many these gave.
        off: why the draft was not used to the end; None: it was.
        row_costs: from whom the pace knew first what a pass costs; see `Pace.row_costs`.
    """

    drafted: int = 0
    accepted: int = 0
    passes: int = 0
    tokens: int = 0
    off: str | None = None
    row_costs: str | None = None

    @property
    def tokens_per_pass(self) -> float:
        """Tokens after the first, by the model's passes; 0 before there are any."""
        return self.tokens / self.passes if self.passes else 0.0

    def report(self) -> dict[str, object]:
        """All of it by name, as JSON has it."""
        return {
            "drafted": self.drafted,
            "accepted": self.accepted,
            "passes": self.passes,
            "tokens_per_pass": self.tokens_per_pass,
            "off": self.off,
            "row_costs": self.row_costs,
        }


class Speculator:
    """Draws the tokens of one answer.

    Args:
        target: has computed `prompt`; its cache allows cuts of as many positions as `pace` ever
            looks ahead.
        draft: guesses.
        pace: how many tokens ahead.
        prompt: ids.
        sampler: the answer's.
        rules: the answer's.
        stop_ids: behind which nothing is guessed.
        clock: seconds.

    Attributes:
        found: what the draft was good for, so far.
    """

    def __init__(
        self,
        target: Target,
        draft: Draft,
        pace: Pace,
        prompt: Sequence[int],
        sampler: Sampler,
        rules: AnswerRules | None = None,
        stop_ids: AbstractSet[int] = frozenset(),
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.found = Speculation(row_costs=pace.row_costs)
        self._target, self._draft, self._pace = target, draft, pace
        self._ids = list(prompt)
        self._sampler, self._rules, self._stop_ids = sampler, rules, stop_ids
        self._clock = clock
        # Time that whoever reads the tokens has taken is not ours.
        self._away = 0.0
        self._draft_has_read = False
        draft.begin(prompt)

    def tokens(self, logits: mx.array, max_tokens: int) -> Generator[int, None, None]:
        """Yield up to `max_tokens` ids, the first drawn from `logits` `[vocabulary]`.

        When the reader stops, the target holds all of them but the last, or that one, too.

        Raises:
            RejectedError, UsageError: see `draw_tokens`.
        """
        left, cleared = max_tokens, 0
        yield from self._plain(logits, 1)
        left -= 1
        while left > 0:
            before = len(self._ids)
            ahead = 0 if self._draft.ended else min(self._pace.ahead, left - 1)
            if ahead > 0:
                yield from self._block(ahead)
            else:
                # The pace rests, or the draft has ended, or the last token needs no guess.
                resting = not self._draft.ended and self._pace.ahead == 0
                yield from self._rest(min(left, self._pace.rest) if resting else left)
            self.found.off = self._draft.ended or self._pace.off
            left -= len(self._ids) - before
            cleared += len(self._ids) - before
            if cleared >= CLEAR_INTERVAL:
                clear_pool()
                cleared = 0

    def _rest(self, count: int) -> Iterator[int]:
        """Up to `count` tokens without a draft, as fast as they come."""
        started, before = self._clock(), len(self._ids)
        self._away = 0.0
        logits = self._target.step(mx.array(self._ids[-1])).values
        for token in self._plain(logits, count):
            self.found.passes += 1
            self.found.tokens += 1
            yield from self._handed(token)
        if self._pace.ahead == 0:
            self._pace.rested(len(self._ids) - before, self._clock() - started - self._away)

    def _plain(self, logits: mx.array, count: int) -> Iterator[int]:
        for token in draw_tokens(self._target.step, logits, self._sampler, count, self._rules):
            self._ids.append(token)
            yield token

    def _handed(self, token: int) -> Iterator[int]:
        left = self._clock()
        yield token
        self._away += self._clock() - left

    def _block(self, ahead: int) -> Iterator[int]:
        """The tokens of one pass: all guesses that are right, and the one behind them."""
        started, before = self._clock(), len(self._ids)
        self._away = 0.0
        latest = mx.array(self._ids[-1:])
        guesses = self._guess(ahead)
        if guesses is None:
            rows = self._target.step(latest[0]).values[None]
        else:
            rows = self._target.check(mx.concatenate([latest, guesses.astype(latest.dtype)]))
        try:
            yield from self._checked(rows, guesses)
        finally:
            # All but the latest token, which the next pass begins with.
            self._target.keep(len(self._ids) - 1)
        # The first time the draft reads the prompt.
        seconds = self._clock() - started - self._away if self._draft_has_read else None
        self._draft_has_read = True
        self._pace.passed(rows.shape[0] - 1, len(self._ids) - before - 1, seconds)

    def _guess(self, ahead: int) -> mx.array | None:
        """What the draft guesses, drawn as the model will draw; the sampler stays as it was."""
        before, rules = self._sampler.state, self._rules
        steady = rules is None or rules.steady
        following = rules if rules is None or steady else rules.copy()

        def draw(logits: mx.array) -> mx.array | None:
            allowed = None if following is None else following.allowed
            token = self._sampler(NextTokenLogits(logits), allowed)
            if following is not None and not steady:
                value = int(token)
                if not following.allows(value):
                    return None
                following.accept(value)
            return token

        try:
            return self._draft.propose(self._ids, ahead, draw)
        finally:
            self._sampler.state = before

    def _checked(self, rows: mx.array, guesses: mx.array | None) -> Iterator[int]:
        """Draw from each of `rows` `[n, vocabulary]` as long as guesses are right."""
        count = rows.shape[0]
        steady = self._rules is None or self._rules.steady
        # One wait for the GPU for all of them; where there is none each draw costs what it costs.
        drawn = [self._draw(row) for row in rows] if steady and has_gpu() else []
        mx.eval([token for token, _ in drawn])
        guessed = [] if guesses is None else [int(each) for each in guesses.tolist()]  # type: ignore[union-attr, arg-type]
        self.found.passes += 1
        self.found.drafted += len(guessed)
        for index in range(count):
            if drawn:
                token, self._sampler.state = drawn[index]
            else:
                token, _ = self._draw(rows[index])
            value = int(token)
            self._require_sound(value, rows[index], token)
            if self._rules is not None and self._rules.accept(value):
                drawn = []
            self._ids.append(value)
            self.found.tokens += 1
            right = index < len(guessed) and guessed[index] == value
            self.found.accepted += right
            yield from self._handed(value)
            if not right or value in self._stop_ids:
                break

    def _draw(self, row: mx.array) -> tuple[mx.array, SamplerState]:
        allowed = None if self._rules is None else self._rules.allowed
        return self._sampler(NextTokenLogits(row), allowed), self._sampler.state

    def _require_sound(self, value: int, row: mx.array, token: mx.array) -> None:
        # As in `draw_tokens`: greedy choice draws 0 from logits that tell nothing apart.
        strict = self._rules is not None and not self._rules.steady
        suspect = value == 0 or (strict and not is_finite(row, token))
        if suspect and not tell_apart(row).item():
            raise unsound(self.found.tokens + 1)

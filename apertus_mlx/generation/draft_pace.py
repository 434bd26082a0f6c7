"""How many tokens a draft guesses ahead: what pays on this machine, measured while it runs.

A pass over k guesses gives 1 + a + ... + a^k tokens where each guess is right with probability a,
and takes what it takes: both are measured, and so is plain decoding. k grows by one where even a
small further cost would leave a gain. Where passes with a draft give fewer tokens a second than
plain decoding, the draft rests, each time twice as long.

What `doctor --tune` measured of this machine says what passes may take that were never tried: the
first pass guesses as far as that promises most, and none is made where even right guesses would
gain nothing. Measured times of whole passes take its place one by one.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from statistics import median
from typing import Protocol

MOST_AHEAD = 4
# Tokens decoded plainly before the first guess, of which the first few show no usual time.
FIRST_REST, UNUSUAL = 8, 2
# Passes of one kind whose times count, and passes in a row that show whether a draft pays.
KEPT_TIMES, WINDOW, LEAST_WINDOW = 5, 16, 6
SHORTEST_REST, LONGEST_REST = 64, 1024
# Of a guess nobody knows yet, and what a pass takes from what was known before.
FIRST_SHARE, FORGETTING = 0.7, 0.95


class Pace(Protocol):
    """Says how far to guess, and is told what came of it."""

    @property
    def most(self) -> int:
        """The most tokens that it will ever have guessed at a time."""

    @property
    def ahead(self) -> int:
        """How many tokens to guess now; 0: none, `rest` tokens are to be decoded plainly."""

    @property
    def rest(self) -> int:
        """How many tokens to decode plainly when `ahead` is 0."""

    @property
    def off(self) -> str | None:
        """Why it has none guessed for now."""

    @property
    def row_costs(self) -> str | None:
        """Who knew first what a pass costs: `doctor`, or it was `measured`; None: nobody asks."""

    def rested(self, tokens: int, seconds: float) -> None:
        """So many tokens were decoded plainly."""

    def passed(self, drafted: int, accepted: int, seconds: float | None) -> None:
        """One pass over so many guesses was made, guessing included; None: in no usual time."""


class FixedPace:
    """Always the same number of tokens."""

    def __init__(self, ahead: int) -> None:
        self.ahead = self.most = ahead
        self.rest = 1
        self.off: str | None = None
        self.row_costs: str | None = None

    def rested(self, tokens: int, seconds: float) -> None:
        """Nothing comes of it."""

    def passed(self, drafted: int, accepted: int, seconds: float | None) -> None:
        """Nothing comes of it."""


class MeasuredPace:
    """As many tokens as pay; see above. It may serve one answer after the other.

    Args:
        most: tokens at a time.
        costs: of passes over 1, 2, ... tokens, in passes over one, as the doctor measured them.
    """

    def __init__(self, most: int = MOST_AHEAD, costs: Sequence[float] = ()) -> None:
        self.most = most
        self.row_costs: str | None = "doctor" if costs else "measured"
        self._costs = tuple(costs)
        self._doubted = False
        self.off: str | None = None
        self.rest = FIRST_REST
        self.ahead = 0
        self._plain: float | None = None
        # Seconds of the latest passes, by their number of guesses; the first of each is left out.
        self._times: dict[int, deque[float]] = {}
        self._right, self._tried = FIRST_SHARE, 1.0
        self._window: deque[tuple[int, float]] = deque(maxlen=WINDOW)
        self._next_rest = SHORTEST_REST

    @property
    def share(self) -> float:
        """How often a guess is right, of those whose predecessors were."""
        return self._right / self._tried

    @property
    def seconds(self) -> dict[int, float]:
        """What passes take, by their number of guesses; 0 is plain decoding."""
        plain = {} if self._plain is None else {0: self._plain}
        return plain | {k: median(times) for k, times in self._times.items() if k and times}

    def rested(self, tokens: int, seconds: float) -> None:
        """See `Pace.rested`."""
        if tokens > UNUSUAL:
            self._plain = seconds / tokens
        self.rest -= tokens
        if self.rest > 0:  # an answer was at its end
            return
        if self._hopeless():
            self._doubted = True
            self._turn_off()
            return
        expected = self._expected()
        self.ahead = max(expected, key=lambda k: self._tokens(k) / expected[k]) if expected else 1
        self.off = None
        self._window.clear()

    def passed(self, drafted: int, accepted: int, seconds: float | None) -> None:
        """See `Pace.passed`."""
        self._right = self._right * FORGETTING + accepted
        self._tried = self._tried * FORGETTING + accepted + (accepted < drafted)
        if seconds is None:
            return
        if drafted not in self._times:
            self._times[drafted] = deque(maxlen=KEPT_TIMES)
            return
        self._times[drafted].append(seconds)
        self._window.append((accepted + 1, seconds))
        if self._loses():
            self._turn_off()
            return
        if len(self._window) == WINDOW:
            self._next_rest = SHORTEST_REST
        self.ahead = self._best()

    def _turn_off(self) -> None:
        self.ahead, self.rest = 0, self._next_rest
        self._next_rest = min(2 * self._next_rest, LONGEST_REST)
        self.off = "slower than without"

    def _hopeless(self) -> bool:
        """Whether nothing was tried yet and even right guesses would gain nothing; asked once."""
        if self._doubted or self._times or self._plain is None:
            return False
        expected = self._expected()
        return all((k + 1) * self._plain <= expected[k] for k in expected) and bool(expected)

    def _expected(self) -> dict[int, float]:
        """What passes take, by their number of guesses: as the costs say, but for those measured.

        Of the longest that was measured, what the costs do not explain is laid to its guesses.
        """
        if not self._costs or self._plain is None:
            return {}
        plain, known = self._plain, self.seconds
        known.pop(0, None)
        longest = max(known, default=0)
        guess = (known[longest] - plain * self._cost(longest)) / longest if longest else 0.0
        least = known.get(longest, 0.0)
        return {
            k: max(plain * self._cost(k) + k * guess, least if k > longest else plain)
            for k in range(1, self.most + 1)
        } | known

    def _cost(self, guesses: int) -> float:
        """Of a pass; beyond what the doctor measured the last step goes on."""
        if guesses < len(self._costs):
            return self._costs[guesses]
        last, before = self._costs[-1], self._costs[max(len(self._costs) - 2, 0)]
        return last + (guesses - len(self._costs) + 1) * max(last - before, 0.0)

    def _loses(self) -> bool:
        """Whether the latest passes were slower than plain decoding."""
        if self._plain is None or len(self._window) < LEAST_WINDOW:
            return False
        tokens = sum(each for each, _ in self._window)
        return sum(each for _, each in self._window) > tokens * self._plain

    def _best(self) -> int:
        """The number of guesses that gives the most tokens a second, or the next one to try."""
        if expected := self._expected():
            return max(expected, key=lambda k: self._tokens(k) / expected[k])
        known = self.seconds
        tried = sorted(k for k in known if k)
        if not tried:
            return max(self.ahead, 1)
        best = max(tried, key=lambda k: self._tokens(k) / known[k])
        further = tried[-1] + 1
        if further > self.most:
            return best
        # What one more guess has cost at most so far, halved: a reason to try, not to stay.
        last = known[tried[-1]]
        step = (last - known.get(tried[-1] - 1, last)) / 2
        hoped = self._tokens(further) / (last + max(step, 0.0))
        return further if hoped > self._tokens(best) / known[best] else best

    def _tokens(self, guesses: int) -> float:
        return sum(self.share**k for k in range(guesses + 1))

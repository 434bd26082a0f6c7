"""Times one thing against another, in turns: whether it was faster in every round."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from statistics import median

from apertus_mlx.measure.doctor.device import UnfitError

ROUNDS = 5
# A kernel, or compiling the step, has to save at least 2 % in every round; all kernels together
# just must not lose.
MOST_OF_A_KERNEL = 0.98
MOST_OF_A_MODEL = 1.0


@dataclass(frozen=True, slots=True)
class Race:
    """Times of one thing over those of another, one ratio a round; it ends with the first lost."""

    ratios: tuple[float, ...]
    # What each round's ratio may be at most.
    most: float
    reason: str | None = None

    @property
    def won(self) -> bool:
        """Whether it was fast enough in every round."""
        return (
            self.reason is None
            and len(self.ratios) == ROUNDS
            and all(ratio <= self.most for ratio in self.ratios)
        )

    @property
    def ratio(self) -> float:
        """The middle one; infinite if there is none."""
        return median(self.ratios) if self.ratios else float("inf")


def race(new: Callable[[], float], old: Callable[[], float], most: float) -> Race:
    """Time `old`, `new`, `new`, `old` in each round, so that a drift of the clock cancels out."""
    ratios: list[float] = []
    try:
        # Neither compiling nor the first touch of memory counts.
        old(), new()
        while len(ratios) < ROUNDS and (not ratios or ratios[-1] <= most):
            first, second, third, last = old(), new(), new(), old()
            ratios.append((second + third) / max(first + last, 1e-12))
    except UnfitError as error:
        return Race(tuple(ratios), most, str(error))
    return Race(tuple(ratios), most)

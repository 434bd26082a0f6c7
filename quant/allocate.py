"""Chooses one of several formats for each part: least divergence within a number of bytes.

The multiple-choice knapsack problem, solved by dynamic programming over bytes. Where all sizes
share a large divisor, as those of matrices do, the result is the best there is; else sizes are
rounded up to a step of at most 1 / `STEPS` of the room.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# Most steps that the room above the smallest forms is divided into.
STEPS = 1 << 16


@dataclass(frozen=True, slots=True)
class Choice:
    """One form of a part: what it takes and what it costs."""

    size_bytes: int
    divergence: float


def allocate(parts: Sequence[Sequence[Choice]], most_bytes: int, least_bytes: int = 0) -> list[int]:
    """For each part the number of its choice, so that the sum of divergences is least.

    Args:
        parts: the choices of each, at least one.
        most_bytes: what all may take together.
        least_bytes: what all take at least, where the choices allow it.

    Raises:
        ValueError: not even the smallest choices fit, or a divergence is not finite.
    """
    smallest = [min(choice.size_bytes for choice in choices) for choices in parts]
    room = most_bytes - sum(smallest)
    if room < 0:
        raise ValueError(f"the smallest choices take {sum(smallest)} of {most_bytes} bytes")
    if not all(math.isfinite(choice.divergence) for choices in parts for choice in choices):
        raise ValueError("a divergence is not finite")
    extra = [
        [choice.size_bytes - least for choice in choices]
        for choices, least in zip(parts, smallest, strict=True)
    ]
    room = min(room, sum(map(max, extra)))
    step = max(math.gcd(*(size for sizes in extra for size in sizes)), -(-room // STEPS), 1)
    # least[n]: the least divergence of the parts so far that take exactly n steps.
    least = np.full(room // step + 1, np.inf)
    least[0] = 0
    taken = np.empty((len(parts), len(least)), np.uint8)
    for number, (choices, sizes) in enumerate(zip(parts, extra, strict=True)):
        best = np.full_like(least, np.inf)
        for index, (choice, size) in enumerate(zip(choices, sizes, strict=True)):
            steps = -(-size // step)
            if steps < len(least):
                trial = least[: len(least) - steps] + choice.divergence
                better = trial < best[steps:]
                best[steps:][better] = trial[better]
                taken[number, steps:][better] = index
        least = best
    first = max(0, -(-(least_bytes - sum(smallest)) // step))
    reachable = np.flatnonzero(np.isfinite(least))
    first = min(first, int(reachable[-1]))
    place = first + int(np.argmin(least[first:]))
    result = []
    for number in reversed(range(len(parts))):
        index = int(taken[number, place])
        place -= -(-extra[number][index] // step)
        result.append(index)
    return result[::-1]

"""Turns: A-B-B-A in each round, so that heat and load hit both sides alike."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, Self

from apertus_mlx.measure.bench.workload import Task, Workload


@dataclass(frozen=True, slots=True)
class Figure:
    """The median of some samples; `spread` is half of what lies between least and most."""

    median: float
    spread: float
    samples: tuple[float, ...]

    @classmethod
    def of(cls, samples: Sequence[float]) -> Self:
        """Of at least one sample."""
        spread = (max(samples) - min(samples)) / 2
        return cls(statistics.median(samples), spread, tuple(samples))

    def __str__(self) -> str:
        digits = 0 if self.median >= 1000 else 1 if self.median >= 10 else 2
        if len(self.samples) == 1:
            return f"{self.median:,.{digits}f}"
        return f"{self.median:,.{digits}f} ± {self.spread:,.{digits}f}"


class Timed(Protocol):
    """What does tasks and takes their time."""

    @property
    def seconds(self) -> Callable[[Task], float]:
        """Seconds that a task takes."""


def turns(sides: int) -> list[int]:
    """Who measures when in a round: 0 1 1 0, or 0 where there is only one."""
    there = list(range(sides))
    return there + there[::-1] if sides > 1 else there


def total_tokens(sides: int, task: Task, workload: Workload) -> int:
    """Tokens that `time_task` times in all."""
    return (sides + workload.rounds * len(turns(sides))) * workload.timed_tokens(task)


def time_task(
    sides: Sequence[Timed], task: Task, workload: Workload, on_tokens: Callable[[int], None]
) -> list[list[list[float]]]:
    """Seconds of `task`, for each side a list of rounds, each with all its turns.

    Each side first does it once uncounted, to warm up. `on_tokens` is told the tokens timed so far.
    """
    done = 0
    taken: list[list[list[float]]] = [[[] for _ in range(workload.rounds)] for _ in sides]
    orders = [list(range(len(sides))), *[turns(len(sides))] * workload.rounds]
    for number, order in enumerate(orders, start=-1):
        for index in order:
            seconds = sides[index].seconds(task)
            if number >= 0:
                taken[index][number].append(seconds)
            done += workload.timed_tokens(task)
            on_tokens(done)
    return taken


def rates(tokens: int, rounds: Sequence[Sequence[float]]) -> Figure:
    """Tokens per second, a sample per turn."""
    return Figure.of([tokens / seconds for turn in rounds for seconds in turn])


def ratios(first: Sequence[Sequence[float]], second: Sequence[Sequence[float]]) -> Figure:
    """How many times as fast the first side was, a sample per round."""
    return Figure.of([sum(b) / sum(a) for a, b in zip(first, second, strict=True)])

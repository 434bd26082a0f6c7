"""Whether a request fits into memory beside those that run, by the planner's reckoning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.memory import Fit
from apertus_mlx.memory.footprint import footprint, kv_bytes


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What may be taken, and what requests take.

    Attributes:
        unlimited: whether everything is tried, as `--force` asks.
    """

    inventory: Inventory
    plan: Fit
    unlimited: bool = False

    def cache_bytes(self, positions: int) -> int:
        """What the cache of a request of so many positions takes."""
        numbers = self.plan.backend.compute_bytes
        return kv_bytes(self.inventory.config, self.plan.form, positions, numbers)

    def total_bytes(self, positions: Iterable[int], idle: Iterable[int] = ()) -> int:
        """The peak with requests of so many positions each, and idle caches of so many.

        Each request has its cache; what a step works with is there once.
        """
        running = sorted(positions)
        peak = footprint(
            self.inventory,
            self.plan.form,
            max(running[-1:], default=1) or 1,
            self.plan.prefill_step,
            self.plan.backend,
        ).total_bytes
        return peak + sum(map(self.cache_bytes, [*running[:-1], *idle]))

    def fits(self, positions: Iterable[int], idle: Iterable[int] = ()) -> bool:
        """Whether that stays below the limit."""
        return self.unlimited or self.total_bytes(positions, idle) <= self.plan.limit_bytes

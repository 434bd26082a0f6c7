"""Whether an answer fits into memory beside those that run, by the planner's reckoning."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.memory import Fit
from apertus_mlx.memory.footprint import footprint, kv_bytes, logits_bytes


@dataclass(frozen=True, slots=True)
class MemoryBudget:
    """What may be taken, and what answers take.

    Attributes:
        unlimited: whether everything is tried, as `--force` asks.
    """

    inventory: Inventory
    plan: Fit
    unlimited: bool = False

    def row_bytes(self, positions: int) -> int:
        """What one more answer of so many positions takes: its cache, and to draw a token."""
        config, form, backend = self.inventory.config, self.plan.form, self.plan.backend
        cache = kv_bytes(config, form, positions, backend.compute_bytes)
        return cache + logits_bytes(config, form, positions, backend)

    def total_bytes(self, positions: Iterable[int]) -> int:
        """The peak with answers of so many positions each.

        What reads a prompt is there once.
        """
        running = sorted(positions)
        peak = footprint(
            self.inventory,
            self.plan.form,
            max(running[-1:], default=1) or 1,
            self.plan.prefill_step,
            self.plan.backend,
        ).total_bytes
        return peak + sum(map(self.row_bytes, running[:-1]))

    def left_bytes(self, positions: Iterable[int]) -> int:
        """What the limit leaves beside that, for caches of earlier requests."""
        return max(self.plan.limit_bytes - self.total_bytes(positions), 0)

    def fits(self, positions: Iterable[int]) -> bool:
        """Whether that stays below the limit."""
        return self.unlimited or self.total_bytes(positions) <= self.plan.limit_bytes

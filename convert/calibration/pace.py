"""How much a calibration computes, and how quick it is, from its first fitted layer on.

What is not a product of matrices takes far longer for each operation, so it is counted as what it
took beside products on one machine (`benchmarks.fit_layer`).
"""

from __future__ import annotations

import time
from pathlib import Path

from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.plan.plan import Plan
from apertus_mlx.convert.write.keep import Keep

PACE = "pace.npz"
# Operations of a fit for each weight, and for each weight and column.
PER_WEIGHT, PER_WEIGHT_AND_COLUMN = 30_000, 9
# More of both where codes are searched for.
PER_ANNEALED_WEIGHT, PER_ANNEALED_WEIGHT_AND_COLUMN = 20_000, 3


class Pace:
    """Notes in the folder of the codes how quick a calibration is, once a layer is fitted."""

    def __init__(self, plan: Plan, tokens: int, folder: Path) -> None:
        self._plan, self._tokens = plan, tokens
        self._keep = Keep(folder / PACE)
        self._first: tuple[int, float] | None = None

    def reach(self, runs: int) -> None:
        """Be told that so many runs through layers are done."""
        now_s = time.monotonic()
        if self._first is None:
            self._first = runs, now_s
        elif runs > self._plan.source.config.num_hidden_layers:
            before, began_s = self._first
            done = calibration_operations(self._plan, self._tokens, runs)
            done -= calibration_operations(self._plan, self._tokens, before)
            self._keep.save({"operations_per_s": done / max(now_s - began_s, 1e-9)}, {})

    @staticmethod
    def kept(folder: Path) -> float | None:
        """Operations in a second that an interrupted run in `folder` did; None without one."""
        found = Keep(folder / PACE).load()
        return None if found is None else float(found[0]["operations_per_s"])


def calibration_operations(plan: Plan, tokens: int, runs: int | None = None) -> float:
    """Of the first so many runs through layers, of which `quantize_model` does two for each layer.

    The embedding is fitted after the first pass; the head counts with it.
    """
    config, annealed = plan.source.config, plan.annealed
    depth = config.num_hidden_layers
    runs = 2 * depth if runs is None else runs
    ahead = fitted = ends = 0.0
    for matrix in layout.matrices(config):
        weights = matrix.rows * matrix.columns
        fit = weights * (PER_WEIGHT + PER_WEIGHT_AND_COLUMN * matrix.columns)
        if matrix.path in annealed:
            more = PER_ANNEALED_WEIGHT_AND_COLUMN * matrix.columns
            fit += weights * (PER_ANNEALED_WEIGHT + more)
        product = 2 * tokens * weights
        if ".layers." in matrix.path:
            ahead += product / depth
            # Two streams, and two moments.
            fitted += (2 * product + 4 * tokens * matrix.columns**2 + fit) / depth
        else:
            ends += product + fit
    return min(runs, depth) * ahead + (runs > depth) * ends + max(runs - depth, 0) * fitted

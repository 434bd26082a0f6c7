"""About how long a calibration and a tuning take on this machine.

A layer that an interrupted run has fitted says it best (`pace`); without one, a product of matrices
does, where NumPy computes.
"""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.checkpoint import layout
from apertus_mlx.convert.calibration.pace import Pace, calibration_operations
from apertus_mlx.convert.calibration.tuning import Tuning
from apertus_mlx.convert.evaluation.texts import Tokens
from apertus_mlx.convert.plan.plan import Plan

# Operations of a step of training for each weight and token (`benchmarks.quantizers`).
PER_TRAINED_WEIGHT = 18
# Columns of the product that is timed, and how often.
PROBE_COLUMNS, PROBES = 1024, 4


def minutes(plan: Plan, windows: Tokens, folder: Path) -> float | None:
    """About how long `plan` calibrates and tunes from the beginning; None where nothing says.

    Args:
        plan: that calibrates.
        windows: to calibrate on, `[windows, length]`.
        folder: of the codes of an interrupted run, if there is one.
    """
    config = plan.source.config
    speed = Pace.kept(folder)
    if speed is None:
        if has_gpu():
            return None
        speed = _product_speed()
    if not plan.request.tune:
        return calibration_operations(plan, windows.size) / speed / 60
    tuning = Tuning.on(config, windows)
    total = calibration_operations(plan, windows.size + tuning.own_tokens)
    return (total + _tuning_operations(tuning)) / speed / 60


def _tuning_operations(tuning: Tuning) -> float:
    """Of the original's answers and of training."""
    if not tuning.is_possible:
        return 0.0
    seen = tuning.options.epochs * tuning.tokens
    # Whoever answers reads; whoever writes has read as well.
    read = tuning.tokens + tuning.deciding.size + tuning.own_tokens
    return layout.parameter_count(tuning.config) * (PER_TRAINED_WEIGHT * seen + 2.0 * read)


def _product_speed() -> float:
    """Operations of float32 products that this machine does in a second, with all its cores."""
    matrix = np.ones((PROBE_COLUMNS, PROBE_COLUMNS), np.float32)
    best = 0.0
    for _ in range(PROBES):
        began_s = time.perf_counter()
        matrix @ matrix
        best = max(best, 2 * PROBE_COLUMNS**3 / (time.perf_counter() - began_s))
    return best

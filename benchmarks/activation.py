"""xIELU beside mlx-lm's: how far from float64, and how fast.

    python -m benchmarks.activation [--dtypes bfloat16 float32] [--rows 1 2048] [--columns 21504]

Slopes are those of the published vectors in `tests/model/test_xielu.py`; the largest are those that
8B has. Errors are of the negative branch, relative to the norm of the exact values, for inputs of
two standard deviations. Both take turns; a time is the median of the turns.
"""

from __future__ import annotations

import argparse
import math
import statistics
import time
from collections.abc import Callable
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.backend import hardware
from apertus_mlx.model.apertus import XIELU

# As they are stored: alpha_p and alpha_n.
SLOPES = ((0.2041, -1.0469), (166.0, 40.75))
BETA, EPS = 0.5, -1e-6
SPREADS = (0.02, 0.1)
TURNS = 20
# Calls in a row, of which each takes what the last one gave; scaled, or it would grow.
CALLS = 8


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dtypes", nargs="+", default=["bfloat16", "float32"])
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 2048])
    parser.add_argument("--columns", type=int, default=21504)
    given = parser.parse_args()
    print(f"{hardware.device_name()}, MLX {mx.__version__}")
    for dtype in given.dtypes:
        for slopes in SLOPES:
            sides = both(*slopes, getattr(mx, dtype))
            for spread in SPREADS:
                ours, theirs = (error(each, slopes[1], dtype, spread) for each in sides)
                print(
                    f"{dtype}, slopes {slopes}, inputs of {spread}: error {ours:.2e}, "
                    f"mlx-lm {theirs:.2e}"
                )
        for rows in given.rows:
            x = mx.random.normal((rows, given.columns)).astype(getattr(mx, dtype))
            ours, theirs = (1e6 * each for each in seconds(sides, x))
            print(
                f"{dtype}, {rows} x {given.columns}: {ours:.1f} microseconds, "
                f"mlx-lm {theirs:.1f}, ratio {theirs / ours:.2f}"
            )


def both(alpha_p: float, alpha_n: float, dtype: mx.Dtype) -> list[Callable[[Any], mx.array]]:
    """Ours and mlx-lm's, as a model of these slopes in `dtype` has them."""
    from mlx_lm.models.activations import XieLU

    ours, theirs = XIELU(), XieLU()
    for module in (ours, theirs):
        module.alpha_p, module.alpha_n = mx.array([alpha_p], dtype), mx.array([alpha_n], dtype)
        module.beta, module.eps = mx.array(BETA, dtype), mx.array(EPS, dtype)
    ours.fuse(compiled=hardware.has_gpu())
    return [ours, theirs]


def error(apply: Callable[[Any], mx.array], alpha_n: float, dtype: str, spread: float) -> float:
    """Of the negative branch, for the slope as it is stored in `dtype`."""
    kind = getattr(mx, dtype)
    x = mx.array(-np.abs(np.random.default_rng(0).normal(0, spread, 100_000))).astype(kind)
    stored = float(mx.array(alpha_n).astype(kind).item()), float(mx.array(EPS).astype(kind).item())
    inputs = np.array(x.astype(mx.float32), np.float64)
    slope = BETA + (stored[0] if stored[0] > 30 else math.log1p(math.exp(stored[0])))
    exact = slope * (np.expm1(np.minimum(inputs, stored[1])) - inputs) + BETA * inputs
    found = np.array(apply(x).astype(mx.float32), np.float64)
    return float(np.linalg.norm(found - exact) / np.linalg.norm(exact))


def seconds(applied: list[Callable[[Any], mx.array]], x: mx.array) -> list[float]:
    """Of one call each, the median of turns; what is compiled at the first use does not count."""
    times: list[list[float]] = [[] for _ in applied]
    for turn in range(TURNS + 1):
        for apply, taken in zip(applied, times, strict=True):
            mx.synchronize()
            started = time.perf_counter()
            y = x
            for _ in range(CALLS):
                y = apply(y) * 1e-3
            mx.eval(y)
            if turn:
                taken.append((time.perf_counter() - started) / CALLS)
    return [statistics.median(taken) for taken in times]


if __name__ == "__main__":
    main()

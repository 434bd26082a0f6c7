"""Finds codes beyond the nearest minimum of GPTQ's objective: descent with noise that dies away.

Each code is drawn from around what would be best for it, all others given, as widely as a
temperature says, and scales and biases follow: simulated annealing by a Gibbs sampler
("Optimization by Simulated Annealing", Kirkpatrick et al. 1983). GSQ (arXiv 2604.18556) searches
for assignments too, by gradients through relaxed distributions; on this objective noise leaves less
in the same time (`benchmarks.assignment_search`). NumPy or MLX.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np

from apertus_mlx.quant import descent
from apertus_mlx.quant.affine import ScaleType
from apertus_mlx.quant.arrays import Array, library
from apertus_mlx.quant.columns import Columns
from apertus_mlx.quant.curvature import Curvature

# Visits of each group, in so many rounds over all columns; a round of a wide matrix costs a product
# as large as it.
ROUNDS, ROUNDS_IF_WIDE, VISITS = 5, 4, 4
# How far a value of mean curvature is off at first, in steps of the typical scale of its row. Less
# stays in the nearest minimum; more forgets the start, and needs more visits.
SPREAD = 0.09
# Share of the visits after which there is no more noise.
STILL = 0.9
SEED = 0
# How many times what a visit draws are drawn in all, by NumPy.
STOCK = 4


def anneal(
    target: Array,
    start: Columns,
    curvature: Curvature,
    scale_type: ScaleType = "BF16",
    rounds: int | None = None,
    visits: int = VISITS,
) -> Columns:
    """Codes, scales and biases whose objective is at most that of `start`, row by row.

    Args:
        target: what to come close to, `[columns, rows]`.
        start: a good quantization of it.
        curvature: the objective's, of mean diagonal one.
        scale_type: what scales and biases will be stored in.
        rounds: how often each block of columns is taken up; by default as often as pays.
        visits: how often each group is visited then. With a few in all, none is without noise.
    """
    xp = library(target)
    # Standard deviation of a value of curvature one, by row.
    spread = SPREAD * xp.sqrt(xp.square(start.scales).mean(0))
    normals = _normals(xp, start.spec.group_size * len(spread))

    def noise(done: float, shape: tuple[int, ...]) -> Array | None:
        heat = 1 - done / STILL
        return normals(shape) * (heat * spread) if heat > 0 else None

    if rounds is None:
        rounds = ROUNDS if len(target) <= descent.WIDE else ROUNDS_IF_WIDE
    return descent.improve(target, start, curvature, scale_type, rounds, visits, noise)


def _normals(xp: Any, most: int) -> Callable[[tuple[int, ...]], Array]:
    """Draws of at most so many normal numbers, the same each time that this is called.

    NumPy would take two fifths as long for them as for the rest of a visit, so what it has drawn is
    used again, from somewhere else on.
    """
    if xp is np:
        draw = np.random.default_rng(SEED)
        stock = draw.standard_normal(STOCK * most, np.float32)

        def somewhere(shape: tuple[int, ...]) -> Array:
            start = int(draw.integers(len(stock) - most))
            return stock[start : start + math.prod(shape)].reshape(shape)

        return somewhere
    key = xp.random.key(SEED)

    def normals(shape: tuple[int, ...]) -> Array:
        nonlocal key
        key, own = xp.random.split(key)
        return xp.random.normal(shape, key=own)

    return normals

"""GPTQ: rounds column by column and lets the columns that remain make up for the error.

Scales and biases of all groups are fixed before the first column, so columns can be visited by
importance and still be stored in their own order. NumPy or MLX.

Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323).
"""

from __future__ import annotations

import numpy as np

from apertus_mlx.quant import search
from apertus_mlx.quant.affine import AffineCodes, ScaleType
from apertus_mlx.quant.arrays import Array, Float32, Float64, as_library, blocks, library, settled
from apertus_mlx.quant.columns import Columns
from apertus_mlx.quant.curvature import DAMPING, Curvature
from apertus_mlx.quant.one_thread import one_thread
from apertus_mlx.quant.rounding import Grid, settle
from apertus_mlx.quant.spec import QuantSpec

BLOCK_COLUMNS = 256


def fit(
    weight: Float32,
    spec: QuantSpec,
    second_moments: Float32 | Float64,
    scale_type: ScaleType = "BF16",
    *,
    damping: float = DAMPING,
) -> AffineCodes:
    """Quantize `weight` `[rows, columns]` for inputs with `second_moments` `[columns, columns]`.

    Scales come from `search`. Rows for which its own rounding is better (on the damped objective)
    keep it, so the result is never worse.

    Raises:
        ValueError: weights or moments are not usable.
    """
    curvature = Curvature.of(np.array(second_moments, np.float32), damping)
    target = np.ascontiguousarray(weight.T)
    start = search.fit_columns(target, spec, curvature.diagonal, scale_type)
    found = round_in_order(target, start, curvature)
    return better_rows(target, found, start, curvature).as_codes()


def round_in_order(
    target: Array,
    grid: Columns,
    curvature: Curvature,
    block_columns: int = BLOCK_COLUMNS,
) -> Columns:
    """Codes for `target` `[columns, rows]` on the scales and biases of `grid`.

    With `H = L L^T` the objective is a sum over columns k of squares of what the errors at and
    behind k come to through L. From the last column on, each is moved by what those behind it left
    over: what GPTQ does, without the inverse. So the columns to round first stand last.
    """
    xp = library(target)
    order, factor = as_library(curvature.order, target), curvature.factor
    groups = as_library(curvature.order // grid.spec.group_size, target)
    values = target[order]
    # From here on from the last column to the first.
    codes, errors = xp.zeros_like(values), xp.zeros_like(values)
    for part in reversed(list(blocks(len(values), block_columns))):
        own = factor[part, part]
        diagonal = xp.diagonal(own)[:, None]
        moved = values[part]
        if part.stop < len(values):
            moved = moved + (factor[part.stop :, part].T @ errors[part.stop :]) / diagonal
        form = groups[part][::-1]
        transfer = (own / diagonal[:, 0])[::-1, ::-1]
        with one_thread():
            found, left = settle(
                moved[::-1], values[part][::-1], transfer, (1 << grid.spec.bits) - 1,
                Grid(grid.scales[form], grid.biases[form]),
            )  # fmt: skip
        codes[part], errors[part] = found[::-1], left[::-1]
        settled(codes, errors)
    return grid.with_codes(codes[as_library(np.argsort(curvature.order), target)])


def better_rows(target: Array, first: Columns, second: Columns, curvature: Curvature) -> Columns:
    """Row by row whichever has the smaller error; the first where equal."""
    errors = [row_errors(target, columns, curvature) for columns in (first, second)]
    return first.where(errors[0] <= errors[1], second)


def row_errors(target: Array, quantized: Columns, curvature: Curvature) -> Array:
    """What the objective comes to for each row `[rows]`."""
    off = quantized.values() - target
    return ((curvature.moments @ off) * off).sum(0)

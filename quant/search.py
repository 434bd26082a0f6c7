"""Scale and bias of each group that leave the least squared error. NumPy or MLX.

Rounding to nearest between the extremes of a group spends its few codes on outliers. Here several
narrower ranges are tried, the best is kept, and least squares and rounding alternate from there.
The error is weighted by what each column is multiplied with, where that is known, and it is
measured with scales and biases as they will be stored.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from apertus_mlx.quant.affine import (
    AffineCodes,
    ScaleType,
    as_groups,
    nearest_grid,
    round_scales,
    usable_scales,
)
from apertus_mlx.quant.arrays import Array, Float32, as_library, blocks, library, settled
from apertus_mlx.quant.columns import Columns
from apertus_mlx.quant.rounding import nearest
from apertus_mlx.quant.spec import QuantSpec

# Weights at a time: their working set stays in a core's cache, and each call is worth its price.
BLOCK_WEIGHTS = 1 << 15
# On a GPU more of them pay for starting its kernels. It holds some twenty times as much.
SETTLED_WEIGHTS = 1 << 20
# Smallest range tried, as a share of the whole, by bits; few codes gain most from a narrow range.
NARROWEST = {2: 0.5, 3: 0.6, 4: 0.7, 5: 0.8, 6: 0.85, 8: 0.95}


class Effort(NamedTuple):
    """How many ranges are tried, and how often least squares and rounding take turns."""

    ranges: int
    refits: int


THOROUGH = Effort(16, 4)
# Where scales are found anew later, which costs some 0.3 % of the error there.
QUICK = Effort(8, 2)
# Where formats are only compared.
ROUGH = Effort(4, 1)


def fit(
    weight: Array,
    spec: QuantSpec,
    moments: Float32 | None = None,
    scale_type: ScaleType = "BF16",
) -> AffineCodes:
    """Quantize `weight` `[rows, columns]` with the least weighted squared error that is found.

    Args:
        weight: finite numbers.
        spec: an affine format.
        moments: mean square of the input of each column `[columns]`; None counts all alike.
        scale_type: what scales and biases will be stored in.

    Returns:
        Codes whose error is at most that of `affine.fit`, row by row.

    Raises:
        ValueError: weights or moments are not usable.
    """
    as_groups(weight, spec)
    target = np.ascontiguousarray(weight.T) if library(weight) is np else weight.T
    return fit_columns(target, spec, moments, scale_type).as_codes()


def fit_columns(
    target: Array,
    spec: QuantSpec,
    moments: Float32 | None,
    scale_type: ScaleType,
    effort: Effort = THOROUGH,
) -> Columns:
    """The same for a finite `target` `[columns, rows]` of NumPy or MLX."""
    columns, rows = target.shape
    importance = column_importance(moments, spec, columns // spec.group_size)
    grouped = target.reshape(-1, spec.group_size, rows)
    if library(target) is not np:
        weights, parts = as_library(importance, target), []
        for part in blocks(rows, SETTLED_WEIGHTS // columns):
            some = grouped[..., part]
            grid = _search(some, weights, spec.bits, scale_type, effort)
            parts.append((_codes(some, *grid, (1 << spec.bits) - 1), *grid))
            # Or MLX would hold what all ranges take of all rows.
            settled(*parts[-1])
        whole = [library(target).concatenate(each, axis=-1) for each in zip(*parts, strict=True)]
        return Columns(whole[0].reshape(target.shape), whole[1], whole[2], spec)
    codes = np.empty(grouped.shape, np.float32)
    scales, biases = (np.empty((len(grouped), rows), np.float32) for _ in range(2))
    for groups in blocks(len(grouped), BLOCK_WEIGHTS // (spec.group_size * rows)):
        for part in blocks(rows, BLOCK_WEIGHTS // spec.group_size):
            here = groups, slice(None), part
            # Squares of enormous weights are infinite, and then no reason to change anything.
            with np.errstate(over="ignore"):
                found = _search(grouped[here], importance[groups], spec.bits, scale_type, effort)
            scales[groups, part], biases[groups, part] = found
            codes[here] = _codes(grouped[here], *found, (1 << spec.bits) - 1)
    return Columns(codes.reshape(target.shape), scales, biases, spec)


def column_importance(moments: Float32 | None, spec: QuantSpec, groups: int) -> Float32:
    """Weights `[groups, group_size]` of mean one per group, never quite zero."""
    if moments is None:
        return np.ones((groups, spec.group_size), np.float32)
    if not np.isfinite(moments).all() or (moments < 0).any():
        raise ValueError("moments are not finite and non-negative")
    grouped = np.asarray(moments, np.float64).reshape(groups, spec.group_size)
    grouped = grouped + 1e-3 * max(float(grouped.mean()), 1e-30)
    return np.asarray(grouped / grouped.mean(-1, keepdims=True), np.float32)


_Grid = tuple[Array, Array]


def _search(
    values: Array, importance: Array, bits: int, scale_type: ScaleType, effort: Effort
) -> _Grid:
    """Scales and biases `[..., rows]` of groups `[..., group_size, rows]`."""
    top = (1 << bits) - 1
    lower, upper = values.min(-2), values.max(-2)
    middle, reach = (lower + upper) * 0.5, (upper - lower) * 0.5
    narrowed, least = None, None
    shares = np.linspace(1.0, NARROWEST[bits], effort.ranges).astype(np.float32)
    # Scales of all ranges at once: `[ranges, ..., rows]`.
    share = as_library(shares.reshape(-1, *[1] * reach.ndim), reach)
    tried = usable_scales(round_scales(reach * (2 / top * share), scale_type), scale_type)
    starts = round_scales(middle - share * reach, scale_type)
    for scales, biases in zip(tried, starts, strict=True):
        trial = scales, biases
        # In units of the scale, which spares a product for each weight.
        off = _steps(values, *trial)
        off -= nearest(off + 0, top)
        off *= off
        narrowed, least = _better(trial, _sum(importance, off) * (scales * scales), narrowed, least)
    best, least = None, None
    for grid in (nearest_grid(lower, upper, bits, scale_type), narrowed):
        assert grid is not None
        codes = _codes(values, *grid, top)
        best, least = _better(grid, _error(values, importance, *grid, codes), best, least)
    assert best is not None
    trial, codes = best, _codes(values, *best, top)
    for _ in range(effort.refits):
        trial = _refit(values, importance, codes, trial[0], scale_type)
        codes = _codes(values, *trial, top)
        best, least = _better(trial, _error(values, importance, *trial, codes), best, least)
    return best


def _steps(values: Array, scales: Array, biases: Array) -> Array:
    """How many times the scale each value is from the bias."""
    inverse = 1 / scales
    steps = values * inverse[..., None, :]
    steps -= (biases * inverse)[..., None, :]
    return steps


def _codes(values: Array, scales: Array, biases: Array, top: int) -> Array:
    return nearest(_steps(values, scales, biases), top)


def _error(values: Array, importance: Array, scales: Array, biases: Array, codes: Array) -> Array:
    off = codes * scales[..., None, :]
    off += biases[..., None, :]
    off -= values
    off *= off
    return _sum(importance, off)


def _sum(importance: Array, values: Array) -> Array:
    """Weighted sums over the columns of each group, `[..., rows]`."""
    return (importance[..., None, :] @ values)[..., 0, :]


def _better(trial: _Grid, error: Array, best: _Grid | None, least: Array) -> tuple[_Grid, Array]:
    if best is None:
        return trial, error
    xp = library(error)
    wins = error < least
    scales, biases = (xp.where(wins, new, old) for new, old in zip(trial, best, strict=True))
    return (scales, biases), xp.minimum(error, least)


def _refit(
    values: Array, importance: Array, codes: Array, scales: Array, scale_type: ScaleType
) -> _Grid:
    """Least squares for `codes`: the rounded scale first and the bias for it."""
    xp = library(values)
    total = importance.sum(-1)[..., None]
    mean_code = _sum(importance, codes) / total
    mean_value = _sum(importance, values) / total
    centered = codes - mean_code[..., None, :]
    spread = _sum(importance, centered * centered)
    shared = _sum(importance, centered * values)
    usable = spread > 1e-6 * total
    fitted = xp.where(usable, shared / xp.where(usable, spread, 1), scales)
    fitted = usable_scales(round_scales(fitted, scale_type), scale_type)
    return fitted, round_scales(mean_value - fitted * mean_code, scale_type)

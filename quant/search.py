"""Scale and bias of each group that leave the least squared error. NumPy only.

Rounding to nearest between the extremes of a group spends its few codes on outliers. Here several
narrower ranges are tried, the best is kept, and least squares and rounding alternate from there.
The error is weighted by what each column is multiplied with, where that is known, and it is
measured with scales and biases as they will be stored.
"""

from __future__ import annotations

import numpy as np

from apertus_mlx.quant import affine
from apertus_mlx.quant.affine import (
    AffineCodes,
    ScaleType,
    as_groups,
    from_groups,
    round_scales,
    usable_scales,
)
from apertus_mlx.quant.arrays import Float32, blocks
from apertus_mlx.quant.spec import QuantSpec

# Groups at a time: their working set stays in a core's cache.
BLOCK_WEIGHTS = 1 << 16
# Smallest range tried, as a share of the whole, by bits; few codes gain most from a narrow range.
NARROWEST = {2: 0.5, 3: 0.6, 4: 0.7, 5: 0.8, 6: 0.85, 8: 0.95}
RANGES = 16
REFITS = 4


def fit(
    weight: Float32,
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
    groups = np.ascontiguousarray(as_groups(weight, spec), np.float32)
    importance = column_importance(moments, spec, groups.shape[1])
    start = affine.fit(weight, spec, scale_type)
    scales, biases = start.scales.copy(), start.biases.copy()
    codes = as_groups(start.codes.astype(np.float32), spec).astype(np.uint8)
    for block in blocks(len(groups), BLOCK_WEIGHTS // weight.shape[1]):
        scales[block], biases[block], codes[block] = _search(
            groups[block], importance, spec.bits, scale_type,
            (scales[block], biases[block], codes[block].astype(np.float32)),
        )  # fmt: skip
    return from_groups(codes, scales, biases, spec)


def column_importance(moments: Float32 | None, spec: QuantSpec, groups: int) -> Float32:
    """Weights `[groups, group_size]` of mean one per group, never quite zero."""
    if moments is None:
        return np.ones((groups, spec.group_size), np.float32)
    if not np.isfinite(moments).all() or (moments < 0).any():
        raise ValueError("moments are not finite and non-negative")
    grouped = np.asarray(moments, np.float64).reshape(groups, spec.group_size)
    grouped = grouped + 1e-3 * max(float(grouped.mean()), 1e-30)
    return np.asarray(grouped / grouped.mean(-1, keepdims=True), np.float32)


_Form = tuple[Float32, Float32, Float32]


def _search(
    values: Float32, importance: Float32, bits: int, scale_type: ScaleType, start: _Form
) -> _Form:
    top = (1 << bits) - 1
    lower, upper = values.min(-1), values.max(-1)
    middle, reach = (lower + upper) / 2, (upper - lower) / 2
    best, least = start, _error(values, importance, *start)
    for share in np.linspace(1.0, NARROWEST[bits], RANGES, dtype=np.float32):
        scales = usable_scales(round_scales(2 * share * reach / top, scale_type), scale_type)
        biases = round_scales(middle - share * reach, scale_type)
        trial = _assigned(values, scales, biases, top)
        best, least = _better(values, importance, trial, best, least)
    for _ in range(REFITS):
        trial = _refit(values, importance, best, top, scale_type)
        best, least = _better(values, importance, trial, best, least)
    return best


def _assigned(values: Float32, scales: Float32, biases: Float32, top: int) -> _Form:
    codes = np.asarray((values - biases[..., None]) * (1 / scales)[..., None], np.float32)
    np.rint(codes, out=codes)
    np.clip(codes, 0, top, out=codes)
    return scales, biases, codes


def _error(
    values: Float32, importance: Float32, scales: Float32, biases: Float32, codes: Float32
) -> Float32:
    off = codes * scales[..., None]
    off += biases[..., None]
    off -= values
    return np.asarray(np.einsum("rgi,rgi,gi->rg", off, off, importance), np.float32)


def _better(
    values: Float32, importance: Float32, trial: _Form, best: _Form, least: Float32
) -> tuple[_Form, Float32]:
    error = _error(values, importance, *trial)
    wins = error < least
    scales, biases, codes = (
        np.where(wins[..., None] if new.ndim == 3 else wins, new, old)
        for new, old in zip(trial, best, strict=True)
    )
    return (scales, biases, codes), np.minimum(error, least)


def _refit(
    values: Float32, importance: Float32, form: _Form, top: int, scale_type: ScaleType
) -> _Form:
    """Least squares for the codes as they are, rounded scale first and bias for it, then codes."""
    scales, _, codes = form
    total = importance.sum(-1)
    mean_code = np.einsum("rgi,gi->rg", codes, importance) / total
    mean_value = np.einsum("rgi,gi->rg", values, importance) / total
    centered = codes - mean_code[..., None]
    spread = np.einsum("rgi,rgi,gi->rg", centered, centered, importance)
    shared = np.einsum("rgi,rgi,gi->rg", centered, values, importance)
    fitted = np.divide(shared, spread, out=scales.copy(), where=spread > 1e-6 * total)
    fitted = usable_scales(round_scales(fitted, scale_type), scale_type)
    return _assigned(values, fitted, round_scales(mean_value - fitted * mean_code, scale_type), top)

"""Finds the quantization grid on which weights already lie, group by group. NumPy only.

Weights that were trained with quantization in the loop, or dequantized before they were saved,
take few values per group: `scale * code + bias`, rounded to the type they are stored in.
Round-to-nearest derives a grid of its own from the extremes and misses that one in many groups.
Here a grid is accepted only if it gives every value of the group back, so nothing random passes.

Two kinds are looked for. Zero on the grid (symmetric, or with an integer zero point): values are
`scale * k`; each value and its k bound the scale, and the bounds of a group must overlap. MLX's
own: the value of largest size is the bias, at code 0, and `-bias / scale` is nearly an integer.

Undecidable, and reported as no grid: a scale whose codes differ by less than the stored type can
tell (8 bits in bfloat16, at the far end); grids without zero that are not MLX's; a float32 scale
whose product with its zero point takes more than float32 has; groups other than those asked for,
unless they are multiples. Where several grids give the same values (few distinct
values in a group) any of them is right.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from apertus_mlx.quant.arrays import Float32, Float64

Rows = npt.NDArray[np.intp]
# `mlx`: made by MLX's affine quantization, dequantized in 16 bits. `exact`: multiples of a scale,
# in the type of the weights; `exact32`: the same with scale and bias in float32.
Kind = Literal["mlx", "exact", "exact32"]
KINDS: tuple[Kind, ...] = ("mlx", "exact", "exact32")
# Significant bits of the types that weights are stored in.
SIGNIFICANT_BITS = {"BF16": 8, "F16": 11, "F32": 24}
# Exponents of the smallest subnormal numbers, by significant bits.
SMALLEST_EXPONENTS = {8: -133, 11: -24, 24: -149}
# How many codes the values nearest to zero and the far end may stay away from where they could be.
SMALLEST_STEPS = 4
FAR_END_STEPS = 4


@dataclass(frozen=True, slots=True)
class Grid:
    """Codes `[n, group]`, scales and biases `[n]` of n groups, and which groups lie on a grid."""

    codes: npt.NDArray[np.uint8]
    scales: Float64
    biases: Float64
    found: npt.NDArray[np.bool_]


def can_lie(values: Float32, bits: int) -> bool:
    """Whether no group of `values` `[n, group]` takes more values than there are codes.

    Quick to find, and enough to tell ordinary weights of few bits.
    """
    if values.shape[1] <= 1 << bits:
        return True
    ordered = np.sort(values, axis=1)
    return bool(((np.diff(ordered, axis=1) != 0).sum(1) < 1 << bits).all())


def recover(values: Float64, bits: int, dtype: str, kind: Kind) -> Grid:
    """The grid of each group of `values` `[n, group]`.

    Args:
        values: what is stored, exactly.
        bits: codes are below `2 ** bits`.
        dtype: type of the stored values: BF16, F16 or F32.
        kind: which grids to look for, see `Kind`.

    Returns:
        For all elements of the groups in `found`, with `round` to `dtype`: in the kind `mlx`
        `round(round(scale * code) + bias) == value`, as MLX computes in 16 bits; else
        `round(scale * code + bias) == value`.
    """
    significant = SIGNIFICANT_BITS[dtype]
    grid = Grid(
        np.zeros(values.shape, np.uint8),
        np.zeros(len(values)),
        np.zeros(len(values)),
        np.zeros(len(values), bool),
    )
    _constant(values, grid)
    if kind == "mlx":
        for largest_first in (True, False):
            _from_edge(values, bits, significant, largest_first, grid)
    else:
        # Short enough that its product with a zero point is exact in float32, if that will do.
        lengths = (significant,) if kind == "exact" else (significant, 24 - bits, 24)
        _through_zero(values, bits, significant, lengths, grid)
    return grid


def round_to(numbers: Float64, significant: int) -> Float64:
    """Round to `significant` bits, ties to even, and no finer than the type of that length is."""
    _, exponent = np.frexp(numbers)
    unit = _last_place(exponent, significant)
    rounded: Float64 = np.ldexp(np.rint(np.ldexp(numbers, -unit)), unit)
    return rounded


def _last_place(exponent: npt.NDArray[np.int32], significant: int) -> npt.NDArray[np.int32]:
    """Exponent of the last place of numbers below `2 ** exponent`."""
    return np.maximum(exponent - significant, SMALLEST_EXPONENTS.get(significant, -149))


def _constant(values: Float64, grid: Grid) -> None:
    """Groups of one value: code 0, the value as bias."""
    same = np.flatnonzero((values == values[:, :1]).all(1))
    grid.scales[same] = np.where(values[same, 0] == 0, 1.0, np.abs(values[same, 0]))
    grid.biases[same] = values[same, 0]
    grid.found[same] = True


def _through_zero(
    values: Float64, bits: int, significant: int, lengths: tuple[int, ...], grid: Grid
) -> None:
    """Groups of `scale * k` with k in a range of `2 ** bits` integers around zero."""
    sizes = np.abs(values)
    largest = sizes.max(1)
    smallest = np.where(sizes > 0, sizes, np.inf).min(1)
    for steps in range(1, SMALLEST_STEPS + 1):
        count = np.rint(steps * largest / smallest)
        rows = np.flatnonzero(~grid.found & (count >= 1) & (count < 1 << bits))
        if rows.size:
            _fit_scale(values, rows, count[rows], bits, significant, lengths, grid)


def _fit_scale(
    values: Float64,
    rows: Rows,
    count: Float64,
    bits: int,
    significant: int,
    lengths: tuple[int, ...],
    grid: Grid,
) -> None:
    """Accept the groups `rows` whose largest value is `count` steps from zero."""
    group = values[rows]
    guess = np.abs(group).max(1) / count
    steps = np.rint(group / guess[:, None])
    sizes = np.abs(steps)
    # A stored value stands for all numbers within half a unit of its last place.
    mantissa, exponent = np.frexp(np.abs(group))
    above = np.ldexp(0.5, _last_place(exponent, significant))
    below = np.where(mantissa == 0.5, above / 2, above)
    with np.errstate(divide="ignore", invalid="ignore"):
        low = np.where(sizes > 0, (np.abs(group) - below) / sizes, 0).max(1)
        high = np.where(sizes > 0, (np.abs(group) + above) / sizes, np.inf).min(1)
    first, last = steps.min(1), steps.max(1)
    top = (1 << bits) - 1
    zero = np.clip(1 << (bits - 1), -first, np.maximum(top - last, -first))
    codes = steps + zero[:, None]
    possible = (low <= high) & (last - first <= top)
    middle = (low + high) / 2
    for length in lengths:
        for number in (middle, low, high):
            scale = round_to(number, length)
            bias = -zero * scale
            exact = round_to(scale[:, None] * codes + bias[:, None], significant) == group
            fitting = possible & exact.all(1) & (round_to(bias, max(lengths)) == bias)
            fitting &= ~grid.found[rows]
            _accept(grid, rows, fitting, codes, scale, bias)


def _from_edge(
    values: Float64, bits: int, significant: int, largest_first: bool, grid: Grid
) -> None:
    """Groups as MLX dequantizes its affine format in the type that they are stored in."""
    left = np.flatnonzero(~grid.found)
    if not left.size:
        return
    group = values[left]
    top = (1 << bits) - 1
    lower, upper = group.min(1), group.max(1)
    # Rounding can make the far end larger than the edge, so both are tried.
    take_upper = (np.abs(upper) > np.abs(lower)) == largest_first
    edge, other = np.where(take_upper, upper, lower), np.where(take_upper, lower, upper)
    share = edge / (edge - other)
    lowest = max(1, top - FAR_END_STEPS) if bits > 4 else 1
    for far in range(top, lowest - 1, -1):
        steps = np.rint(far * share)
        now = np.flatnonzero(~grid.found[left] & (steps >= 1) & (steps <= top))
        if not now.size:
            continue
        chosen, bias = group[now], edge[now]
        # MLX divides in float32 and then rounds.
        quotient = bias.astype(np.float32) / steps[now].astype(np.float32)
        scale = -round_to(quotient.astype(np.float64), significant)
        near = np.rint((chosen - bias[:, None]) / scale[:, None])
        codes = np.full(chosen.shape, np.nan)
        for shift in (0, -1, 1):
            tries = np.clip(near + shift, 0, top)
            rounded = round_to(scale[:, None] * tries, significant) + bias[:, None]
            same = round_to(rounded, significant) == chosen
            codes = np.where(np.isnan(codes) & same, tries, codes)
        fitting = ~np.isnan(codes).any(1)
        _accept(grid, left[now], fitting, np.nan_to_num(codes), scale, bias)


def _accept(
    grid: Grid,
    rows: Rows,
    fitting: npt.NDArray[np.bool_],
    codes: Float64,
    scale: Float64,
    bias: Float64,
) -> None:
    taken = rows[fitting]
    grid.codes[taken] = codes[fitting].astype(np.uint8)
    grid.scales[taken] = scale[fitting]
    grid.biases[taken] = bias[fitting]
    grid.found[taken] = True

"""Rounds columns one after the other, each after what those before have left over.

Columns are rows here, so that each step works on contiguous memory. NumPy or MLX.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from apertus_mlx.quant.arrays import Array, Float32, blocks, library

# Columns that are rounded between two products.
STEP_COLUMNS = 16


def nearest(steps: Array, top: int) -> Array:
    """The codes nearest to `steps`, which NumPy overwrites by them."""
    xp = library(steps)
    if xp is not np:
        return xp.clip(xp.round(steps), 0, top)
    np.rint(steps, out=steps)
    # Of a whole block three times as quick as the smaller and the larger of two.
    return np.clip(steps, 0, top, out=steps)


@dataclass(frozen=True, slots=True)
class Grid:
    """The scales and biases `[columns, rows]` of columns of several groups."""

    scales: Array
    biases: Array

    def part(self, part: slice) -> Grid:
        """Of some of the columns."""
        return Grid(self.scales[part], self.biases[part])


def settle(
    wanted: Array, base: Array, transfer: Array, top: int, grid: Grid | None = None
) -> tuple[Array, Array]:
    """Codes of columns, and what is left of `base`, both `[columns, rows]`.

    Args:
        wanted: what each column should come to if those before it left nothing.
        base: what is left of it is passed on.
        transfer: what column j is to make up for, of what an earlier column i left: the element
            `[i, j]` of `[columns, columns]`.
        top: the largest code.
        grid: of the values; without one, `wanted` and `base` are in units of one scale, counted
            from one bias.
    """
    xp = library(wanted)
    if xp is np:
        return _settle_in_place(np.array(wanted, order="C"), base, transfer, top, grid)
    codes: list[Array] = []
    left: list[Array] = []
    for part in blocks(len(wanted), STEP_COLUMNS):
        here = wanted[part]
        if part.start:
            here = here + transfer[: part.start, part].T @ xp.concatenate(left)
        few = None if grid is None else grid.part(part)
        found, rest = _settle_few(here, base[part], transfer[part, part], top, few)
        codes.append(found)
        left.append(rest)
    return xp.concatenate(codes), xp.concatenate(left)


def _settle_few(
    wanted: Array, base: Array, transfer: Array, top: int, grid: Grid | None
) -> tuple[Array, Array]:
    xp = library(wanted)
    inverses = None if grid is None else 1 / grid.scales
    wanted = wanted + 0
    codes, left = [], []
    for column in range(len(wanted)):
        if grid is None or inverses is None:
            codes.append(nearest(wanted[column] + 0, top))
            left.append(base[column] - codes[-1])
        else:
            scale, bias = grid.scales[column], grid.biases[column]
            codes.append(nearest((wanted[column] - bias) * inverses[column], top))
            left.append(base[column] - (codes[-1] * scale + bias))
        if column + 1 < len(wanted):
            wanted[column + 1 :] += transfer[column, column + 1 :, None] * left[-1]
    return xp.stack(codes), xp.stack(left)


def _settle_in_place(
    codes: Float32, base: Float32, transfer: Float32, top: int, grid: Grid | None
) -> tuple[Float32, Float32]:
    """What `settle` does, by NumPy: `codes` are what was wanted, and nothing else is copied."""
    left = np.empty_like(codes)
    passed_on = np.empty_like(codes[:STEP_COLUMNS])
    # Beside a row NumPy finds the larger of two quicker than beside a number.
    lowest = np.zeros_like(codes[0])
    highest = lowest + np.float32(top)
    inverses = None if grid is None else 1 / grid.scales
    for part in blocks(len(codes), STEP_COLUMNS):
        here, own = codes[part], transfer[part, part]
        if part.start:
            here += transfer[: part.start, part].T @ left[: part.start]
        for column in range(len(here)):
            code, place = here[column], part.start + column
            rest = left[place]
            if grid is not None and inverses is not None:
                code -= grid.biases[place]
                code *= inverses[place]
            np.rint(code, out=code)
            np.maximum(code, lowest, out=code)
            np.minimum(code, highest, out=code)
            if grid is None:
                np.subtract(base[place], code, out=rest)
            else:
                np.multiply(code, grid.scales[place], out=rest)
                rest += grid.biases[place]
                np.subtract(base[place], rest, out=rest)
            behind = here[column + 1 :]
            few = passed_on[: len(behind)]
            np.multiply(own[column, column + 1 :, None], rest, out=few)
            behind += few
    return codes, left

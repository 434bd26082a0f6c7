"""Lowers GPTQ's objective further: better codes, then better scales for them, in turn.

Codes: each column is set to the best value that all others leave it, over and over (coordinate
descent, as in "QuantEase", arXiv 2309.01885). Scales and biases: with codes fixed the output is
linear in them, so those of a whole row are solved for at once. NumPy only.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import numpy.typing as npt

from apertus_mlx.quant.affine import AffineCodes, ScaleType, dequantize, round_scales, usable_scales
from apertus_mlx.quant.arrays import Float32, Float64, blocks
from apertus_mlx.quant.gptq import BLOCK_COLUMNS, better_rows

ROUNDS = 4
# A round that gains a smaller share than this is the last.
LEAST_GAIN = 0.005
# Pull of scales and biases towards what they are, relative to the curvature; keeps the system
# solvable where a group has one code only.
RIDGE = 1e-4
# Rows whose normal equations are held at once.
BLOCK_NUMBERS = 1 << 22


def improve(
    weight: Float32,
    start: AffineCodes,
    moments: Float64,
    scale_type: ScaleType = "BF16",
    rounds: int = ROUNDS,
) -> AffineCodes:
    """Codes, scales and biases whose objective is at most that of `start`, row by row.

    Args:
        weight: what to come close to, `[rows, columns]`.
        start: any quantization of it.
        moments: positive definite `[columns, columns]`.
        scale_type: what scales and biases will be stored in.
        rounds: how often codes and scales take turns.
    """
    best, error = start, np.inf
    for _ in range(rounds):
        trial = refit_scales(weight, best, moments, scale_type)
        trial = descend(weight, trial, moments)
        best, errors = better_rows(weight, moments, trial, best)
        if errors.sum() > (1 - LEAST_GAIN) * error:
            break
        error = float(errors.sum())
    return best


def descend(weight: Float32, start: AffineCodes, moments: Float64) -> AffineCodes:
    """One pass over all columns; each code becomes the best for all others as they are."""
    curvature = moments.astype(np.float32)
    group_size = start.spec.group_size
    values = np.ascontiguousarray(dequantize(start).T)
    scales = np.ascontiguousarray(start.scales.T)
    biases = np.ascontiguousarray(start.biases.T)
    codes = np.empty(values.shape, np.uint8)
    slope = curvature @ (values - weight.T)
    top = np.float32((1 << start.spec.bits) - 1)
    for part in blocks(len(values), BLOCK_COLUMNS):
        first, last = part.start, part.stop
        moved = np.empty((last - first, values.shape[1]), np.float32)
        for column in range(first, last):
            scale, bias = scales[column // group_size], biases[column // group_size]
            wanted = values[column] - slope[column] / curvature[column, column]
            code = np.clip(np.rint((wanted - bias) / scale), 0, top)
            codes[column] = code
            step = code * scale + bias - values[column]
            slope[column + 1 : last] += curvature[column + 1 : last, column, None] * step
            moved[column - first] = step
        slope[last:] += curvature[last:, first:last] @ moved
    return replace(start, codes=np.ascontiguousarray(codes.T))


def refit_scales(
    weight: Float32, start: AffineCodes, moments: Float64, scale_type: ScaleType
) -> AffineCodes:
    """Scales and biases of least error for the codes of `start`, rounded as they are stored.

    The scales are rounded first, then the biases are solved for again.
    """
    rows, columns = weight.shape
    groups = start.scales.shape[1]
    scales, biases = start.scales.copy(), start.biases.copy()
    per_row = max(4 * groups * groups, 4 * columns)
    for block in blocks(rows, BLOCK_NUMBERS // per_row):
        off = weight[block] - dequantize(
            AffineCodes(start.codes[block], scales[block], biases[block], start.spec)
        )
        normal, right = _normal_equations(start.codes[block], off, moments, groups)
        step = _solve(normal, right)
        old = scales[block]
        new = usable_scales(round_scales(old + step[:, :groups].astype(np.float32), scale_type),
                            scale_type)  # fmt: skip
        moved = (new - old).astype(np.float64)
        rest = right[:, groups:] - np.einsum("rhg,rg->rh", normal[:, groups:, :groups], moved)
        bias_step = _solve(normal[:, groups:, groups:], rest)
        scales[block] = new
        biases[block] = round_scales(biases[block] + bias_step.astype(np.float32), scale_type)
    return replace(start, scales=scales, biases=biases)


def _normal_equations(
    codes: npt.NDArray[np.uint8], off: Float32, moments: Float64, groups: int
) -> tuple[Float64, Float64]:
    """The system `[rows, 2 groups, 2 groups]` for steps of scales, then of biases."""
    rows, columns = codes.shape
    size = columns // groups
    curvature = moments.astype(np.float32)
    grouped = codes.reshape(rows, groups, size).astype(np.float32)
    normal = np.empty((rows, 2 * groups, 2 * groups))
    for group in range(groups):
        part = slice(group * size, (group + 1) * size)
        seen = (grouped[:, group] @ curvature[part]).reshape(rows, groups, size)
        normal[:, group, :groups] = np.einsum("rgi,rgi->rg", seen, grouped)
        normal[:, group, groups:] = seen.sum(-1)
    normal[:, groups:, :groups] = normal[:, :groups, groups:].transpose(0, 2, 1)
    normal[:, groups:, groups:] = moments.reshape(groups, size, groups, size).sum((1, 3))
    pulled = (off @ curvature).reshape(rows, groups, size)
    right = np.concatenate([np.einsum("rgi,rgi->rg", pulled, grouped), pulled.sum(-1)], 1)
    return normal, right.astype(np.float64)


def _solve(normal: Float64, right: Float64) -> Float64:
    index = np.arange(normal.shape[1])
    diagonal = normal[:, index, index]
    damped = normal.copy()
    damped[:, index, index] += RIDGE * diagonal + 1e-9 * (1 + diagonal.max(1, keepdims=True))
    return np.asarray(np.linalg.solve(damped, right[..., None])[..., 0], np.float64)

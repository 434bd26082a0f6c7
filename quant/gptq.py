"""GPTQ: rounds column by column and lets the columns that remain make up for the error. NumPy only.

The objective is the squared error of the outputs, `trace((W - Q) H (W - Q)^T)`, where H is the
second moment of the inputs. Scales and biases of all groups are fixed before the first column, so
columns can be visited by importance and still be stored in their own order.

Source: "GPTQ: Accurate Post-Training Quantization for Generative Pre-trained Transformers"
(arXiv 2210.17323).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from apertus_mlx.quant import search
from apertus_mlx.quant.affine import AffineCodes, ScaleType, dequantize
from apertus_mlx.quant.arrays import Float32, Float64
from apertus_mlx.quant.spec import QuantSpec

BLOCK_COLUMNS = 128
# Share of the mean diagonal that is added to it; ten times more until the matrix factors.
DAMPING = 0.01


def fit(
    weight: Float32,
    spec: QuantSpec,
    second_moments: Float32 | Float64,
    scale_type: ScaleType = "BF16",
    *,
    damping: float = DAMPING,
    block_columns: int = BLOCK_COLUMNS,
) -> AffineCodes:
    """Quantize `weight` `[rows, columns]` for inputs with `second_moments` `[columns, columns]`.

    Scales come from `search`. Rows for which its own rounding is better (on the damped objective)
    keep it, so the result is never worse.

    Raises:
        ValueError: weights or moments are not usable.
    """
    moments = damped(second_moments, damping)
    start = search.fit(weight, spec, np.diag(moments).astype(np.float32), scale_type)
    codes = round_in_order(weight, start, moments, block_columns)
    trial = AffineCodes(codes, start.scales, start.biases, spec)
    return better_rows(weight, moments, trial, start)[0]


def damped(second_moments: Float32 | Float64, damping: float = DAMPING) -> Float64:
    """A positive definite neighbour of `second_moments`, scaled to a mean diagonal of one.

    Columns that never see an input get the mean diagonal, so their weights are simply rounded.

    Raises:
        ValueError: not a square matrix of finite numbers with a diagonal that is not negative.
    """
    moments = np.array(second_moments, np.float64)
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1]:
        raise ValueError(f"second moments of shape {moments.shape}: expected a square")
    diagonal = np.diag(moments).copy()
    if not np.isfinite(moments).all() or (diagonal < 0).any():
        raise ValueError("second moments are not finite and non-negative")
    mean = diagonal.mean()
    if mean <= 0:
        return np.eye(len(moments))
    moments = (moments + moments.T) / (2 * mean)
    index = np.arange(len(moments))
    dead = diagonal == 0
    moments[dead] = moments[:, dead] = 0
    moments[index[dead], index[dead]] = 1
    added = max(damping, 1e-9)
    while True:
        trial = moments.copy()
        trial[index, index] += added
        try:
            np.linalg.cholesky(trial)
        except np.linalg.LinAlgError:
            added *= 10
        else:
            return np.asarray(trial)


def round_in_order(
    weight: Float32, grid: AffineCodes, moments: Float64, block_columns: int
) -> npt.NDArray[np.uint8]:
    """Codes on the scales and biases of `grid`, columns of the largest diagonal first.

    With `moments = L L^T` the objective is a sum over columns k of squares of what the errors at
    and behind k come to through L. From the last column on, each is moved by what those behind it
    left over: what GPTQ does, without the inverse. So the columns to visit first stand last.
    """
    order = np.argsort(-np.diag(moments), kind="stable")[::-1]
    factor = np.linalg.cholesky(moments[np.ix_(order, order)])
    factor = (factor / np.diag(factor)).astype(np.float32)
    group = order // grid.spec.group_size
    # Columns are rows here: each step works on contiguous memory.
    values = np.ascontiguousarray(weight.T[order], np.float32)
    scales = np.ascontiguousarray(grid.scales.T)
    biases = np.ascontiguousarray(grid.biases.T)
    errors = np.empty_like(values)
    codes = np.empty(values.shape, np.uint8)
    top = np.float32((1 << grid.spec.bits) - 1)
    for last in range(len(order), 0, -block_columns):
        first = max(0, last - block_columns)
        moved = values[first:last] + factor[last:, first:last].T @ errors[last:]
        for column in range(last - 1, first - 1, -1):
            scale, bias = scales[group[column]], biases[group[column]]
            code = np.clip(np.rint((moved[column - first] - bias) / scale), 0, top)
            codes[column] = code
            error = values[column] - (code * scale + bias)
            moved[: column - first] += factor[column, first:column, None] * error
            errors[column] = error
    result = np.empty_like(codes)
    result[order] = codes
    return np.ascontiguousarray(result.T)


def row_errors(weight: Float32, quantized: AffineCodes, moments: Float64) -> Float64:
    """What the objective comes to for each row `[rows]`."""
    off = dequantize(quantized) - weight
    pulled = off @ moments.astype(np.float32)
    return np.asarray(np.einsum("rc,rc->r", pulled, off, dtype=np.float64))


def better_rows(
    weight: Float32, moments: Float64, first: AffineCodes, second: AffineCodes
) -> tuple[AffineCodes, Float64]:
    """Row by row whichever has the smaller error, and that error; the first where equal."""
    errors = [row_errors(weight, quantized, moments) for quantized in (first, second)]
    choice = (errors[0] <= errors[1])[:, None]
    better = AffineCodes(
        np.where(choice, first.codes, second.codes),
        np.where(choice, first.scales, second.scales),
        np.where(choice, first.biases, second.biases),
        first.spec,
    )
    return better, np.minimum(*errors)

"""Weights that already lie on a quantization grid: found per matrix, their codes kept.

The released small models are trained with quantization in the loop. MLX would quantize them with
another grid, which moves about every sixth group at 4 bits. A matrix counts only if each of its
groups lies on a grid of the format asked for. Random weights never do; two rows show that.
"""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np

from apertus_mlx.convert.plan.plan import Plan, Step
from apertus_mlx.convert.sources.reading import MLX_TYPES, Reader
from apertus_mlx.convert.sources.source import Codes, MatrixSource
from apertus_mlx.quant.arrays import blocks
from apertus_mlx.quant.grid import KINDS, Kind, can_lie, recover
from apertus_mlx.quant.packing import pack, unpack
from apertus_mlx.quant.spec import QuantSpec

PROBE_ROWS = 2


def find_grids(plan: Plan, reader: Reader) -> dict[str, Kind]:
    """Module path -> kind of grid that it lies on, for those that keep their own.

    Scales stay in the type of the weights where that gives every value back, else they take
    float32, unless the user asked for another type.
    """
    found = {}
    for step in plan.steps:
        if step.transform != "quantize" or step.matrix is None or step.spec is None:
            continue
        if step.spec.mode != "affine" or step.matrix.dtype != step.dtype:
            continue
        for kind in KINDS:
            if kind == "exact32" and plan.request.dtype not in (None, "F32"):
                continue
            if _lies_on_grid(step, step.matrix, step.spec, kind, reader):
                found[step.path] = kind
                break
    return found


def grid_codes(values: mx.array, spec: QuantSpec, dtype: str, kind: Kind) -> Codes | None:
    """Rows `[rows, columns]` in the affine format that gives them back; None if there is none.

    Args:
        values: rows in the type `dtype`.
        spec: the affine format.
        dtype: safetensors type of the weights.
        kind: which grid.
    """
    rows, columns = values.shape
    size = spec.group_size
    plain = np.array(values.astype(mx.float32)).reshape(-1, size)
    if not can_lie(plain, spec.bits):
        return None
    scales = np.zeros(len(plain))
    biases = np.zeros(len(plain))
    codes = np.zeros(plain.shape, np.uint8)
    left = np.ones(len(plain), bool)
    if kind == "mlx":
        # Most groups of MLX's own making come back from its own rounding; that is the fast way.
        packed = mx.quantize(values, group_size=size, bits=spec.bits)
        again = mx.dequantize(*packed, group_size=size, bits=spec.bits)
        same = np.array((again == values).reshape(-1, size).all(axis=1))
        scales[same], biases[same] = (
            np.array(a.astype(mx.float32)).ravel()[same] for a in packed[1:]
        )
        codes[same] = unpack(np.array(packed[0]), spec.bits, columns).reshape(-1, size)[same]
        left = ~same
    if left.any():
        grid = recover(plain[left].astype(np.float64), spec.bits, dtype, kind)
        if not grid.found.all():
            return None
        codes[left], scales[left], biases[left] = grid.codes, grid.scales, grid.biases
    stored = MLX_TYPES["F32" if kind == "exact32" else dtype]
    return Codes(
        mx.array(pack(codes.reshape(rows, columns), spec.bits)),
        mx.array(scales.reshape(rows, -1).astype(np.float32)).astype(stored),
        mx.array(biases.reshape(rows, -1).astype(np.float32)).astype(stored),
    )


def _lies_on_grid(
    step: Step, matrix: MatrixSource, spec: QuantSpec, kind: Kind, reader: Reader
) -> bool:
    rows, probe = step.outputs[0].shape[0], slice(0, min(PROBE_ROWS, step.outputs[0].shape[0]))
    parts = (probe, *blocks(rows, replace(step, grid=kind).block_rows))
    return all(
        grid_codes(matrix.read(reader, part.start, part.stop), spec, step.dtype, kind) is not None
        for part in parts
    )

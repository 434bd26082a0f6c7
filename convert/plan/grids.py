"""Weights that already lie on a quantization grid: found per matrix, their codes kept.

The released small models are trained with quantization in the loop. MLX would quantize them with
another grid, which moves about every sixth group at 4 bits. A matrix counts only if each of its
groups lies on a grid of the format asked for. Random weights never do; two rows show that.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import numpy as np

from apertus_mlx.convert.plan.plan import Plan, Step
from apertus_mlx.convert.sources.reading import MLX_TYPES, Reader
from apertus_mlx.convert.sources.source import Codes, MatrixSource
from apertus_mlx.quant.arrays import blocks
from apertus_mlx.quant.grid import KINDS, Grid, Kind, can_lie, recover
from apertus_mlx.quant.packing import pack, unpack
from apertus_mlx.quant.spec import QuantSpec

PROBE_ROWS = 2
# Values that are probed at once; for those of one matrix alone the calls cost more than the work.
PROBE_VALUES = 1 << 18

# A matrix to quantize, and its format.
_Candidate = tuple[Step, MatrixSource, QuantSpec]


def find_grids(plan: Plan, reader: Reader) -> dict[str, Kind]:
    """Module path -> kind of grid that it lies on, for those that keep their own.

    Scales stay in the type of the weights where that gives every value back, else they take
    float32, unless the user asked for another type.
    """
    kinds = [kind for kind in KINDS if kind != "exact32" or plan.request.dtype in (None, "F32")]
    alike: dict[tuple[QuantSpec, str], list[_Candidate]] = {}
    for step in plan.steps:
        matrix, spec = step.matrix, step.spec
        if step.transform != "quantize" or matrix is None or spec is None:
            continue
        if spec.mode == "affine" and matrix.dtype == step.dtype:
            alike.setdefault((spec, step.dtype), []).append((step, matrix, spec))
    found: dict[str, Kind] = {}
    for candidates in alike.values():
        widest = max(step.outputs[0].shape[1] * 32 // spec.bits for step, _, spec in candidates)
        for few in blocks(len(candidates), PROBE_VALUES // (PROBE_ROWS * widest)):
            for kind, lying in _probe(candidates[few], kinds, reader).items():
                for step, matrix, spec in lying:
                    if step.path not in found and _lies_on_grid(step, matrix, spec, kind, reader):
                        found[step.path] = kind
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
    groups = values.reshape(-1, spec.group_size)
    if not can_lie(np.array(groups.astype(mx.float32)), spec.bits):
        return None
    grid = _recover(groups, spec, dtype, kind)
    if not grid.found.all():
        return None
    stored = MLX_TYPES["F32" if kind == "exact32" else dtype]
    return Codes(
        mx.array(pack(grid.codes.reshape(rows, columns), spec.bits)),
        mx.array(grid.scales.reshape(rows, -1).astype(np.float32)).astype(stored),
        mx.array(grid.biases.reshape(rows, -1).astype(np.float32)).astype(stored),
    )


def _recover(values: mx.array, spec: QuantSpec, dtype: str, kind: Kind) -> Grid:
    """The grids of groups `[n, group]` in the type `dtype`."""
    plain, size = np.array(values.astype(mx.float32)), spec.group_size
    scales = np.zeros(len(plain))
    biases = np.zeros(len(plain))
    codes = np.zeros(plain.shape, np.uint8)
    found = np.zeros(len(plain), bool)
    if kind == "mlx":
        # Most groups of MLX's own making come back from its own rounding; that is the fast way.
        packed = mx.quantize(values, group_size=size, bits=spec.bits)
        again = mx.dequantize(*packed, group_size=size, bits=spec.bits)
        found = np.array((again == values).all(axis=1))
        scales[found], biases[found] = (
            np.array(a.astype(mx.float32)).ravel()[found] for a in packed[1:]
        )
        codes[found] = unpack(np.array(packed[0]), spec.bits, size)[found]
    left = ~found
    if left.any():
        grid = recover(plain[left].astype(np.float64), spec.bits, dtype, kind)
        codes[left], scales[left], biases[left] = grid.codes, grid.scales, grid.biases
        found[left] = grid.found
    return Grid(codes, scales, biases, found)


def _probe(
    candidates: Sequence[_Candidate], kinds: Sequence[Kind], reader: Reader
) -> dict[Kind, list[_Candidate]]:
    """By kind, those of one format whose first rows lie on such a grid."""
    some, groups = [], []
    for each in candidates:
        step, matrix, spec = each
        rows = matrix.read(reader, 0, min(PROBE_ROWS, step.outputs[0].shape[0]))
        few = rows.reshape(-1, spec.group_size)
        if can_lie(np.array(few.astype(mx.float32)), spec.bits):
            some.append(each)
            groups.append(few)
    if not some:
        return {}
    ends = np.cumsum([len(few) for few in groups])[:-1]
    joined, spec, dtype = mx.concatenate(groups), some[0][2], some[0][0].dtype
    return {
        kind: [
            each
            for each, found in zip(
                some, np.split(_recover(joined, spec, dtype, kind).found, ends), strict=True
            )
            if found.all()
        ]
        for kind in kinds
    }


def _lies_on_grid(
    step: Step, matrix: MatrixSource, spec: QuantSpec, kind: Kind, reader: Reader
) -> bool:
    parts = blocks(step.outputs[0].shape[0], replace(step, grid=kind).block_rows)
    return all(
        grid_codes(matrix.read(reader, part.start, part.stop), spec, step.dtype, kind) is not None
        for part in parts
    )

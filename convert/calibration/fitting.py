"""The codes of one matrix, fitted to what its inputs are in two streams.

By MLX where it has a GPU, else by NumPy; the tests say how far the two may differ.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.convert.evaluation.products import quickest
from apertus_mlx.convert.plan.plan import ANNEALED_BITS, GROUPWISE_COLUMNS
from apertus_mlx.quant import annealing, descent, gptq, search
from apertus_mlx.quant.affine import AffineCodes, ScaleType
from apertus_mlx.quant.arrays import Array, Float32, blocks, settled
from apertus_mlx.quant.curvature import Curvature
from apertus_mlx.quant.groupwise import fit_in_groups
from apertus_mlx.quant.spec import QuantSpec

# Rows that are fitted at once; that takes some 40 bytes for each weight.
BLOCK_ROWS = 2048
# How much more may be left by rounding in the order of groups: scales that fit gain as much.
GROUPWISE_LEFT = 1.15


class Moments:
    """Sums over tokens of what the inputs of matrices with one input have in common.

    Attributes:
        second: of the quantized model's inputs, `[columns, columns]`.
        cross: of the original's inputs minus the quantized model's, times the latter, `[columns,
            columns]`; or that times the one weight they are for, `[rows, columns]`, where that is
            smaller.
    """

    def __init__(self, *weights: Float32) -> None:
        columns = weights[0].shape[1]
        few_rows = len(weights) == 1 and 2 * len(weights[0]) < columns
        self.weight = quickest(weights[0]) if few_rows else None
        self.second = quickest(np.zeros((columns, columns), np.float32))
        rows = len(weights[0]) if few_rows else columns
        self.cross = quickest(np.zeros((rows, columns), np.float32))

    def add(self, original: mx.array, quantized: mx.array) -> None:
        """Count inputs `[B, L, columns]` of the two streams."""
        streams: list[Array] = [x.reshape(-1, x.shape[-1]) for x in (original, quantized)]
        if not has_gpu():
            streams = [np.array(x, copy=False) for x in streams]
        wanted, found = streams
        missing = wanted - found
        if self.weight is not None:
            missing = missing @ self.weight.T
        self.second += found.T @ found
        self.cross += missing.T @ found
        settled(self.second, self.cross)


@dataclass(frozen=True, slots=True)
class Objective:
    """What the matrices of one input are fitted to."""

    curvature: Curvature
    # Of the original's inputs minus the quantized model's, see `Moments`, scaled like the curvature
    # and by how much of the difference is to be made up for; None where there is none.
    cross: Array | None = None
    # Whether that is multiplied with the weight already.
    is_product: bool = False

    @classmethod
    def of(cls, moments: Moments, correction: float) -> Objective:
        """The objective of `moments`, which are used up; `correction` is the share made up for."""
        curvature = Curvature.of(moments.second)
        moments.cross *= correction / curvature.mean
        cross = moments.cross if correction else None
        return cls(curvature, cross, moments.weight is not None)

    def target(self, weight: Float32, part: slice) -> Array:
        """What some rows of `weight` are to come close to, `[columns, rows]`.

        That is least squares of the original's outputs on the quantized model's inputs. Scales are
        searched for it too: with those of the weights alone 2 bits lose some 3 % more.
        """
        rows = quickest(weight[part])
        target = rows.T if has_gpu() else np.ascontiguousarray(rows.T)
        if self.cross is None:
            return target
        missing = self.cross[part] if self.is_product else rows @ self.cross
        return target + self.curvature.solve(missing.T)


def fit(
    weight: Float32, spec: QuantSpec, objective: Objective, scale_type: ScaleType
) -> AffineCodes:
    """The best codes known for one matrix `[rows, columns]`; rows are independent."""
    curvature = objective.curvature
    found = AffineCodes.blank(weight.shape, spec)
    grouped = _in_groups(curvature, spec)
    annealed = spec.bits <= ANNEALED_BITS
    # Where codes are searched for MLX holds twice as many copies of the rows as NumPy.
    for part in blocks(len(weight), BLOCK_ROWS // 2 if annealed and has_gpu() else BLOCK_ROWS):
        target = objective.target(weight, part)
        if grouped is not None:
            start, rounds = fit_in_groups(target, spec, grouped, scale_type), 1
        else:
            start = search.fit_columns(target, spec, curvature.diagonal, scale_type, search.QUICK)
            start, rounds = gptq.round_in_order(target, start, curvature), None
        if annealed:
            best = annealing.anneal(target, start, curvature, scale_type)
        else:
            best = descent.improve(target, start, curvature, scale_type, rounds)
        found.put(part, best.as_codes())
    return found


def _in_groups(curvature: Curvature, spec: QuantSpec) -> Curvature | None:
    """The curvature by groups, where scales are to be found group by group."""
    if len(curvature.order) > GROUPWISE_COLUMNS:
        return None
    grouped = curvature.in_groups(spec.group_size)
    if grouped is None or grouped.left > GROUPWISE_LEFT * curvature.left:
        return None
    return grouped

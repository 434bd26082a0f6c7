"""GPTQ group by group: each group's scale and bias are found when its turn comes.

Of the columns that are left, one group at a time is moved by what the groups behind it left over,
searched for its best scale and bias, rounded column by column, and lowered a little (`descent`).
What its errors cost is not their curvature alone, but what remains of it once the groups in front
have made up for them. So scales fit the weights that are really rounded. Groups that matter most
come first; where the columns of a group differ much, rounding single columns in their order leaves
less (`gptq`). NumPy or MLX.
"""

from __future__ import annotations

import numpy as np

from apertus_mlx.quant import descent, search
from apertus_mlx.quant.affine import ScaleType
from apertus_mlx.quant.arrays import Array, as_library, blocks, library, settled
from apertus_mlx.quant.columns import Columns
from apertus_mlx.quant.curvature import Curvature
from apertus_mlx.quant.one_thread import one_thread
from apertus_mlx.quant.rounding import Grid, settle
from apertus_mlx.quant.spec import QuantSpec

# How often the scale, bias and codes of a group are lowered in its turn.
VISITS = 2


def fit_in_groups(
    target: Array,
    spec: QuantSpec,
    curvature: Curvature,
    scale_type: ScaleType,
    effort: search.Effort = search.QUICK,
) -> Columns:
    """Codes, scales and biases for `target` `[columns, rows]`.

    Args:
        target: what to come close to.
        spec: an affine format.
        curvature: the objective's, in groups of that format (`Curvature.in_groups`).
        scale_type: what scales and biases will be stored in.
        effort: of the search for each group's first scale.
    """
    xp, size, top = library(target), spec.group_size, (1 << spec.bits) - 1
    factor, numbers = curvature.factor, curvature.order[::size] // size
    values = target[as_library(curvature.order, target)]
    # From here on in the order of the factor.
    codes, errors = xp.zeros_like(values), xp.zeros_like(values)
    parts = list(blocks(len(values), size))
    own = np.stack([np.array(factor[part, part]) for part in parts]).astype(np.float64)
    inverses = as_library(np.linalg.inv(own).astype(np.float32), target)
    remaining = as_library((own @ own.transpose(0, 2, 1)).astype(np.float32), target)
    diagonals = np.einsum("gcd,gcd->gc", own, own).astype(np.float32)
    scales, biases = [], []
    for group, part in reversed(list(enumerate(parts))):
        moved = values[part]
        if part.stop < len(values):
            missed = factor[part.stop :, part].T @ errors[part.stop :]
            moved = moved + inverses[group].T @ missed
        with one_thread():
            start = search.fit_columns(moved, spec, diagonals[group], scale_type, effort)
            block = factor[part, part]
            wide = [xp.broadcast_to(array, moved.shape) for array in (start.scales, start.biases)]
            transfer = (block / xp.diagonal(block))[::-1, ::-1]
            found, left = settle(moved[::-1], moved[::-1], transfer, top, Grid(*wide))
            here, form, off = found[::-1] + 0, (start.scales[0], start.biases[0]), -left[::-1]
            curve = remaining[group]
            for _ in range(VISITS):
                here, scale, bias, change = descent.visit(
                    curve, curve @ off, here, form, scale_type, spec.bits
                )
                form, off = (scale, bias), off + change
        codes[part], errors[part] = here, values[part] - (here * form[0] + form[1])
        scales.append(form[0])
        biases.append(form[1])
        settled(codes, errors, *form)
    places = as_library(np.argsort(numbers[::-1]), target)
    return Columns(
        codes[as_library(np.argsort(curvature.order), target)],
        xp.stack(scales)[places], xp.stack(biases)[places], spec,
    )  # fmt: skip

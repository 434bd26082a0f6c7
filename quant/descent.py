"""Lowers GPTQ's objective further, a block of columns after the other, over and over.

For each group first the scale, then the bias that are best for its codes and all other columns as
they are; then each of its codes in turn (coordinate descent, as in "QuantEase", arXiv 2309.01885).
No step makes a row worse, unless codes are drawn with noise (`annealing`). NumPy or MLX.
"""

from __future__ import annotations

from collections.abc import Callable

from apertus_mlx.quant.affine import ScaleType, round_scales, usable_scales
from apertus_mlx.quant.arrays import Array, blocks, library, settled
from apertus_mlx.quant.columns import Columns
from apertus_mlx.quant.curvature import Curvature
from apertus_mlx.quant.one_thread import one_thread
from apertus_mlx.quant.rounding import settle

# How often each block is taken up; a round of a wide matrix costs a product as large as it.
ROUNDS, ROUNDS_IF_WIDE = 3, 2
WIDE = 4096
# Columns whose slope is found at once, and how often they are visited then.
BLOCK_COLUMNS = 256
VISITS = 2
# Pull of scales towards what they are, relative to the curvature.
RIDGE = 1e-4

Noise = Callable[[float, tuple[int, ...]], Array | None]


def improve(
    target: Array,
    start: Columns,
    curvature: Curvature,
    scale_type: ScaleType = "BF16",
    rounds: int | None = None,
    visits: int = VISITS,
    noise: Noise | None = None,
) -> Columns:
    """Codes, scales and biases whose objective is at most that of `start`, row by row.

    With noise, rows whose objective would be more keep those of `start`.

    Args:
        target: what to come close to, `[columns, rows]`.
        start: any quantization of it.
        curvature: the objective's.
        scale_type: what scales and biases will be stored in.
        rounds: how often each block of columns is taken up; by default as often as pays.
        visits: how often each group is visited then.
        noise: gives that of a `visit`, from the share of all visits that are over and its shape.
    """
    xp, spec = library(target), start.spec
    if rounds is None:
        rounds = ROUNDS if len(target) <= WIDE else ROUNDS_IF_WIDE
    codes, scales, biases = (xp.array(a) for a in (start.codes, start.scales, start.biases))
    errors = start.values() - target
    risen = xp.zeros_like(errors[0])
    for number in range(rounds):
        for part in blocks(len(errors), BLOCK_COLUMNS):
            # Half the slope of the objective.
            slope = curvature.moments[part] @ errors
            before = None if noise is None else (slope + 0, errors[part] + 0)
            groups = list(blocks(part.stop - part.start, spec.group_size))
            with one_thread():
                for count, inside in enumerate(groups * visits):
                    done = (number + count // len(groups) / visits) / rounds
                    here = slice(part.start + inside.start, part.start + inside.stop)
                    group = here.start // spec.group_size
                    form = scales[group], biases[group]
                    own = curvature.moments[here, here]
                    drawn = None if noise is None else noise(done, codes[here].shape)
                    codes[here], scales[group], biases[group], moved = visit(
                        own, slope[inside], codes[here], form, scale_type, spec.bits, drawn
                    )
                    slope += curvature.moments[part, here] @ moved
                    errors[here] += moved
            if before is not None:
                # What the objective changes by: the mean of both slopes, times the way.
                risen += ((before[0] + slope) * (errors[part] - before[1])).sum(0)
            settled(codes, errors, scales, biases, risen)
    found = Columns(codes, scales, biases, spec)
    return found if noise is None else found.where(risen < 0, start)


def visit(
    own: Array, slope: Array, codes: Array, form: tuple[Array, Array], scale_type: ScaleType,
    bits: int, noise: Array | None = None,
) -> tuple[Array, Array, Array, Array]:  # fmt: skip
    """Better codes, scales and biases of one group, and by how much its values change.

    Args:
        own: curvature of the group `[group_size, group_size]`.
        slope: half the objective's at its values `[group_size, rows]`.
        codes: `[group_size, rows]`.
        form: scale and bias, each `[rows]`.
        scale_type: what both will be stored in.
        bits: of a code.
        noise: what is added before codes are rounded, `[group_size, rows]`: the change of a value,
            if its curvature is one.
    """
    xp = library(codes)
    (scale, bias), diagonal, sums = form, xp.diagonal(own), own.sum(0)
    pulled = own @ codes
    at = xp.einsum("cr,cr->r", codes, slope), slope.sum(0)
    both = xp.einsum("cr,cr->r", codes, pulled)
    step, shift = _refit(both, pulled.sum(0), sums.sum(), at, form, scale_type)
    scale, bias = scale + step, bias + shift
    # The slope that this leaves, in steps of the scale.
    pulled *= step
    pulled += sums[:, None] * shift
    pulled += slope
    pulled /= diagonal[:, None]
    pulled /= scale
    wanted = codes - pulled
    if noise is not None:
        wanted += noise / (xp.sqrt(diagonal)[:, None] * scale)
    found, left = settle(wanted, codes, own / diagonal, (1 << bits) - 1)
    moved = codes * step
    moved += shift
    left *= scale
    moved -= left
    return found, scale, bias, moved


def _refit(
    both: Array, cross: Array, flat: Array, at: tuple[Array, Array], form: tuple[Array, Array],
    scale_type: ScaleType,
) -> tuple[Array, Array]:  # fmt: skip
    """Steps to the best scale, rounded, and to the best bias for it; none where that gains nothing.

    Args:
        both: curvature along the scale `[rows]`.
        cross: between scale and bias `[rows]`.
        flat: along the bias.
        at: slopes along both `[rows]`.
        form: scale and bias, each `[rows]`.
        scale_type: what they will be stored in.
    """
    xp = library(both)
    # Where all codes are the same the two cannot be told apart.
    spread = xp.maximum(both - cross * cross / flat, 0) + RIDGE * both + 1e-9
    wanted = form[0] + (at[1] * cross / flat - at[0]) / spread
    step = usable_scales(round_scales(wanted, scale_type), scale_type) - form[0]
    shift = round_scales(form[1] - (at[1] + cross * step) / flat, scale_type) - form[1]
    change = 2 * (at[0] * step + at[1] * shift)
    change = change + both * step * step + 2 * cross * step * shift + flat * shift * shift
    gains = change < 0
    return xp.where(gains, step, 0), xp.where(gains, shift, 0)

"""Rotations and scales: the same outputs from weights that are easier to round. NumPy only.

Rotations spread what stands out in a few columns over all of them. Scales move the size of a
column's input into the column, so that rounding spares the weights that matter. Both are undone by
a neighbouring matrix or norm: `(x Q) (W Q)^T = x W^T`, and `(x / s) (W s)^T = x W^T`. All is
float64.

Sources: "QuaRot: Outlier-Free 4-Bit Inference in Rotated LLMs" (arXiv 2404.00456); "AWQ:
Activation-aware Weight Quantization" (arXiv 2306.00978).
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from apertus_mlx.quant.arrays import Float32, Float64, blocks

# Numbers that are held in float64 at once.
BLOCK_NUMBERS = 1 << 22
# Exponents that are tried of a column's input and, as divisor, of its weights.
INPUT_EXPONENTS = (0.0, 0.25, 0.5, 0.75, 1.0)
WEIGHT_EXPONENTS = (0.0, 0.25, 0.5)
# Scales that leave more of the error than this are not used: they may harm other inputs.
WORTHWHILE = 0.9
# Rows of each matrix that scales are judged by.
JUDGED_ROWS = 512
# What a column counts at least, as a share of the mean square of all.
FLOOR = 1e-4


@dataclass(frozen=True, slots=True)
class Rotation:
    """The orthogonal matrix `diag(signs) (left x right)`, a Kronecker product of small ones."""

    signs: Float64
    left: Float64
    right: Float64

    @property
    def size(self) -> int:
        """Rows and columns."""
        return len(self.signs)

    def columns(self, weight: Float32) -> Float32:
        """`W Q` for `W` `[rows, size]`: the weight for inputs that are rotated."""
        result = np.empty(weight.shape, np.float32)
        for part in blocks(len(weight), BLOCK_NUMBERS // self.size):
            block = weight[part] * self.signs
            grid = block.reshape(-1, len(self.left), len(self.right))
            result[part] = (self.left.T @ (grid @ self.right)).reshape(block.shape)
        return result

    def rows(self, weight: Float32) -> Float32:
        """`Q^T W` for `W` `[size, columns]`: the weight whose outputs are rotated."""
        result = np.empty(weight.shape, np.float32)
        for part in blocks(weight.shape[1], BLOCK_NUMBERS // self.size):
            result[:, part] = self.columns(weight[:, part].T).T
        return result


def make_rotation(size: int, seed: int) -> Rotation:
    """A randomised Hadamard matrix; an odd factor of `size` is any orthogonal matrix of that size.

    Raises:
        ValueError: `size` is not positive.
    """
    if size < 1:
        raise ValueError(f"a rotation of size {size}")
    rng = np.random.default_rng([seed, size])
    twos = (size & -size).bit_length() - 1
    odd = size >> twos
    mixed = np.linalg.qr(rng.standard_normal((odd, odd)))[0]
    return Rotation(
        rng.choice([-1.0, 1.0], size),
        np.kron(mixed, _hadamard(twos // 2)),
        _hadamard(twos - twos // 2),
    )


def _hadamard(power: int) -> Float64:
    """The orthogonal Hadamard matrix of size `2 ** power`."""
    matrix = np.ones((1, 1))
    for _ in range(power):
        matrix = np.block([[matrix, matrix], [matrix, -matrix]]) / np.sqrt(2)
    return matrix


def balance(giver: Float32, reader: Float32, owners: npt.NDArray[np.intp]) -> Float32:
    """Scales that make each row of one matrix as long as the columns that read it in another.

    A rotation mixes rows, so the rounding of long ones would drown short ones. Dividing the rows of
    `giver` and multiplying the columns of `reader` by them leaves the product.

    Args:
        giver: `[scales, inputs]`.
        reader: `[rows, columns]`.
        owners: for each column of `reader` the row of `giver` that it multiplies.
    """
    given = np.square(giver, dtype=np.float64).sum(1)
    read = np.bincount(owners, np.square(reader, dtype=np.float64).sum(0))
    floors = [max(1e-8 * energy.mean(), 1e-30) for energy in (given, read)]
    return np.asarray(((given + floors[0]) / (read + floors[1])) ** 0.25, np.float32)


def choose_scales(
    weights: Sequence[Float32],
    moments: Float32 | Float64,
    quantize: Sequence[Callable[[Float32, Float64], Float32]],
    owners: npt.NDArray[np.intp] | None = None,
) -> Float64:
    """Positive scales for the columns of matrices with one input, of geometric mean one.

    They are `input ** a / weight ** b` of root mean squares, with the exponents for which outputs
    are off by the least share of their own size; all ones where nothing gains enough.

    Args:
        weights: the quantized matrices `[rows, columns]`.
        moments: second moments of their input `[columns, columns]`.
        quantize: for each of them, what rounding makes of rows `[rows, columns]` whose inputs have
            mean squares `[columns]`.
        owners: for each column the index of its scale, where columns share scales; `[columns]`.

    Returns:
        Scales to multiply columns with, `[columns]`, or as many as there are owners.
    """
    moments = np.asarray(moments, np.float64)
    owners = np.arange(len(moments)) if owners is None else owners
    rows = [weight[:: -(-len(weight) // JUDGED_ROWS)].astype(np.float64) for weight in weights]
    energies = [_output_energies(part, moments) + 1e-30 for part in rows]
    squares = sum(np.square(part).mean(0) / max(np.square(part).mean(), 1e-30) for part in rows)
    inputs = _root_mean_squares(np.diag(moments), owners)
    sizes = _root_mean_squares(np.asarray(squares), owners)
    best = unscaled = np.ones(len(inputs))
    least = np.inf
    for a, b in itertools.product(INPUT_EXPONENTS, WEIGHT_EXPONENTS):
        scales = inputs**a / sizes**b
        scales /= np.exp(np.log(scales).mean())
        columns = scales[owners]
        error = 0.0
        for part, energy, rounded in zip(rows, energies, quantize, strict=True):
            found = rounded((part * columns).astype(np.float32), np.diag(moments) / columns**2)
            off = found / columns - part
            error += float((_output_energies(off, moments) / energy).mean())
        if a == b == 0:
            least, best = WORTHWHILE * error, unscaled
        elif error < least:
            least, best = error, scales
    return best


def _root_mean_squares(squares: Float64, owners: npt.NDArray[np.intp]) -> Float64:
    means = np.bincount(owners, squares) / np.bincount(owners)
    return np.asarray(np.sqrt(means + max(FLOOR * means.mean(), 1e-30)))


def _output_energies(weight: Float64, moments: Float64) -> Float64:
    """Mean square of each output `[rows]`."""
    return np.asarray(np.einsum("rc,rc->r", weight @ moments, weight))

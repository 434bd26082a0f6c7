"""Second moments of inputs as the curvature of a matrix's error, and their Cholesky factor.

The objective of every calibrated quantizer is `trace((W - Q) H (W - Q)^T)`, where H is the second
moment of the inputs. Computed by NumPy, or by MLX where the moments are MLX's: diagonal blocks of
the factor in float64 on the CPU, products between them in float32.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from apertus_mlx.quant.arrays import Array, Float32, Float64, as_library, blocks, library

# Share of the mean diagonal that is added to it; ten times more until the matrix factors.
DAMPING = 0.01
# Columns of the factor that are found at once.
BLOCK_COLUMNS = 256


@dataclass(frozen=True, slots=True)
class Curvature:
    """A positive definite H `[columns, columns]`, and its factor in the order of importance.

    With `order` the indices of columns, those that matter most last, and L the lower triangle of
    `factor`, `H[order][:, order] = L L^T`. What stands above the diagonal blocks of
    `BLOCK_COLUMNS` is not part of it.
    """

    moments: Array
    # Of the diagonal, before H was scaled.
    mean: float
    order: npt.NDArray[np.intp]
    factor: Array
    # Of the diagonal blocks of the factor.
    inverses: tuple[Array, ...]

    @classmethod
    def of(cls, moments: Array, damping: float = DAMPING) -> Curvature:
        """Scale to a mean diagonal of one, add `damping` to it, and factor.

        Columns that never see an input get the mean diagonal, so their weights are simply rounded.

        Args:
            moments: of inputs, symmetric; becomes H.
            damping: share of the mean; ten times more until there is a factor.

        Raises:
            ValueError: not a square matrix of finite numbers with a diagonal that is not negative.
        """
        mean = _scale(moments)
        order = np.argsort(-_diagonal(moments), kind="stable")[::-1].copy()
        added, wanted = 0.0, damping
        while True:
            _add_to_diagonal(moments, wanted - added)
            added = wanted
            found = _factor(moments, order)
            if found is not None:
                return cls(moments, mean, order, *found)
            wanted = max(10 * wanted, 1e-9)

    @property
    def diagonal(self) -> Float32:
        """Of H, `[columns]`."""
        return np.asarray(_diagonal(self.moments), np.float32)

    @property
    def left(self) -> float:
        """What rounding to whole numbers leaves of the objective in this order, but for a factor.

        The columns in front make up for a column's error as far as they can; the squares of the
        factor's diagonal are what they cannot.
        """
        return float(np.square(_diagonal(self.factor), dtype=np.float64).sum())

    def in_groups(self, size: int) -> Curvature | None:
        """The same H with the columns of each group side by side; None where it has no factor.

        Groups come in the order of importance, and so do the columns in each.
        """
        importance = self.diagonal.reshape(-1, size)
        inside = np.argsort(importance, axis=1, kind="stable")
        groups = np.argsort(importance.mean(1), kind="stable")
        order = (inside + size * np.arange(len(inside))[:, None])[groups].reshape(-1)
        found = _factor(self.moments, order)
        return None if found is None else Curvature(self.moments, self.mean, order, *found)

    def solve(self, right: Array) -> Array:
        """`H^-1 right` for `right` `[columns, rows]`."""
        x = right[as_library(self.order, right)]
        for part, inverse in zip(blocks(len(x), BLOCK_COLUMNS), self.inverses, strict=True):
            here = x[part]
            if part.start:
                here = here - self.factor[part, : part.start] @ x[: part.start]
            x[part] = inverse @ here
        parts = list(zip(blocks(len(x), BLOCK_COLUMNS), self.inverses, strict=True))
        for part, inverse in reversed(parts):
            here = x[part]
            if part.stop < len(x):
                here = here - self.factor[part.stop :, part].T @ x[part.stop :]
            x[part] = inverse.T @ here
        return x[as_library(np.argsort(self.order), right)]


def damped(second_moments: Float32 | Float64, damping: float = DAMPING) -> Float64:
    """A positive definite neighbour of symmetric `second_moments`; see `Curvature.of`."""
    moments = np.array(second_moments, np.float64)
    _scale(moments)
    added = max(damping, 1e-9)
    while True:
        trial = moments.copy()
        _add_to_diagonal(trial, added)
        try:
            np.linalg.cholesky(trial)
        except np.linalg.LinAlgError:
            added *= 10
        else:
            return trial


def _scale(moments: Array) -> float:
    """Bring the mean diagonal to one, that of dead columns as well; returns what it was."""
    if moments.ndim != 2 or moments.shape[0] != moments.shape[1]:
        raise ValueError(f"second moments of shape {moments.shape}: expected a square")
    diagonal = _diagonal(moments).astype(np.float64)
    finite = np.isfinite([float(moments.max()), float(moments.min())]).all()
    if not finite or (diagonal < 0).any():
        raise ValueError("second moments are not finite and non-negative")
    mean = float(diagonal.mean())
    if mean > 0:
        moments *= 1 / mean
    for column in np.flatnonzero(diagonal == 0).tolist():
        moments[column] = 0
        moments[:, column] = 0
        moments[column, column] = 1
    return mean if mean > 0 else 1.0


def _diagonal(matrix: Array) -> Any:
    return np.array(library(matrix).diagonal(matrix))


def _add_to_diagonal(matrix: Array, added: float) -> None:
    index = as_library(np.arange(len(matrix)), matrix)
    matrix[index, index] = matrix[index, index] + added


def _factor(moments: Array, order: npt.NDArray[np.intp]) -> tuple[Array, tuple[Array, ...]] | None:
    """The factor and the inverses of its diagonal blocks; None where there is none."""
    xp, rows = library(moments), as_library(order, moments)
    # Its transpose, so that all that is read and written are rows.
    upper, inverses = xp.zeros(moments.shape, xp.float32), []
    for part in blocks(len(order), BLOCK_COLUMNS):
        first, last = part.start, part.stop
        # Whole rows first: far quicker than elements of a symmetric matrix one by one.
        panel = xp.take(xp.take(moments, rows[part], axis=0), rows[first:], axis=1)
        if first:
            panel -= upper[:first, part].T @ upper[:first, first:]
        try:
            corner = np.linalg.cholesky(np.array(panel[:, : last - first]).astype(np.float64))
        except np.linalg.LinAlgError:
            return None
        inverse = as_library(np.linalg.inv(corner).astype(np.float32), moments)
        upper[part, part] = as_library(corner.T.astype(np.float32), moments)
        upper[part, last:] = inverse @ panel[:, last - first :]
        inverses.append(inverse)
    return upper.T, tuple(inverses)

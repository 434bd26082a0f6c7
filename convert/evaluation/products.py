"""Products with float32 weights, and what gradients of them take, by NumPy where MLX has no GPU.

NumPy's BLAS is some forty times as fast as MLX's products on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.quant.arrays import Array, Float32, blocks

# Rows that MLX takes from NumPy at once.
GIVEN_ROWS = 4096


def quickest(values: Float32) -> Array:
    """`values` as an array of the library whose products are the quickest here; all are of one."""
    return mx.array(values) if has_gpu() else values


def gram(rows: Float32) -> Array:
    """`rows.T @ rows` for many rows, as an array of that library."""
    if not has_gpu():
        return rows.T @ rows
    total = mx.zeros((rows.shape[1],) * 2)
    for part in blocks(len(rows), GIVEN_ROWS):
        some = mx.array(rows[part])
        total = total + some.T @ some
        mx.eval(total)
    return total


def product(x: mx.array, weight: mx.array) -> mx.array:
    """`x @ weight.T` in float32, for `x` `[..., columns]` and `weight` `[rows, columns]`.

    Gradients go to both.
    """
    if has_gpu():
        return x @ weight.T
    rows: mx.array = _cpu_product(x.reshape(-1, x.shape[-1]), weight)
    return rows.reshape(*x.shape[:-1], -1)


class Projection:
    """`x @ weight.T` for a float32 `weight` `[rows, columns]` that may be exchanged.

    Gradients go to `x` alone, and only while `trace` is a list: each backward pass then adds `x`
    and the gradient at the product to it.
    """

    def __init__(self, weight: Float32, finish: Callable[[Float32], Float32] | None = None) -> None:
        # One copy: where a GPU has it, NumPy reads it there.
        self._matrix = quickest(weight)
        self.trace: list[tuple[mx.array, mx.array]] | None = None
        self._finish = finish

    @property
    def weight(self) -> Float32:
        """Not to be written to."""
        return np.array(self._matrix, copy=False)

    @weight.setter
    def weight(self, values: Float32) -> None:
        self._matrix = quickest(values)

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to `x` `[..., columns]`."""
        if self.trace is not None:
            return _traced(x, self._matrix, self.trace)
        result = _times(x, self._matrix.T)
        return result if self._finish is None else mx.array(self._finish(np.array(result)))


def _traced(x: mx.array, weight: Array, trace: list[tuple[mx.array, mx.array]]) -> mx.array:
    def backward(x: mx.array, gradient: mx.array, _: mx.array) -> mx.array:
        trace.append((x, gradient))
        return _times(gradient, weight)

    # What `custom_function` returns is typed as a mere object.
    function: Any = mx.custom_function(lambda x: _times(x, weight.T))
    function.vjp(backward)
    result: mx.array = function(x)
    return result


def _times(x: mx.array, matrix: Array) -> mx.array:
    """`x @ matrix` for `x` `[..., rows]` and a `matrix` `[rows, columns]` without a gradient."""
    if isinstance(matrix, mx.array):
        return x @ matrix
    result = np.array(x, copy=False).reshape(-1, x.shape[-1]) @ matrix
    return mx.array(result).reshape(*x.shape[:-1], -1)


def _product(x: mx.array, y: mx.array) -> mx.array:
    return mx.array(np.array(x, copy=False) @ np.array(y, copy=False).T)


def _gradients(
    primals: Sequence[mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    x, y = (np.array(primal, copy=False) for primal in primals)
    slope = np.array(cotangent, copy=False)
    return mx.array(slope @ y), mx.array(slope.T @ x)


_cpu_product: Any = mx.custom_function(_product)
_cpu_product.vjp(_gradients)

"""Products with float32 weights that gradients pass, by NumPy where MLX has no GPU.

NumPy's BLAS is some forty times as fast as MLX's products on the CPU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.quant.arrays import Float32


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
        self.weight = weight
        self.trace: list[tuple[mx.array, mx.array]] | None = None
        self._finish = finish

    def __call__(self, x: mx.array) -> mx.array:
        """Apply to `x` `[..., columns]`."""
        if self.trace is not None:
            return _traced(x, self.weight, self.trace)
        result = _times(x, self.weight.T)
        return result if self._finish is None else mx.array(self._finish(np.array(result)))


def _traced(x: mx.array, weight: Float32, trace: list[tuple[mx.array, mx.array]]) -> mx.array:
    def backward(x: mx.array, gradient: mx.array, _: mx.array) -> mx.array:
        trace.append((x, gradient))
        return _times(gradient, weight)

    # What `custom_function` returns is typed as a mere object.
    function: Any = mx.custom_function(lambda x: _times(x, weight.T))
    function.vjp(backward)
    result: mx.array = function(x)
    return result


def _times(x: mx.array, matrix: Float32) -> mx.array:
    """`x @ matrix` for `x` `[..., rows]` and a `matrix` `[rows, columns]` without a gradient."""
    if has_gpu():
        return x @ mx.array(matrix)
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

"""Differentiable products by NumPy, for training where MLX has no GPU, and attention by them.

NumPy's BLAS is some forty times as fast as MLX's products there, and training is little else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.model.apertus import Attention, Model


def product(x: mx.array, weight: mx.array) -> mx.array:
    """`x @ weight.T` in float32, for `x` `[..., columns]` and `weight` `[rows, columns]`."""
    if has_gpu():
        return x @ weight.T
    rows: mx.array = _numpy_product(x.reshape(-1, x.shape[-1]), weight)
    return rows.reshape(*x.shape[:-1], -1)


def attend_by_numpy(model: Model) -> None:
    """Give each layer of `model` a new attention whose products are NumPy's."""
    for layer in model.layers:
        layer.self_attn = NumpyAttention(model.config)


class NumpyAttention(Attention):
    """`Attention`, causal and without a cache."""

    def __call__(self, x: mx.array, *_: Any) -> mx.array:
        """Attend from `x` `[B, L, D]` to all positions before and itself; the same shape."""
        queries, keys, values = self.project(x)
        batch, length, heads, size = queries.shape
        queries = self.rope(self.q_norm(queries).transpose(0, 2, 1, 3), 0)
        keys = self.rope(self.k_norm(keys).transpose(0, 2, 1, 3), 0)
        # Query heads that share a key head stand below each other: one product for all of them.
        rows = (queries * self.scale).reshape(batch, keys.shape[1], -1, size)
        similar = _numpy_product(rows, keys).reshape(batch, heads, length, length)
        future = mx.triu(mx.full((length, length), -mx.inf), k=1)
        weights = mx.softmax(similar + future, axis=-1).reshape(*rows.shape[:-1], length)
        mixed = _numpy_product(weights, values.transpose(0, 2, 3, 1))
        mixed = mixed.reshape(batch, heads, length, size).transpose(0, 2, 1, 3)
        return self.o_proj(mixed.reshape(batch, length, -1))


def _numpy_product_of(x: mx.array, y: mx.array) -> mx.array:
    """`x @ y^T` over the last two axes."""
    return mx.array(np.array(x, copy=False) @ np.array(y, copy=False).swapaxes(-1, -2))


def _gradients(
    primals: Sequence[mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    x, y = (np.array(primal, copy=False) for primal in primals)
    slope = np.array(cotangent, copy=False)
    return mx.array(slope @ y), mx.array(slope.swapaxes(-1, -2) @ x)


# What `custom_function` returns is typed as a mere object.
_numpy_product: Any = mx.custom_function(_numpy_product_of)
_numpy_product.vjp(_gradients)

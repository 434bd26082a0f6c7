"""Differentiable products by NumPy, for training where MLX has no GPU; a form of `ops.plain`.

NumPy's BLAS is some forty times as fast as MLX's products there, and training is little else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.model import plain
from apertus_mlx.model.operations import Stream
from apertus_mlx.model.plain import (
    embed,
    feed_forward,
    joined_rows,
    next_token_logits,
    normalize,
)

if TYPE_CHECKING:
    from apertus_mlx.cache import Cache
    from apertus_mlx.cache.protocol import Mask
    from apertus_mlx.model.apertus import Attention

__all__ = [
    "attend",
    "embed",
    "feed_forward",
    "joined_rows",
    "next_token_logits",
    "normalize",
    "product",
]


def product(x: mx.array, weight: mx.array) -> mx.array:
    """`x @ weight.T` in float32, for `x` `[..., columns]` and `weight` `[rows, columns]`."""
    if has_gpu():
        return x @ weight.T
    rows: mx.array = _host_product(x.reshape(-1, x.shape[-1]), weight)
    return rows.reshape(*x.shape[:-1], -1)


def attend(
    attention: Attention,
    norm: nn.RMSNorm,
    stream: Stream,
    mask: Mask,  # noqa: ARG001 - always causal
    cache: Cache | None,  # noqa: ARG001 - there is none
) -> Stream:
    """See `Operations.attend`; causal, and without a cache."""
    residual, x = plain.settle(norm, stream)
    queries, keys, values = plain.project(attention, x)
    batch, length, heads, size = queries.shape
    queries = attention.rope(attention.q_norm(queries).transpose(0, 2, 1, 3), 0)
    keys = attention.rope(attention.k_norm(keys).transpose(0, 2, 1, 3), 0)
    # Query heads that share a key head stand below each other: one product for all of them.
    rows = (queries * size**-0.5).reshape(batch, keys.shape[1], -1, size)
    similar = _host_product(rows, keys).reshape(batch, heads, length, length)
    future = mx.triu(mx.full((length, length), -mx.inf), k=1)
    weights = mx.softmax(similar + future, axis=-1)
    mixed = _host_product(weights.reshape(*rows.shape[:-1], length), values.transpose(0, 2, 3, 1))
    mixed = mixed.reshape(batch, heads, length, size).transpose(0, 2, 1, 3)
    return Stream(residual, attention.o_proj(mixed.reshape(batch, length, -1)))


def _host_product_of(x: mx.array, y: mx.array) -> mx.array:
    """`x @ y^T` over the last two axes."""
    return mx.array(np.array(x, copy=False) @ np.array(y, copy=False).swapaxes(-1, -2))


def _gradients(
    primals: Sequence[mx.array], cotangent: mx.array, _: mx.array
) -> tuple[mx.array, mx.array]:
    x, y = (np.array(primal, copy=False) for primal in primals)
    slope = np.array(cotangent, copy=False)
    return mx.array(slope @ y), mx.array(slope.swapaxes(-1, -2) @ x)


# What `custom_function` returns is typed as a mere object.
_host_product: Any = mx.custom_function(_host_product_of)
_host_product.vjp(_gradients)

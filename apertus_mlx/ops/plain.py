"""The plain MLX form of every operation: the reference for all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.cache.segments import Segments
from apertus_mlx.ops import segmented

if TYPE_CHECKING:
    from apertus_mlx.cache import Cache
    from apertus_mlx.cache.protocol import Mask, Stored
    from apertus_mlx.model import MLP, Attention


def add_norm(
    residual: mx.array, update: mx.array | None, norm: nn.RMSNorm
) -> tuple[mx.array, mx.array]:
    """See `Operations.add_norm`."""
    if update is not None:
        residual = residual + update
    return residual, norm(residual)


def project_qkv(attention: Attention, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """See `Operations.project_qkv`."""
    batch, length, _ = x.shape
    queries, keys, values = (
        projection(x).reshape(batch, length, -1, attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return queries, keys, values


def rotate_and_store(
    attention: Attention,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Cache | None,
) -> tuple[mx.array, Stored, Stored]:
    """See `Operations.rotate_and_store`."""
    offset = 0 if cache is None else cache.offset
    queries = attention.rope(attention.q_norm(queries).transpose(0, 2, 1, 3), offset)
    keys = attention.rope(attention.k_norm(keys).transpose(0, 2, 1, 3), offset)
    values = values.transpose(0, 2, 1, 3)
    if cache is None:
        return queries, keys, values
    return queries, *cache.update_and_fetch(keys, values)


def attend(
    attention: Attention, queries: mx.array, keys: Stored, values: Stored, mask: Mask
) -> mx.array:
    """See `Operations.attend`."""
    batch, _, length, _ = queries.shape
    scale = attention.head_dim**-0.5
    if isinstance(keys, mx.array) and isinstance(values, mx.array):
        output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    else:
        assert isinstance(keys, Segments) and isinstance(values, Segments)
        output = segmented.attend(queries, keys, values, scale, mask)
    return attention.o_proj(output.transpose(0, 2, 1, 3).reshape(batch, length, -1))


def feed_forward(mlp: MLP, x: mx.array) -> mx.array:
    """See `Operations.feed_forward`."""
    return mlp.down_proj(mlp.act_fn(mlp.up_proj(x)))


def head(head: nn.Linear | nn.Embedding, x: mx.array) -> mx.array:
    """See `Operations.head`."""
    tied = isinstance(head, nn.Embedding | nn.QuantizedEmbedding)
    return head.as_linear(x) if tied else head(x)

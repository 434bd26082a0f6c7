"""The plain MLX form of every operation: the reference for all others."""

from __future__ import annotations

from typing import TYPE_CHECKING

import mlx.core as mx
import mlx.nn as nn

from apertus_mlx.cache import attention as segmented
from apertus_mlx.cache.segments import Segments
from apertus_mlx.model import embedding_row
from apertus_mlx.model.language_model import NextTokenLogits
from apertus_mlx.model.operations import Stream

if TYPE_CHECKING:
    from apertus_mlx.cache import Cache
    from apertus_mlx.cache.protocol import Mask, Stored
    from apertus_mlx.model.apertus import MLP, Attention

# Keys and values are written apart: joining them first would cost two copies.
joined_rows = False


def embed(embedding: nn.Module, ids: mx.array) -> mx.array:
    """See `Operations.embed`."""
    if ids.size == 1 and getattr(embedding, "by_product", False):
        return embedding_row.row(embedding, ids)
    rows: mx.array = embedding(ids)
    return rows


def attend(
    attention: Attention, norm: nn.RMSNorm, stream: Stream, mask: Mask, cache: Cache | None
) -> Stream:
    """See `Operations.attend`."""
    residual, x = settle(norm, stream)
    return Stream(residual, attention.o_proj(mix(attention, x, mask, cache)))


def feed_forward(mlp: MLP, norm: nn.RMSNorm, stream: Stream) -> Stream:
    """See `Operations.feed_forward`."""
    residual, x = settle(norm, stream)
    return Stream(residual, mlp.down_proj(mlp.act_fn(mlp.up_proj(x))))


def normalize(norm: nn.RMSNorm, stream: Stream) -> mx.array:
    """See `Operations.normalize`."""
    return settle(norm, stream)[1]


def next_token_logits(head: nn.Module, norm: nn.RMSNorm, stream: Stream) -> NextTokenLogits:
    """See `Operations.next_token_logits`."""
    residual, update = stream
    last = Stream(residual[:, -1:], None if update is None else update[:, -1:])
    return NextTokenLogits(logits(head, normalize(norm, last))[0, 0])


def settle(norm: nn.RMSNorm, stream: Stream) -> tuple[mx.array, mx.array]:
    """The residual stream with its update, and its RMS norm, both `[B, L, D]`."""
    residual = stream.residual
    if stream.update is not None:
        residual = residual + stream.update
    return residual, norm(residual)


def mix(attention: Attention, x: mx.array, mask: Mask, cache: Cache | None) -> mx.array:
    """Everything of attention but the norm before and the projection after it.

    From `x` `[B, L, D]` to `[B, L, heads * head_dim]`.
    """
    return weigh(attention, *rotate_and_store(attention, *project(attention, x), cache), mask)


def project(attention: Attention, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Queries `[B, L, heads, head_dim]`, keys and values `[B, L, kv_heads, head_dim]`."""
    if attention.is_joined:
        return split(attention, attention.qkv_proj(x))
    queries, keys, values = (
        projection(x).reshape(*x.shape[:2], -1, attention.head_dim)
        for projection in (attention.q_proj, attention.k_proj, attention.v_proj)
    )
    return queries, keys, values


def split(attention: Attention, qkv: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """See `project`, from what `qkv_proj` gives."""
    heads, kv_heads = attention.heads, attention.kv_heads
    rows = qkv.reshape(*qkv.shape[:2], -1, attention.head_dim)
    queries, keys, values = mx.split(rows, [heads, heads + kv_heads], axis=2)
    return queries, keys, values


def rotate_and_store(
    attention: Attention,
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    cache: Cache | None,
) -> tuple[mx.array, Stored, Stored]:
    """QK-norm, rotary embedding and cache write.

    Returns queries `[B, heads, L, head_dim]` and all keys and values as the cache has them.
    """
    offset = 0 if cache is None else cache.offset
    queries = attention.rope(attention.q_norm(queries).transpose(0, 2, 1, 3), offset)
    keys = attention.rope(attention.k_norm(keys).transpose(0, 2, 1, 3), offset)
    values = values.transpose(0, 2, 1, 3)
    if cache is None:
        return queries, keys, values
    return queries, *cache.update_and_fetch(keys, values)


def weigh(
    attention: Attention, queries: mx.array, keys: Stored, values: Stored, mask: Mask
) -> mx.array:
    """Scaled dot-product attention: from `[B, heads, L, head_dim]` to one row per position."""
    batch, _, length, _ = queries.shape
    scale = attention.head_dim**-0.5
    if isinstance(keys, mx.array) and isinstance(values, mx.array):
        output = mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask)
    else:
        assert isinstance(keys, Segments) and isinstance(values, Segments)
        output = segmented.attend(queries, keys, values, scale, mask)
    return output.transpose(0, 2, 1, 3).reshape(batch, length, -1)


def logits(head: nn.Module, hidden: mx.array) -> mx.array:
    """Logits `[B, L, vocabulary]`, from the tied embedding or the head's own weights."""
    tied = isinstance(head, nn.Embedding | nn.QuantizedEmbedding)
    found: mx.array = head.as_linear(hidden) if tied else head(hidden)
    return found

"""The operations that hardware may want to do in one go, behind names that the model calls.

`plain` is the truth: MLX operations as they stand in the equations. Another form has to agree
with it and implements the same protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from apertus_mlx.cache import Cache
    from apertus_mlx.cache.protocol import Mask, Stored
    from apertus_mlx.model import MLP, Attention


class Operations(Protocol):
    """B: batch, L: new positions, S: all positions, D: hidden size."""

    def add_norm(
        self, residual: mx.array, update: mx.array | None, norm: nn.RMSNorm
    ) -> tuple[mx.array, mx.array]:
        """The new residual `residual + update` and its RMS norm, both `[B, L, D]`."""

    def project_qkv(self, attention: Attention, x: mx.array) -> tuple[mx.array, mx.array, mx.array]:
        """Queries `[B, L, heads, head_dim]`, keys and values `[B, L, kv_heads, head_dim]`."""

    def rotate_and_store(
        self,
        attention: Attention,
        queries: mx.array,
        keys: mx.array,
        values: mx.array,
        cache: Cache | None,
    ) -> tuple[mx.array, Stored, Stored]:
        """QK-norm, rotary embedding and cache write.

        Returns queries `[B, heads, L, head_dim]` and all keys and values as the cache has them:
        arrays `[B, kv_heads, S, head_dim]` or `Segments`.
        """

    def attend(
        self,
        attention: Attention,
        queries: mx.array,
        keys: Stored,
        values: Stored,
        mask: Mask,
    ) -> mx.array:
        """Scaled dot-product attention and output projection, `[B, L, D]`."""

    def feed_forward(self, mlp: MLP, x: mx.array) -> mx.array:
        """Up projection, xIELU and down projection, `[B, L, D]`."""

    def head(self, head: nn.Linear | nn.Embedding, x: mx.array) -> mx.array:
        """Logits `[B, L, vocabulary]`, from the tied embedding or the head's own weights."""

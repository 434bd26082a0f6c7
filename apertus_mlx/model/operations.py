"""The operations that hardware may want to do in one go, behind names that the model calls.

`plain` is the truth: MLX operations as they stand in the equations. Another form has to agree
with it and implements the same protocol.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple, Protocol

if TYPE_CHECKING:
    import mlx.core as mx
    import mlx.nn as nn

    from apertus_mlx.cache import Cache
    from apertus_mlx.cache.protocol import Mask
    from apertus_mlx.model.apertus import MLP, Attention
    from apertus_mlx.model.language_model import NextTokenLogits


class Stream(NamedTuple):
    """The residual stream `[B, L, D]`, and what is still to be added to it by whoever comes next.

    The addition is left open because hardware can do it together with what follows or precedes.
    """

    residual: mx.array
    update: mx.array | None = None


class Operations(Protocol):
    """B: batch, L: new positions, D: hidden size."""

    @property
    def joined_rows(self) -> bool:
        """Whether keys and values of a position are best written to the cache together."""

    def embed(self, embedding: nn.Module, ids: mx.array) -> mx.array:
        """Rows `[B, L, D]` of the token ids `[B, L]`."""

    def attend(
        self,
        attention: Attention,
        norm: nn.RMSNorm,
        stream: Stream,
        mask: Mask,
        cache: Cache | None,
    ) -> Stream:
        """Norm, projections, rotary embedding, cache write, attention and output projection."""

    def feed_forward(self, mlp: MLP, norm: nn.RMSNorm, stream: Stream) -> Stream:
        """Norm, up projection, xIELU and down projection."""

    def normalize(self, norm: nn.RMSNorm, stream: Stream) -> mx.array:
        """The final hidden states `[B, L, D]`."""

    def next_token_logits(
        self, head: nn.Module, norm: nn.RMSNorm, stream: Stream
    ) -> NextTokenLogits:
        """Logits of the token after the last position of the first sequence."""

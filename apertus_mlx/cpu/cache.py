"""The full cache in memory that attention itself writes: nothing is copied when a token comes."""

from __future__ import annotations

import mlx.core as mx
import numpy as np

from apertus_mlx.cache.full import causal_mask, refuse_window
from apertus_mlx.cache.protocol import Mask
from apertus_mlx.cache.store import capacity_for
from apertus_mlx.cpu.weights import Floats


class HostCache:
    """Keys and values of every position, float32, each `[B, kv_heads, capacity, head_dim]`."""

    def __init__(self) -> None:
        self.keys: Floats | None = None
        self.values: Floats | None = None
        self.offset = 0

    def reserve(self, shape: tuple[int, int, int, int]) -> tuple[Floats, Floats]:
        """Make room for new rows of `shape` `[B, kv_heads, L, head_dim]`; return both buffers.

        Whoever writes rows behind `offset` then calls `advance`.
        """
        self.keys = _grown(self.keys, shape, self.offset)
        self.values = _grown(self.values, shape, self.offset)
        return self.keys, self.values

    def advance(self, count: int) -> None:
        """Count `count` rows that were written behind the others."""
        self.offset += count

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """See `Cache.update_and_fetch`; what comes back are copies."""
        rows = keys.shape[2]
        places = slice(self.offset, self.offset + rows)
        batch, heads, _, width = keys.shape
        buffers = self.reserve((batch, heads, rows, width))
        for buffer, new in zip(buffers, (keys, values), strict=True):
            buffer[:, :, places] = np.asarray(new.astype(mx.float32))
        self.advance(rows)
        mine, other = self.state
        return mine, other

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Causal for several queries, none for one."""
        refuse_window(window_size)
        if N == 1:
            return None
        return causal_mask(N, self.offset) if return_array else "causal"

    @property
    def state(self) -> list[mx.array]:
        """Copies of all keys and values so far."""
        return [
            mx.array(buffer[:, :, : self.offset])
            for buffer in (self.keys, self.values)
            if buffer is not None
        ]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(buffer.nbytes for buffer in (self.keys, self.values) if buffer is not None)

    def trim(self, n: int) -> int:
        """Forget the last `n` positions; returns how many were forgotten."""
        n = min(self.offset, n)
        self.offset -= n
        return n

    def is_trimmable(self) -> bool:
        """Any suffix can be forgotten exactly."""
        return True

    def size(self) -> int:
        """Number of positions held."""
        return self.offset

    def empty(self) -> bool:
        """Whether nothing has been written yet."""
        return self.offset == 0


def _grown(buffer: Floats | None, new: tuple[int, int, int, int], used: int) -> Floats:
    batch, heads, count, width = new
    if buffer is not None and used + count <= buffer.shape[2]:
        return buffer
    grown = np.zeros((batch, heads, capacity_for(used + count), width), np.float32)
    if buffer is not None:
        grown[:, :, :used] = buffer[:, :, :used]
    return grown

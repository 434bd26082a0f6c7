"""The full cache in memory that attention itself writes: nothing is copied when a token comes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Self

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.cpu.weights import Floats
from apertus_mlx.cache.full import FullCache
from apertus_mlx.cache.store import Store

MIN_STEP = 64


class CPUStore(Store):
    """Keeps every row of one float32 buffer `[B, heads, capacity, width]`."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer: Floats | None = None

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return 0 if self.buffer is None else self.buffer.nbytes

    @property
    def room(self) -> int:
        """Number of rows allocated."""
        return 0 if self.buffer is None else self.buffer.shape[2]

    def capacity(self, rows: int) -> int:
        """In smaller steps than `Store`'s, as `SingleStep` reads unused rows, too."""
        step = max(MIN_STEP, 1 << max(0, rows.bit_length() - 6))
        return -(-rows // step) * step

    def reserve_more(self, batch: int, heads: int, count: int, width: int) -> Floats:
        """The buffer, with room for `count` more rows. Who writes them then counts `length` up."""
        wanted = self.length + count
        if self.buffer is None or wanted > self.room:
            grown = np.zeros((batch, heads, self.capacity(wanted), width), np.float32)
            if self.buffer is not None:
                grown[:, :, : self.length] = self.buffer[:, :, : self.length]
            self.buffer = grown
        return self.buffer

    def append(
        self,
        new: Sequence[mx.array],
        keep_evicted: bool = False,  # noqa: ARG002 - nothing is pushed out here
    ) -> list[mx.array]:
        """Write rows behind the others; returns a copy of all."""
        (rows,) = new
        batch, heads, count, width = rows.shape
        buffer = self.reserve_more(batch, heads, count, width)
        buffer[:, :, self.length : self.length + count] = np.asarray(rows.astype(mx.float32))
        self.length += count
        return self.rows()

    def rows(self) -> list[mx.array]:
        """A copy of all rows held."""
        if self.buffer is None or self.length == 0:
            return []
        return [mx.array(self.buffer[:, :, : self.length])]

    def fork(self) -> Self:
        """As `Store` does; what numpy writes in place is copied at once."""
        twin = super().fork()
        if self.buffer is not None:
            twin.buffer = self.buffer[:, :, : self.capacity(self.length)].copy()
        return twin

    def compact(self) -> None:
        """Give back the room that the rows held do not need."""
        if self.buffer is not None and self.capacity(self.length) < self.room:
            self.buffer = self.buffer[:, :, : self.capacity(self.length)].copy()

    def restore(self, rows: Sequence[mx.array], length: int) -> None:
        """As `Store` does, in a new buffer."""
        self.buffer = None
        super().restore(rows, length)


class CPUCache(FullCache):
    """A `FullCache` in full precision whose memory numpy and onnxruntime share."""

    def __init__(self) -> None:
        super().__init__(joined=True)
        self.rows: CPUStore = CPUStore()
        # What `SingleStep` has made for this memory; here, as it is to live as long as the cache.
        self.step_memory: object = None

    def reserve(self, batch: int, kv_heads: int, count: int, width: int) -> tuple[Floats, Floats]:
        """All keys and all values `[B, kv_heads, capacity, width]`, with room for `count` more.

        Whoever writes them, in place behind `offset`, then calls `advance`.
        """
        buffer = self.rows.reserve_more(batch, 2 * kv_heads, count, width)
        return buffer[:, :kv_heads], buffer[:, kv_heads:]

    def fork(self) -> Self:
        """See `FullCache.fork`."""
        twin = super().fork()
        twin.step_memory = None
        return twin

    def advance(self, count: int) -> None:
        """Count `count` positions that were written behind the others."""
        self.rows.length += count

"""The plain cache: every position, in full precision."""

from __future__ import annotations

import mlx.core as mx

from apertus_mlx.cache.protocol import Mask

GROWTH_STEP = 256


class FullCache:
    """Keys and values `[B, kv_heads, capacity, head_dim]`, grown in steps of 256 positions."""

    def __init__(self) -> None:
        self.keys: mx.array | None = None
        self.values: mx.array | None = None
        self.offset = 0

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `keys` and `values` `[B, kv_heads, L, head_dim]`; return all so far."""
        start, self.offset = self.offset, self.offset + keys.shape[2]
        self.keys = _written(self.keys, keys, start)
        self.values = _written(self.values, values, start)
        return self.keys[..., : self.offset, :], self.values[..., : self.offset, :]

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Causal for several queries, none for one."""
        if window_size is not None:
            raise ValueError("Apertus has no sliding window")
        if N == 1:
            return None
        return causal_mask(N, self.offset) if return_array else "causal"

    def trim(self, n: int) -> int:
        """Forget the last `n` positions; returns how many were forgotten."""
        n = min(self.offset, n)
        self.offset -= n
        return n

    def is_trimmable(self) -> bool:
        """Any suffix can be forgotten exactly."""
        return True

    @property
    def state(self) -> list[mx.array]:
        """The arrays behind the cache, for evaluation."""
        return [array for array in (self.keys, self.values) if array is not None]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in self.state)


def causal_mask(length: int, offset: int) -> mx.array:
    """Boolean `[length, offset + length]`: query i sees keys 0 to offset + i."""
    queries = mx.arange(offset, offset + length)[:, None]
    return queries >= mx.arange(offset + length)[None]


def _written(buffer: mx.array | None, new: mx.array, start: int) -> mx.array:
    end = start + new.shape[2]
    capacity = 0 if buffer is None else buffer.shape[2]
    if end > capacity:
        grown = (end + GROWTH_STEP - 1) // GROWTH_STEP * GROWTH_STEP
        batch, heads, _, width = new.shape
        room = mx.zeros((batch, heads, grown - start, width), new.dtype)
        buffer = room if buffer is None else mx.concatenate([buffer[..., :start, :], room], axis=2)
    assert buffer is not None
    buffer[..., start:end, :] = new
    return buffer

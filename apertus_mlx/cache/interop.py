"""Our caches for mlx-lm's own models, which attend to plain arrays only.

Models of this package understand `Segments`, so mlx-lm's tools run them with any of our caches as
they are. An mlx-lm model gets the dequantized whole at each step instead: right, and small in
between, but no faster than full precision.
"""

from __future__ import annotations

import mlx.core as mx

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.cache.protocol import Mask
from apertus_mlx.cache.quantized import QuantizedCache


class ArrayCache:
    """A quantized cache that answers with arrays `[B, kv_heads, S, head_dim]`."""

    def __init__(self, config: CacheConfig, head_dim: int) -> None:
        self.inner = QuantizedCache(config, head_dim)

    @property
    def offset(self) -> int:
        """Number of positions written so far."""
        return self.inner.offset

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append and return everything, dequantized and rotated back."""
        all_keys, all_values = self.inner.update_and_fetch(keys, values)
        return all_keys.dense(keys.dtype), all_values.dense(values.dtype)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """See `QuantizedCache.make_mask`."""
        return self.inner.make_mask(N, return_array, window_size)

    def trim(self, n: int) -> int:
        """See `Cache.trim`."""
        return self.inner.trim(n)

    def is_trimmable(self) -> bool:
        """Whether the last position can be forgotten exactly."""
        return self.inner.is_trimmable()

    def size(self) -> int:
        """Number of positions held."""
        return self.inner.size()

    def empty(self) -> bool:
        """Whether nothing has been written yet."""
        return self.inner.empty()

    @property
    def state(self) -> list[mx.array]:
        """The arrays behind the cache."""
        return self.inner.state

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.inner.nbytes

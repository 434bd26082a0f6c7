"""What the model asks of a cache. mlx-lm's plain caches answer to the same names."""

from __future__ import annotations

from typing import Any, Protocol

import mlx.core as mx

from apertus_mlx.cache.segments import Segments

# None, "causal" (all keys up to the query's own), or a boolean array `[L, S]`.
Mask = mx.array | str | None
# Keys or values as attention gets them: one array `[B, kv_heads, S, head_dim]`, or several parts;
# for sequences of different lengths, these of each of them.
One = mx.array | Segments
Stored = One | tuple[One, ...]


class Cache(Protocol):
    """Keys and values of one layer for all positions so far."""

    @property
    def offset(self) -> Any:
        """Number of positions written so far: the rotary position of the next token."""

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Stored, Stored]:
        """Append `[B, kv_heads, L, head_dim]` and return everything that is to be attended to."""

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """The mask for `N` new queries over what `update_and_fetch` will return."""

    @property
    def state(self) -> list[mx.array]:
        """The arrays behind the cache, for evaluation."""

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""

    def trim(self, n: int) -> int:
        """Forget the last `n` positions as if they had never been; returns how many were.

        All or nothing: where that cannot be done exactly, nothing changes and 0 is returned.
        """

    def is_trimmable(self) -> bool:
        """Whether at least the last position can be forgotten exactly."""

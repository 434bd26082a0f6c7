"""Every position in full precision."""

from __future__ import annotations

from copy import copy
from typing import Self

import mlx.core as mx

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.cache.protocol import Mask
from apertus_mlx.cache.store import Ring, Store


class FullCache:
    """Keys and values as they come, `[B, kv_heads, S, head_dim]` each.

    With a bound, the sinks and the latest positions of the ring behind them; a query then sees,
    beside the sinks, itself and the `ring - 1` positions before it.

    Args:
        config: the bound.
        joined: keep both in one buffer `[B, 2 * kv_heads, S, head_dim]`, keys first, so that a
            kernel that makes both can write them at once (`append`).
    """

    def __init__(self, config: CacheConfig | None = None, joined: bool = False) -> None:
        self.config = config or CacheConfig()
        self.joined = joined
        bound = self.config.bound
        self.rows = Store() if bound is None else Ring(bound, self.config.sinks)

    @property
    def offset(self) -> int:
        """Number of positions written so far."""
        return self.rows.length

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append `keys` and `values` `[B, kv_heads, L, head_dim]`; return all to attend to."""
        if self.joined:
            return self.append(mx.concatenate([keys, values], axis=1))
        keys, values = self.rows.append([keys, values], keep_evicted=keys.shape[2] > 1)
        return keys, values

    def append(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Append `[B, 2 * kv_heads, L, head_dim]`, keys before values; return both to attend to."""
        if not self.joined:
            return self.update_and_fetch(*halves(rows))
        (seen,) = self.rows.append([rows], keep_evicted=rows.shape[2] > 1)
        return halves(seen)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """Causal for several queries, none for one; an array where a ring drops positions."""
        refuse_window(window_size)
        if N == 1:
            return None
        ring = self.config.ring
        wraps = self.config.bound is not None and self.offset + N > self.config.bound
        if not wraps or ring is None:
            return causal_mask(N, self.offset) if return_array else "causal"
        queries = mx.arange(self.offset, self.offset + N)[:, None]
        keys = self.rows.numbers(N)[None]
        recent = (keys <= queries) & (keys > queries - ring)
        return recent | (keys < self.config.sinks) & (keys <= queries)

    def trim(self, n: int) -> int:
        """Forget the last `n` positions; a ring that has dropped positions forgets none."""
        n = min(self.offset, n)
        if not self.rows.can_shrink(self.offset - n):
            return 0
        self.rows.shrink(self.offset - n)
        return n

    def allow_cut(self, positions: int) -> bool:
        """See `apertus_mlx.cache.allow_cut`."""
        if isinstance(self.rows, Ring):
            self.rows.spare = positions
        return True

    def is_trimmable(self) -> bool:
        """Whether the last position can be forgotten exactly."""
        return self.rows.can_shrink(max(self.offset - 1, 0))

    def expect(self, positions: int) -> None:
        """Prepare for so many positions in all, so that no growing is needed on the way."""
        self.rows.expected = positions

    def export(self) -> dict[str, mx.array]:
        """What `restore` needs, by name."""
        rows = self.rows.rows()
        return {"rows": rows[0] if self.joined else mx.concatenate(rows, axis=1)}

    def restore(self, arrays: dict[str, mx.array], positions: int) -> None:
        """Take over what a cache of the same form exported after so many positions."""
        rows = arrays["rows"]
        self.rows.restore([rows] if self.joined else halves(rows), positions)

    def fork(self) -> Self:
        """A cache of the same positions that goes its own way; who writes first copies them."""
        twin = copy(self)
        twin.rows = self.rows.fork()
        return twin

    def compact(self) -> None:
        """Give back memory that the positions held do not need."""
        self.rows.compact()

    def size(self) -> int:
        """Number of positions held."""
        return self.rows.held

    def empty(self) -> bool:
        """Whether nothing has been written yet."""
        return self.offset == 0

    @property
    def state(self) -> list[mx.array]:
        """The arrays behind the cache."""
        return self.rows.arrays

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return self.rows.nbytes


def halves(rows: mx.array) -> tuple[mx.array, mx.array]:
    """Keys and values of rows that hold both."""
    heads = rows.shape[1] // 2
    return rows[:, :heads], rows[:, heads:]


def causal_mask(length: int, offset: int) -> mx.array:
    """Boolean `[length, offset + length]`: query i sees keys 0 to offset + i."""
    queries = mx.arange(offset, offset + length)[:, None]
    return queries >= mx.arange(offset + length)[None]


def refuse_window(window_size: int | None) -> None:
    """Refuse a sliding window, which mlx-lm's interface has and Apertus has not."""
    if window_size is not None:
        raise ValueError("Apertus has no sliding window")

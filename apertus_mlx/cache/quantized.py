"""Quantized keys and values, with the sinks and the latest positions in full precision.

After N positions, S sinks and a window of W, the first f(N) = floor((N - S - W) / 32) * 32
positions after the sinks are codes, all others full precision. A query at position i sees what
stands after i + 1 positions, also inside a chunk: so results do not depend on the chunking. With
a bound, the codes are a ring of Q positions, and the query sees those from f(i + 1) - Q on.
"""

from __future__ import annotations

from collections.abc import Iterator
from copy import copy
from typing import Self

import mlx.core as mx

from apertus_mlx.cache.codes import quantize
from apertus_mlx.cache.config import FULL_BITS, STEP, CacheConfig, group_size
from apertus_mlx.cache.full import causal_mask, halves, refuse_window
from apertus_mlx.cache.protocol import Mask
from apertus_mlx.cache.segments import Codes, Segments, rotate
from apertus_mlx.cache.store import Ring, Store


class QuantizedCache:
    """Codes for most positions; sinks and latest positions `[B, 2 * kv_heads, S, head_dim]`.

    The latter lie in `recent` in the order of positions. `departed` holds the last block that was
    quantized, so that at least its length can be rewound exactly.

    `whole_codes`: attention gets codes in one piece, never as a slice of a larger array.
    """

    def __init__(self, config: CacheConfig, head_dim: int, whole_codes: bool = False) -> None:
        config.require_fit(head_dim)
        self.config = config
        self.head_dim = head_dim
        self.rotated = config.rotates(head_dim)
        self.offset = 0
        ring = config.ring
        self.older = Store(whole_codes) if ring is None else Ring(ring, whole=whole_codes)
        self.recent: mx.array | None = None
        self.departed: mx.array | None = None

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[Segments, Segments]:
        """Append `keys` and `values` `[B, kv_heads, L, head_dim]`; return all to attend to."""
        return self.append(mx.concatenate([keys, values], axis=1))

    def append(self, rows: mx.array) -> tuple[Segments, Segments]:
        """Append `[B, 2 * kv_heads, L, head_dim]`, keys before values; return both to attend to."""
        count = rows.shape[2]
        if self.rotated:
            keys, values = halves(rows)
            rows = mx.concatenate([rotate(keys), values], axis=1)
        seen = self._with_recent(rows)
        leaving = self._leaving(count)
        self.offset += count
        older = self.older.rows()
        if leaving:
            sinks = self.config.sinks
            block = seen[:, :, sinks : sinks + leaving]
            older = self.older.append(self._quantized(block), keep_evicted=count > 1)
            # A copy: the slice would keep all of a long chunk alive.
            self.departed = mx.contiguous(block[:, :, -STEP:])
            self.recent = self._padded([seen[:, :, :sinks], seen[:, :, sinks + leaving :]])
            if count == 1:
                seen = self.recent[:, :, : self._held]
        return self._segments(older, seen)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:
        """None for one query, causal while nothing is quantized, else an array."""
        refuse_window(window_size)
        if N == 1:
            return None
        config, start = self.config, self.offset
        leaving = self._leaving(N)
        if self.older.length + leaving == 0:
            return causal_mask(N, start) if return_array else "causal"
        queries = mx.arange(start, start + N)[:, None]
        # f(i + 1) of the docstring above, in every row.
        flushed = mx.maximum(queries + 1 - config.sinks - config.window, 0) // STEP * STEP
        codes = self.older.numbers(leaving)[None]
        codes_seen = codes < flushed
        if config.ring is not None:
            codes_seen = codes_seen & (codes >= flushed - config.ring)
        live = mx.arange(config.sinks + self.older.length, start + N)
        recent = mx.concatenate([mx.arange(min(config.sinks, start + N)), live])[None]
        kept = (recent < config.sinks) | (recent >= config.sinks + flushed)
        return mx.concatenate([codes_seen, kept & (recent <= queries)], axis=1)

    def trim(self, n: int) -> int:
        """Forget the last `n` positions: 32 at least, more unless that needs rows now quantized."""
        n = min(self.offset, n)
        target = self.offset - n
        if not self._can_return_to(target):
            return 0
        if self.recent is not None and target > self.config.sinks:
            back = self.older.length - self.config.flushed(target)
            if back:
                sinks = self.config.sinks
                held = self.recent[:, :, : self._held]
                assert self.departed is not None
                restored = [held[:, :, :sinks], self.departed, held[:, :, sinks:]]
                self.recent, self.departed = self._padded(restored), None
        self.older.shrink(self.config.flushed(target))
        self.offset = target
        return n

    def allow_cut(self, positions: int) -> bool:
        """See `apertus_mlx.cache.allow_cut`; the codes of a ring leave by blocks."""
        if isinstance(self.older, Ring):
            self.older.spare = STEP if positions else 0
        return positions < STEP

    def is_trimmable(self) -> bool:
        """Whether the last position can be forgotten exactly."""
        return self._can_return_to(max(self.offset - 1, 0))

    def expect(self, positions: int) -> None:
        """Prepare for so many positions in all, so that no growing is needed on the way."""
        self.older.expected = self.config.flushed(positions)

    def export(self) -> dict[str, mx.array]:
        """What `restore` needs, by name."""
        arrays = dict(zip(self._names(), self.older.rows(), strict=False))
        if self.recent is not None and self._held:
            arrays["recent"] = self.recent[:, :, : self._held]
        if self.departed is not None and self.older.length:
            arrays["departed"] = self.departed
        return arrays

    def restore(self, arrays: dict[str, mx.array], positions: int) -> None:
        """Take over what a cache of the same form exported after so many positions."""
        older = [arrays[name] for name in self._names() if name in arrays]
        self.older.restore(older, self.config.flushed(positions))
        self.recent = self._padded([arrays["recent"]]) if "recent" in arrays else None
        self.departed = arrays.get("departed")
        self.offset = positions

    def _names(self) -> list[str]:
        """Names of the arrays of `older`."""
        parts = (".words", ".scales", ".biases")
        return [
            f"{name}{part}"
            for name, bits in zip(("keys", "values"), self._bits, strict=True)
            for part in ([""] if bits == FULL_BITS else parts)
        ]

    def fork(self) -> Self:
        """A cache of the same positions that goes its own way; who writes first copies them."""
        twin = copy(self)
        twin.older = self.older.fork()
        # `departed` is replaced, never written to.
        twin.recent = None if self.recent is None else mx.array(self.recent)
        return twin

    def compact(self) -> None:
        """Give back memory that the positions held do not need."""
        self.older.compact()

    def size(self) -> int:
        """Number of positions held."""
        return self.older.held + self._held

    def empty(self) -> bool:
        """Whether nothing has been written yet."""
        return self.offset == 0

    @property
    def state(self) -> list[mx.array]:
        """The arrays behind the cache."""
        extra = [array for array in (self.recent, self.departed) if array is not None]
        return [*extra, *self.older.arrays]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in self.state)

    @property
    def _bits(self) -> tuple[int, int]:
        return self.config.key_bits, self.config.value_bits

    @property
    def _held(self) -> int:
        """Rows of `recent` that are in use."""
        return self.offset - self.config.flushed(self.offset)

    def _leaving(self, count: int) -> int:
        """Positions that will be quantized when `count` more have come."""
        return self.config.flushed(self.offset + count) - self.older.length

    def _can_return_to(self, target: int) -> bool:
        flushed = self.config.flushed(target)
        if target <= self.config.sinks or flushed == self.older.length:
            return True
        back = self.older.length - flushed
        available = 0 if self.departed is None else self.departed.shape[2]
        return back <= available and self.older.can_shrink(flushed)

    def _with_recent(self, rows: mx.array) -> mx.array:
        """All rows in full precision, `rows` last; in place where there is room for them."""
        held, count = self._held, rows.shape[2]
        if self.recent is None:
            self.recent = mx.zeros((*rows.shape[:2], self._room, rows.shape[3]), rows.dtype)
        if held + count > self._room:
            return mx.concatenate([self.recent[:, :, :held], rows], axis=2)
        self.recent[:, :, held : held + count] = rows
        return self.recent[:, :, : held + count]

    @property
    def _room(self) -> int:
        return self.config.sinks + self.config.window + STEP

    def _padded(self, parts: list[mx.array]) -> mx.array:
        """`parts` one after the other in a new array of fixed length."""
        parts = parts[:]
        missing = self._room - sum(part.shape[2] for part in parts)
        if missing > 0:
            like = parts[0]
            parts.append(mx.zeros((*like.shape[:2], missing, like.shape[3]), like.dtype))
        return mx.concatenate(parts, axis=2)[:, :, : self._room]

    def _quantized(self, block: mx.array) -> list[mx.array]:
        """The arrays that `older` keeps of `block` `[B, 2 * kv_heads, L, head_dim]`."""
        arrays = []
        for rows, bits in zip(halves(block), self._bits, strict=True):
            if bits == FULL_BITS:
                arrays.append(rows)
            else:
                codes = quantize(rows, bits, group_size(self.head_dim))
                arrays += [codes.words, codes.scales, codes.biases]
        return arrays

    def _segments(self, older: list[mx.array], recent: mx.array) -> tuple[Segments, Segments]:
        rest = iter(older)
        coded = [self._part(rest, bits) for bits in self._bits] if older else []
        keys, values = halves(recent)
        return Segments((*coded[:1], keys), self.rotated), Segments((*coded[1:], values))

    def _part(self, arrays: Iterator[mx.array], bits: int) -> mx.array | Codes:
        if bits == FULL_BITS:
            return next(arrays)
        return Codes(next(arrays), next(arrays), next(arrays), bits, group_size(self.head_dim))

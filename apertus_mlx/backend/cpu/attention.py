"""Attention over any cache: in place for the host's own form, through arrays for all others."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.backend.cpu import attention_graphs
from apertus_mlx.backend.cpu.cache import CPUCache
from apertus_mlx.backend.cpu.runtime import Session
from apertus_mlx.backend.cpu.weights import Floats
from apertus_mlx.cache import Cache
from apertus_mlx.cache import attention as segmented
from apertus_mlx.cache.protocol import Mask
from apertus_mlx.checkpoint.config import ModelConfig

# Scores that are computed at a time, over all heads: bounds what a long prompt takes.
MAX_SCORES = 2**21


class Attention:
    """Grouped-query attention of rotated queries `[1, B * L, heads * head_dim]`."""

    def __init__(self, config: ModelConfig) -> None:
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._width = config.head_dim
        self._session = Session(attention_graphs.many_positions(config), {})

    def __call__(
        self, queries: Floats, keys: Floats, values: Floats, batch: int, cache: Cache
    ) -> Floats:
        """Append keys and values `[1, B * L, kv_heads * head_dim]` to `cache` and attend to all.

        Returns the heads' outputs `[B * L, heads * head_dim]`.
        """
        queries, keys, values = (
            array.reshape(batch, array.shape[1] // batch, -1) for array in (queries, keys, values)
        )
        if isinstance(cache, CPUCache):
            return self._in_place(queries, keys, values, cache)
        return self._through_arrays(queries, keys, values, cache)

    def _in_place(self, queries: Floats, keys: Floats, values: Floats, cache: CPUCache) -> Floats:
        """The kernel writes keys and values itself, behind the others."""
        batch, length, _ = queries.shape
        all_keys, all_values = cache.reserve(batch, self._kv_heads, length, self._width)
        step = max(1, MAX_SCORES // (self._heads * (cache.offset + length)))
        heads = np.empty_like(queries)
        # It continues several sequences at once only when each brings a single position.
        for row in range(batch):
            one = slice(row, row + 1)
            memory = {"all_keys": all_keys[one], "all_values": all_values[one]}
            written = {"new_keys": all_keys[one], "new_values": all_values[one]}
            bound = self._session.bind().place(memory, written)
            for start in range(0, length, step):
                part = slice(start, min(start + step, length))
                total = cache.offset + part.stop
                inputs = {
                    "queries": queries[one, part],
                    "keys": keys[one, part],
                    "values": values[one, part],
                    "last": np.array([total - 1], np.int32),
                    "total": np.array([total], np.int32),
                }
                bound.place(inputs, {"heads": heads[one, part]}).run()
        cache.advance(length)
        return heads.reshape(batch * length, -1)

    def _through_arrays(
        self, queries: Floats, keys: Floats, values: Floats, cache: Cache
    ) -> Floats:
        batch, length, _ = queries.shape
        mask = cache.make_mask(length)
        rows = (mx.array(self._by_head(array, self._kv_heads)) for array in (keys, values))
        stored_keys, stored_values = cache.update_and_fetch(*rows)
        by_head = self._by_head(queries, self._heads)
        if isinstance(stored_keys, mx.array) and isinstance(stored_values, mx.array):
            output = self._attend(by_head, np.asarray(stored_keys), np.asarray(stored_values), mask)
        else:
            assert not isinstance(stored_keys, mx.array)
            assert not isinstance(stored_values, mx.array)
            scale = self._width**-0.5
            attended = segmented.attend(mx.array(by_head), stored_keys, stored_values, scale, mask)
            output = np.asarray(attended)
        return output.transpose(0, 2, 1, 3).reshape(batch * length, -1)

    def _attend(self, queries: Floats, keys: Floats, values: Floats, mask: Mask) -> Floats:
        """`mx.fast.scaled_dot_product_attention`, with numpy's matrix product."""
        batch, heads, length, width = queries.shape
        grouped = queries.reshape(batch, self._kv_heads, -1, width)
        scores: Floats = grouped @ keys.swapaxes(-1, -2)
        scores *= np.float32(width**-0.5)
        if mask is not None:
            visible = _visible(mask, length, keys.shape[2])
            by_query = scores.reshape(batch, heads, length, -1)
            np.copyto(by_query, np.float32(-np.inf), where=~visible)
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        output: Floats = (scores @ values).reshape(batch, heads, length, width)
        return output

    def _by_head(self, array: Floats, heads: int) -> Floats:
        """`[B, L, heads * head_dim]` as `[B, heads, L, head_dim]`."""
        batch, length, _ = array.shape
        return array.reshape(batch, length, heads, self._width).transpose(0, 2, 1, 3)


def _visible(mask: mx.array | str, length: int, total: int) -> npt.NDArray[np.bool_]:
    if isinstance(mask, mx.array):
        return np.asarray(mask)
    return np.tri(length, total, total - length, dtype=np.bool_)

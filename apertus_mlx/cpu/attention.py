"""Attention over any cache: in place for the host's own form, through arrays for all others."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import mlx.core as mx
import numpy as np
import numpy.typing as npt
from onnx import TensorProto, helper

from apertus_mlx.cache import Cache
from apertus_mlx.cache.protocol import Mask
from apertus_mlx.config import ModelConfig
from apertus_mlx.cpu.cache import HostCache
from apertus_mlx.cpu.runtime import Binding, Session
from apertus_mlx.cpu.stage import IR_VERSION, MICROSOFT, OPSETS
from apertus_mlx.cpu.weights import Floats
from apertus_mlx.ops import segmented

# Scores that are computed at a time, over all heads: bounds what a long prompt takes.
MAX_SCORES = 2**21


class Attention:
    """Grouped-query attention of rotated queries `[1, B * L, heads * head_dim]`."""

    def __init__(self, config: ModelConfig) -> None:
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._width = config.head_dim
        self._session = Session(_graph(config), {})
        # What is bound for each cache, and to which memory: that of a growing cache moves.
        self._bindings: WeakKeyDictionary[HostCache, tuple[Floats | None, list[Binding]]]
        self._bindings = WeakKeyDictionary()

    def __call__(
        self, queries: Floats, keys: Floats, values: Floats, batch: int, cache: Cache
    ) -> Floats:
        """Append keys and values `[1, B * L, kv_heads * head_dim]` to `cache` and attend to all.

        Returns the heads' outputs `[B * L, heads * head_dim]`.
        """
        queries, keys, values = (
            array.reshape(batch, array.shape[1] // batch, -1) for array in (queries, keys, values)
        )
        if isinstance(cache, HostCache):
            return self._in_place(queries, keys, values, cache)
        return self._through_arrays(queries, keys, values, cache)

    def _in_place(self, queries: Floats, keys: Floats, values: Floats, cache: HostCache) -> Floats:
        batch, length, _ = queries.shape
        bindings = self._bound(cache, batch, length)
        step = max(1, MAX_SCORES // (self._heads * (cache.offset + length)))
        outputs = []
        # The kernel continues several sequences at once only when each brings a single position.
        for row, bound in enumerate(bindings):
            for start in range(0, length, step):
                stop = min(start + step, length)
                total = cache.offset + stop
                inputs = {
                    "queries": queries[row : row + 1, start:stop],
                    "keys": keys[row : row + 1, start:stop],
                    "values": values[row : row + 1, start:stop],
                    "last": np.array([total - 1], np.int32),
                    "total": np.array([total], np.int32),
                }
                outputs.append(bound(inputs)[0])
        cache.advance(length)
        return outputs[0] if len(outputs) == 1 else np.concatenate(outputs)

    def _bound(self, cache: HostCache, batch: int, length: int) -> list[Binding]:
        """The kernel on the memory of each sequence in `cache`, with room for `length` more."""
        all_keys, all_values = cache.reserve(batch, self._kv_heads, length, self._width)
        memory, bindings = self._bindings.get(cache, (None, []))
        if memory is not None and memory is cache.rows.buffer and length == 1:
            return bindings
        updated = {"all_keys": "new_keys", "all_values": "new_values"}
        bindings = []
        for row in range(batch):
            one = slice(row, row + 1)
            kept = {"all_keys": all_keys[one], "all_values": all_values[one]}
            bindings.append(self._session.bind(kept, updated))
        # A binding keeps its last inputs: those of a long chunk are not worth it.
        if length == 1:
            self._bindings[cache] = (cache.rows.buffer, bindings)
        return bindings

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


def _graph(config: ModelConfig) -> bytes:
    kv_heads, width = config.num_key_value_heads, config.head_dim
    floats, ints = TensorProto.FLOAT, TensorProto.INT32
    describe = helper.make_tensor_value_info
    buffer: list[str | int | None] = [1, kv_heads, "capacity", width]
    query_shape: list[str | int | None] = [1, "length", config.num_attention_heads * width]
    row_shape: list[str | int | None] = [1, "length", kv_heads * width]
    inputs = [
        describe("queries", floats, query_shape),
        describe("keys", floats, row_shape),
        describe("values", floats, row_shape),
        describe("all_keys", floats, buffer),
        describe("all_values", floats, buffer),
        describe("last", ints, [1]),
        describe("total", ints, [1]),
    ]
    outputs = [
        describe("heads", floats, query_shape),
        describe("new_keys", floats, buffer),
        describe("new_values", floats, buffer),
    ]
    node = helper.make_node(
        "GroupQueryAttention",
        [value.name for value in inputs],
        [value.name for value in outputs],
        domain=MICROSOFT,
        num_heads=config.num_attention_heads,
        kv_num_heads=kv_heads,
    )
    graph = helper.make_graph([node], "attention", inputs, outputs)
    model = helper.make_model(graph, opset_imports=OPSETS, ir_version=IR_VERSION)
    serialized: bytes = model.SerializeToString()
    return serialized

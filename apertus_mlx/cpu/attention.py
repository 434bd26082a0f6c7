"""Attention over any cache: in place for the host's own form, through arrays for all others."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from onnx import TensorProto, helper

from apertus_mlx.cache import Cache
from apertus_mlx.cache.protocol import Stored
from apertus_mlx.config import ModelConfig
from apertus_mlx.cpu.cache import HostCache
from apertus_mlx.cpu.runtime import Session
from apertus_mlx.cpu.stage import IR_VERSION, MICROSOFT, OPSETS
from apertus_mlx.cpu.weights import Floats


class Attention:
    """Grouped-query attention of rotated queries `[1, B * L, heads * head_dim]`."""

    def __init__(self, config: ModelConfig) -> None:
        self._heads = config.num_attention_heads
        self._kv_heads = config.num_key_value_heads
        self._width = config.head_dim
        self._session = Session(_graph(config), {})

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
        buffers = cache.reserve((batch, self._kv_heads, length, self._width))
        total = cache.offset + length
        outputs = []
        # The kernel continues several prompts at once only when each brings a single position.
        for row in range(batch):
            inputs = {
                "queries": queries[row : row + 1],
                "keys": keys[row : row + 1],
                "values": values[row : row + 1],
                "all_keys": buffers[0][row : row + 1],
                "all_values": buffers[1][row : row + 1],
                "last": np.array([total - 1], np.int32),
                "total": np.array([total], np.int32),
            }
            updated = {"all_keys": "new_keys", "all_values": "new_values"}
            outputs.append(self._session.run_in_place(inputs, updated)[0])
        cache.advance(length)
        return outputs[0] if batch == 1 else np.concatenate(outputs)

    def _through_arrays(
        self, queries: Floats, keys: Floats, values: Floats, cache: Cache
    ) -> Floats:
        batch, length, _ = queries.shape
        mask = cache.make_mask(length)
        rows = (mx.array(self._by_head(array, self._kv_heads)) for array in (keys, values))
        all_keys, all_values = (_dense(stored) for stored in cache.update_and_fetch(*rows))
        grouped = self._by_head(queries, self._heads).reshape(
            batch, self._kv_heads, -1, self._width
        )
        scores = grouped @ all_keys.swapaxes(-1, -2)
        scores *= np.float32(self._width**-0.5)
        if mask is not None:
            by_query = scores.reshape(batch, self._heads, length, -1)
            by_query += _additive(mask, length, all_keys.shape[2])
        scores -= scores.max(axis=-1, keepdims=True)
        np.exp(scores, out=scores)
        scores /= scores.sum(axis=-1, keepdims=True)
        output = (scores @ all_values).reshape(batch, self._heads, length, self._width)
        return output.transpose(0, 2, 1, 3).reshape(batch * length, -1)

    def _by_head(self, array: Floats, heads: int) -> Floats:
        """`[B, L, heads * head_dim]` as `[B, heads, L, head_dim]`."""
        batch, length, _ = array.shape
        return array.reshape(batch, length, heads, self._width).transpose(0, 2, 1, 3)


def _dense(stored: Stored) -> Floats:
    array = stored if isinstance(stored, mx.array) else stored.dense(mx.float32)
    return np.asarray(array.astype(mx.float32))


def _additive(mask: mx.array | str, length: int, total: int) -> Floats:
    if isinstance(mask, mx.array):
        visible = np.asarray(mask)
    else:
        visible = np.tril(np.ones((length, total), np.bool_), total - length)
    return np.where(visible, np.float32(0), np.float32(-np.inf))


def _graph(config: ModelConfig) -> bytes:
    kv_heads, width = config.num_key_value_heads, config.head_dim
    floats, ints = TensorProto.FLOAT, TensorProto.INT32
    describe = helper.make_tensor_value_info
    buffer = [1, kv_heads, "capacity", width]
    query_shape = [1, "length", config.num_attention_heads * width]
    inputs = [
        describe("queries", floats, query_shape),
        describe("keys", floats, [1, "length", kv_heads * width]),
        describe("values", floats, [1, "length", kv_heads * width]),
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

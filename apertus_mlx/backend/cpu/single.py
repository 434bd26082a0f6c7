"""One new position through all layers: the step of decoding, with every array in its place.

Between the graphs nothing is allocated and nothing looked up; a token of a small model is worth
some forty runs, and what Python does around them was a tenth of its time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from apertus_mlx.backend.cpu import attention_graphs
from apertus_mlx.backend.cpu.cache import CPUCache
from apertus_mlx.backend.cpu.runtime import Array, Binding, Session
from apertus_mlx.backend.cpu.weights import Floats
from apertus_mlx.checkpoint.config import ModelConfig


@dataclass(frozen=True, slots=True)
class Memory:
    """A cache's buffer with the attention of a `step` bound to it.

    Attention reads the whole buffer, every key once for the group of heads that shares it.
    `hidden` `[1, 1, capacity]`, added to the scores, is minus infinity where nothing stands yet.
    """

    step: SingleStep
    buffer: Floats
    keys: Floats
    values: Floats
    hidden: Floats
    attention: Binding


class SingleStep:
    """Runs the stages on one row each, and attention between them."""

    def __init__(self, config: ModelConfig, stages: Sequence[Session]) -> None:
        self._kv_heads, self._width = config.num_key_value_heads, config.head_dim
        self._session = Session(attention_graphs.single_position(config), {})
        # The arrays below serve one step at a time.
        self._lock = threading.Lock()

        def row(*shape: int) -> Floats:
            return np.zeros(shape, np.float32)

        heads, kv_heads, width = config.num_attention_heads, self._kv_heads, self._width
        self._queries, self._heads = row(1, 1, heads * width), row(1, heads * width)
        self._keys, self._values = row(1, 1, kv_heads * width), row(1, 1, kv_heads * width)
        self._residuals = [row(1, config.hidden_size), row(1, config.hidden_size)]
        self._rotation: dict[str, Array] = {
            "cos": row(1, width // 2),
            "sin": row(1, width // 2),
            "positions": np.zeros((1, 1), np.int64),
        }
        self._result = row(1, config.hidden_size)
        self._stages = [
            self._place(stage, index, len(stages) - 1) for index, stage in enumerate(stages)
        ]

    def __call__(
        self, embedded: Floats, rotation: Mapping[str, Array], caches: Sequence[CPUCache]
    ) -> Floats:
        """The final hidden state `[1, D]` of a token's embedding `[1, D]`."""
        with self._lock:
            # The first stage leaves the residual stream as it is, for the second to read.
            for residual in self._residuals:
                residual[...] = embedded
            for name in ("cos", "sin"):
                self._rotation[name][...] = rotation[name]
            keys, values = (
                array.reshape(self._kv_heads, self._width) for array in (self._keys, self._values)
            )
            for stage, cache in zip(self._stages, caches, strict=False):
                stage.run()
                memory = self._memory(cache)
                position = cache.offset
                memory.keys[:, position] = keys
                memory.values[:, position] = values
                cache.advance(1)
                memory.hidden[..., : position + 1] = 0
                memory.hidden[..., position + 1 :] = -np.inf
                memory.attention.run()
            self._stages[-1].run()
            return self._result.copy()

    def _place(self, stage: Session, index: int, last: int) -> Binding:
        inputs: dict[str, Array] = {"residual": self._residuals[index % 2]}
        if index > 0:
            inputs["heads"] = self._heads
        outputs: list[Array] = [self._result]
        if index < last:
            inputs |= self._rotation
            following = self._residuals[(index + 1) % 2]
            outputs = [self._queries, self._keys, self._values, *([following] if index > 0 else [])]
        return stage.bind().place(inputs, dict(zip(stage.outputs, outputs, strict=True)))

    def _memory(self, cache: CPUCache) -> Memory:
        all_keys, all_values = cache.reserve(1, self._kv_heads, 1, self._width)
        buffer = cache.rows.buffer
        assert buffer is not None
        memory = cache.step_memory
        # Memory moves when a cache grows.
        if not isinstance(memory, Memory) or memory.buffer is not buffer or memory.step is not self:
            keys, values = all_keys[0], all_values[0]
            hidden = np.zeros((1, 1, buffer.shape[2]), np.float32)
            by_group = (self._kv_heads, -1, self._width)
            attention = self._session.bind().place(
                {
                    "queries": self._queries.reshape(by_group),
                    "all_keys": keys,
                    "all_values": values,
                    "hidden": hidden,
                },
                {"heads": self._heads.reshape(by_group)},
            )
            memory = cache.step_memory = Memory(self, buffer, keys, values, hidden, attention)
        return memory

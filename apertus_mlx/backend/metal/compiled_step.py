"""One decode step, traced once and then only replayed: less work for Python per token.

That shows where the GPU is quicker than Python can describe a step, which takes about a
millisecond: on Pro and Max chips with the smallest models.

What changes from token to token has to be an array: the position, and the cache's buffers, which
are attended to as a whole with a mask. When a buffer grows, the step is traced again.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx

from apertus_mlx.cache import Cache, FullCache
from apertus_mlx.cache.protocol import Mask
from apertus_mlx.model.apertus import Model, Step
from apertus_mlx.model.language_model import NextTokenLogits


class CompiledStep:
    """A step for caches that hold all positions of a layer in one buffer; for others `step` itself.

    Args:
        step: what is to be replayed. A compiled step serves one model.
    """

    def __init__(self, step: Step) -> None:
        self._step = step
        self._model: Model | None = None
        self._replay = mx.compile(self._trace)
        # Which of best and peaks the step gives.
        self._given: tuple[bool, bool] = (False, False)

    @property
    def joined_rows(self) -> bool:
        """Whether the step writes keys and values of a position to the cache together."""
        return self._step.joined_rows

    def __call__(
        self, model: Model, token: mx.array, cache: Sequence[Cache | None] | None
    ) -> NextTokenLogits:
        """Logits after `token` `[1, 1]`; the caches are written as `step` writes them."""
        stores = []
        for layer in cache or ():
            if type(layer) is not FullCache or not layer.joined or layer.config.bound is not None:
                return self._step(model, token, cache)
            stores.append(layer.rows)
        if not stores or not stores[0].length:
            return self._step(model, token, cache)
        for store in stores:
            store.reserve(store.length + 1, store.arrays)
        position = mx.array([stores[0].length], mx.int32)
        # Held only meanwhile: the model holds this step, and would never be freed at once.
        self._model = model
        try:
            outputs = self._replay(token, position, [store.arrays[0] for store in stores])
        finally:
            self._model = None
        buffers, found = outputs[: len(stores)], list(outputs[len(stores) :])
        for store, buffer in zip(stores, buffers, strict=True):
            store.arrays = [buffer]
            store.length += 1
        logits = found.pop(0)
        best, peaks = (found.pop(0) if given else None for given in self._given)
        return NextTokenLogits(logits, best, peaks)

    def _trace(
        self, token: mx.array, position: mx.array, buffers: Sequence[mx.array]
    ) -> list[mx.array]:
        assert self._model is not None
        caches: list[Any] = [_Buffer(buffer, position) for buffer in buffers]
        after = self._step(self._model, token, caches)
        self._given = (after.best is not None, after.peaks is not None)
        found = [x for x in (after.values, after.best, after.peaks) if x is not None]
        return [*(cache.rows for cache in caches), *found]


class _Buffer:
    """A cache while the step is traced: `rows` `[1, 2 * kv_heads, capacity, head_dim]`."""

    def __init__(self, rows: mx.array, position: mx.array) -> None:
        self.rows = rows
        self.offset = position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Write one position; returns the whole buffer."""
        return self.append(mx.concatenate([keys, values], axis=1))

    def append(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """Write one position, keys before values; returns the whole buffer."""
        # With an index in an array this is one kernel; with a slice it would be two.
        self.rows[:, :, self.offset] = rows
        keys, values = mx.split(self.rows, 2, axis=1)
        return keys, values

    def make_mask(self, *_: object, **__: object) -> Mask:
        """The positions that have been written, the new one included; the same for any request."""
        return mx.arange(self.rows.shape[2])[None] <= self.offset

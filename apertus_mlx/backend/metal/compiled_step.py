"""One decode step, traced once and then only replayed: less work for Python per token.

That shows where the GPU is quicker than Python can describe a step, which takes about a
millisecond: on Pro and Max chips with the smallest models.

What changes from token to token has to be an array: the position, and the cache's buffers, which
are attended to as a whole with a mask. When a buffer grows, the step is traced again.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import mlx.core as mx

from apertus_mlx.cache import Cache, FullCache
from apertus_mlx.model.language_model import NextTokenLogits

if TYPE_CHECKING:
    from apertus_mlx.cache.protocol import Mask


class CompiledStep:
    """`Model.next_token_logits` of one token, with all positions of a layer in one buffer.

    Args:
        step: what is to be replayed, of a token and its caches.
    """

    def __init__(self, step: Callable[[mx.array, Sequence[Any]], NextTokenLogits]) -> None:
        self._step = step
        self._replay = mx.compile(self._trace)
        # Which of best and peaks the model's operations give.
        self._given: tuple[bool, bool] = (False, False)

    def __call__(
        self, token: mx.array, caches: Sequence[Cache | None] | None
    ) -> NextTokenLogits | None:
        """Logits after `token` `[1, 1]`; None, and nothing done, where a cache is of another kind.

        The caches are written as `Model.next_token_logits` writes them.
        """
        stores = []
        for cache in caches or ():
            if type(cache) is not FullCache or not cache.joined or cache.config.bound is not None:
                return None
            stores.append(cache.rows)
        if not stores or not stores[0].length:
            return None
        for store in stores:
            store.reserve(store.length + 1, store.arrays)
        position = mx.array([stores[0].length], mx.int32)
        outputs = self._replay(token, position, [store.arrays[0] for store in stores])
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
        caches = [_Buffer(buffer, position) for buffer in buffers]
        after = self._step(token, caches)
        self._given = (after.best is not None, after.peaks is not None)
        found = [x for x in (after.values, after.best, after.peaks) if x is not None]
        return [*(cache.rows for cache in caches), *found]


class _Buffer:
    """A cache while the step is traced: `rows` `[1, 2 * kv_heads, capacity, head_dim]`."""

    def __init__(self, rows: mx.array, position: mx.array) -> None:
        self.rows = rows
        self.offset = position

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """See `Cache.update_and_fetch`."""
        return self.append(mx.concatenate([keys, values], axis=1))

    def append(self, rows: mx.array) -> tuple[mx.array, mx.array]:
        """See `FullCache.append`; returns the whole buffer."""
        # With an index in an array this is one kernel; with a slice it would be two.
        self.rows[:, :, self.offset] = rows
        keys, values = mx.split(self.rows, 2, axis=1)
        return keys, values

    def make_mask(self, *_: object, **__: object) -> Mask:
        """The positions that have been written, the new one included; the same for any request."""
        return mx.arange(self.rows.shape[2])[None] <= self.offset

"""One layer's caches of several sequences, in the place of one cache.

All but attention is then computed for all of them together. Each sequence keeps a cache of its own,
in whatever form and of whatever length, so that nothing is copied or padded when one joins or goes.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx

from apertus_mlx.cache.full import FullCache, refuse_window
from apertus_mlx.cache.protocol import Mask, One
from apertus_mlx.cache.quantized import QuantizedCache


class Rows:
    """What the model asks of a cache, for one more position of each sequence.

    Args:
        caches: of one layer, one for each sequence.
        offset: how many positions each holds, `[B]`; the same array serves all layers.
    """

    def __init__(self, caches: Sequence[FullCache | QuantizedCache], offset: mx.array) -> None:
        self.caches = caches
        self.offset = offset

    def update_and_fetch(
        self, keys: mx.array, values: mx.array
    ) -> tuple[tuple[One, ...], tuple[One, ...]]:
        """Append `[B, kv_heads, 1, head_dim]`; returns all to attend to, of each sequence."""
        together = mx.split(mx.concatenate([keys, values], axis=1), len(self.caches))
        seen = [cache.append(row) for cache, row in zip(self.caches, together, strict=True)]
        return tuple(keys for keys, _ in seen), tuple(values for _, values in seen)

    def make_mask(self, N: int, return_array: bool = False, window_size: int | None = None) -> Mask:  # noqa: ARG002
        """None: a query sees all that its sequence holds."""
        refuse_window(window_size)
        if N != 1:
            raise ValueError(f"{N} positions of several sequences at once; expected 1")
        return None

    @property
    def state(self) -> list[mx.array]:
        """The arrays behind the caches."""
        return [array for cache in self.caches for array in cache.state]

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(cache.nbytes for cache in self.caches)

    def trim(self, n: int) -> int:  # noqa: ARG002
        """Forgets nothing; that is up to each cache."""
        return 0

    def is_trimmable(self) -> bool:
        """Never."""
        return False


def rows_of(sequences: Sequence[Sequence[FullCache | QuantizedCache]]) -> list[Rows]:
    """The caches of several sequences, one list of layers for each, as one list of layers."""
    offset = mx.array([layers[0].offset for layers in sequences], mx.int32)
    return [Rows(caches, offset) for caches in zip(*sequences, strict=True)]

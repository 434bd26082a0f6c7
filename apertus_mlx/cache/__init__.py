"""Key-value caches: one protocol, one file per form."""

from __future__ import annotations

from collections.abc import Sequence

from apertus_mlx.cache.config import CacheConfig
from apertus_mlx.cache.full import FullCache
from apertus_mlx.cache.protocol import Cache
from apertus_mlx.cache.quantized import QuantizedCache
from apertus_mlx.cache.segments import Codes, Segments

__all__ = [
    "FULL_PRECISION",
    "Cache",
    "CacheConfig",
    "Codes",
    "FullCache",
    "QuantizedCache",
    "Segments",
    "allow_cut",
    "expect",
    "fork",
    "make_layer_cache",
    "rewind",
]

FULL_PRECISION = CacheConfig()


def make_layer_cache(
    config: CacheConfig, head_dim: int, joined: bool = False, whole_codes: bool = False
) -> FullCache | QuantizedCache:
    """An empty cache for one layer whose heads have `head_dim` numbers.

    `joined`: for an owner that writes keys and values together; see `FullCache`. `whole_codes`: for
    a backend whose products refuse slices; see `QuantizedCache`.

    Raises:
        UsageError: heads of this width cannot be quantized or rotated as asked.
    """
    config.require_fit(head_dim)
    if config.quantized:
        return QuantizedCache(config, head_dim, whole_codes)
    return FullCache(config, joined)


def expect(caches: Sequence[Cache], more: int) -> None:
    """Tell those caches that can prepare for it how many positions will come."""
    for cache in caches:
        if isinstance(cache, FullCache | QuantizedCache):
            cache.expect(cache.offset + more)


def allow_cut(caches: Sequence[Cache], positions: int) -> bool:
    """Have `trim` take back up to so many of the positions that came last together.

    Returns whether all caches can. Then any block of more than one position can be cut back so far,
    whatever it pushed out; from now on a ring holds spare rows for that.
    """
    ours = [cache for cache in caches if isinstance(cache, FullCache | QuantizedCache)]
    return len(ours) == len(caches) and all(cache.allow_cut(positions) for cache in ours)


def fork(caches: Sequence[Cache]) -> list[Cache]:
    """Caches of the same positions that go their own way; memory is shared until one writes.

    Raises:
        TypeError: a cache is not one of ours.
    """
    twins: list[Cache] = []
    for cache in caches:
        if not isinstance(cache, FullCache | QuantizedCache):
            raise TypeError(f"{type(cache).__name__} cannot be forked")
        twins.append(cache.fork())
    return twins


def rewind(caches: Sequence[Cache], positions: int) -> bool:
    """Forget the last `positions` in every layer, exactly; False, and no change, if impossible."""
    # An interrupt in the middle of a step leaves layers of different lengths.
    if len({cache.offset for cache in caches}) > 1:
        return False
    if positions == 0:
        return True
    # All layers are in the same state, so the first one speaks for all.
    if caches[0].trim(positions) != positions:
        return False
    for cache in caches[1:]:
        cache.trim(positions)
    return True

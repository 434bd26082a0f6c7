"""Key-value caches: one protocol, one file per form."""

from apertus_mlx.cache.full import FullCache
from apertus_mlx.cache.protocol import Cache

__all__ = ["Cache", "FullCache"]

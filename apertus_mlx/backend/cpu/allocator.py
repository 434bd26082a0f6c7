"""The C library's allocator, told to give large blocks back as soon as they are free.

glibc raises the size from which blocks are mapped one by one, to up to 32 MiB, with each larger one
that is freed. Smaller ones then come from a heap that rarely shrinks: what was read and repacked
stays resident beside the weights, 15 to 75 MB of a 0.5B in 4 bits, and not the same each time.
"""

from __future__ import annotations

import ctypes
import functools

LARGE_BYTES = 2**20
# Of glibc's malloc.h.
_M_MMAP_THRESHOLD = -3


@functools.cache
def map_large_blocks() -> bool:
    """Map every block of `LARGE_BYTES` and more by itself; whether the C library can be told so."""
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError):
        # Apple's and musl's have no such function.
        return False
    return bool(mallopt(_M_MMAP_THRESHOLD, LARGE_BYTES))

"""Types of the NumPy arrays that hold weights, codes and statistics, and how they are cut."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
# One code in each byte, and codes packed into words of 32 bits.
Codes = npt.NDArray[np.uint8]
Packed = npt.NDArray[np.uint32]


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of `size`, at least one, that together are the first `count`."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))

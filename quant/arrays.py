"""Types of the arrays that hold weights, codes and statistics, how they are cut, and whose.

What computes with `Array` takes NumPy's or MLX's, all of one library, and gives that library's.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
# One code in each byte, and codes packed into words of 32 bits.
Codes = npt.NDArray[np.uint8]
Packed = npt.NDArray[np.uint32]
# NumPy's or MLX's.
Array = Any


def blocks(count: int, size: int) -> Iterator[slice]:
    """Slices of `size`, at least one, that together are the first `count`."""
    size = max(1, size)
    for start in range(0, count, size):
        yield slice(start, min(start + size, count))


def library(array: Array) -> Any:
    """The module whose functions take `array`: numpy or mlx.core."""
    if isinstance(array, np.ndarray):
        return np
    import mlx.core as mx

    return mx


def as_library(values: npt.NDArray[Any], other: Array) -> Array:
    """`values` as an array of the library of `other`."""
    found = library(other)
    return values if found is np else found.array(values)


def settled(*arrays: Array) -> None:
    """Have MLX compute these now, so that what they come from is let go; NumPy has long done so."""
    if library(arrays[0]) is not np:
        library(arrays[0]).eval(*arrays)


def row_dots(x: Array, y: Array) -> Array:
    """The product of each row of `x` with that of `y`, `[rows]`."""
    if library(x) is np:
        return np.einsum("rc,rc->r", x, y)
    return (x * y).sum(-1)


def exponentials(values: Array) -> Array:
    """E to the power of each; NumPy's array is used up."""
    if library(values) is np:
        return np.exp(values, out=values)
    return library(values).exp(values)

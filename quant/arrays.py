"""Types of the NumPy arrays that hold weights, codes and statistics."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Float32 = npt.NDArray[np.float32]
Float64 = npt.NDArray[np.float64]
# One code in each byte, and codes packed into words of 32 bits.
Codes = npt.NDArray[np.uint8]
Packed = npt.NDArray[np.uint32]

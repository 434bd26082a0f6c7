"""How much work MLX hands to the GPU at once.

MLX commits a command buffer after some 40 kernels or 40 million numbers, each time at a cost of
about 20 microseconds (ml-explore/mlx#4521). On M1 to M4, whole steps in one buffer were measured 5
to 13 % faster by others, on M5 no faster (lablup/mlxcel#360).
"""

from __future__ import annotations

import ctypes
import os
import re
import sys

LIMITS = {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "1000"}
CHIPS_THAT_GAIN = re.compile(r"Apple M[1-4]\b")


def widen(chip: str | None = None) -> None:
    """Raise MLX's limits where that pays; what the user has set stays.

    MLX reads them when it first touches the GPU.

    Args:
        chip: what macOS calls the chip; default: this machine's.
    """
    if CHIPS_THAT_GAIN.match(chip or _chip_name() or ""):
        for name, value in LIMITS.items():
            os.environ.setdefault(name, value)


def _chip_name() -> str | None:
    """What macOS calls the chip, such as `Apple M4 Pro`; None elsewhere."""
    if sys.platform != "darwin":
        return None
    library = ctypes.CDLL(None)
    name, size = b"machdep.cpu.brand_string", ctypes.c_size_t(256)
    value = ctypes.create_string_buffer(size.value)
    if library.sysctlbyname(name, value, ctypes.byref(size), None, 0) != 0:
        return None
    return value.value.decode()

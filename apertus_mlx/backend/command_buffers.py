"""How much work MLX hands to the GPU at once.

MLX commits a command buffer after some 40 kernels or 40 million numbers, each time at a cost of
about 20 microseconds (ml-explore/mlx#4521). On M1 to M4, whole steps in one buffer were measured 5
to 13 % faster by others, on M5 no faster (lablup/mlxcel#360).
"""

from __future__ import annotations

import os
import re

from apertus_mlx.backend import hardware

LIMITS = {"MLX_MAX_OPS_PER_BUFFER": "1000", "MLX_MAX_MB_PER_BUFFER": "1000"}
CHIPS_THAT_GAIN = re.compile(r"Apple M[1-4]\b")


def widen(chip: str | None = None) -> None:
    """Raise MLX's limits where that pays; what the user has set stays.

    MLX reads them when it first touches the GPU.

    Args:
        chip: what macOS calls the chip; default: this machine's.
    """
    if CHIPS_THAT_GAIN.match(chip or hardware.chip_name() or ""):
        for name, value in LIMITS.items():
            os.environ.setdefault(name, value)

"""Whether float32 is float32: GPUs with TF32 round its products to 10 bits, unless told not to.

MLX does so by default for products of two and more rows, on Nvidia's GPUs and with the tensor units
of M5 (its `MLX_ENABLE_TF32`). Products in 16 bits are the same either way.
"""

from __future__ import annotations

import os

VARIABLE = "MLX_ENABLE_TF32"


def switch_off() -> None:
    """Have float32 products computed in float32; what the user has set stays.

    MLX reads the variable once, at its first such product in this process.
    """
    os.environ.setdefault(VARIABLE, "0")


def asked_for() -> bool:
    """Whether the user has asked for TF32."""
    return os.environ.get(VARIABLE, "0") != "0"

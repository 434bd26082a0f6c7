"""The 8- and 4-bit floats of quantized checkpoints, by their definitions, as float32 tables.

OCP 8-bit Floating Point 1.0 (E4M3: no infinities, NaN is 0x7F and 0xFF) and OCP Microscaling
Formats 1.0 (E2M1; E8M0, whose byte 127 is one).
"""

from __future__ import annotations

import numpy as np

from apertus_mlx.quant.arrays import Float32

E4M3_NAN = 0x7F
E8M0_ONE = 127
E8M0_NAN = 0xFF


def e4m3_values() -> Float32:
    """The value of each of the 256 bytes."""
    bits = np.arange(256)
    exponent, mantissa = bits >> 3 & 15, bits & 7
    normal = np.ldexp(1 + mantissa / 8, exponent - 7)
    subnormal = np.ldexp(mantissa / 8, -6)
    values = np.where(exponent == 0, subnormal, normal)
    values[bits & 0x7F == E4M3_NAN] = np.nan
    return np.where(bits >> 7, -values, values).astype(np.float32)


def e2m1_values() -> Float32:
    """The value of each of the 16 codes; bit 3 is the sign."""
    positive = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
    return np.concatenate([positive, -positive])

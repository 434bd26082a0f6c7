"""MLX's affine format on arrays: codes with a scale and a bias per group.

NumPy's, and MLX's where it says `Array`.

A weight is `scale * code + bias`. Scales and biases are held in float32 and are exactly
representable in the type that they will be stored in, so every error here is the stored one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from apertus_mlx.quant.arrays import (
    Array,
    Codes,
    Float32,
    Float64,
    Packed,
    as_library,
    library,
)
from apertus_mlx.quant.grid import SIGNIFICANT_BITS
from apertus_mlx.quant.packing import pack
from apertus_mlx.quant.spec import QuantSpec

ScaleType = Literal["BF16", "F16", "F32"]
LARGEST_F16 = 65504.0
# Below this a float32 scale would lose bits, and its reciprocal would overflow.
SMALLEST_SCALES = {"BF16": 2.0**-120, "F16": 2.0**-24, "F32": 2.0**-120}


@dataclass(frozen=True, slots=True)
class AffineCodes:
    """A quantized matrix: codes `[rows, columns]`, scales and biases `[rows, groups]`."""

    codes: Codes
    scales: Float32
    biases: Float32
    spec: QuantSpec

    @classmethod
    def blank(cls, shape: tuple[int, int], spec: QuantSpec) -> AffineCodes:
        """A matrix `[rows, columns]` of zeros, to be filled."""
        rows, columns = shape
        scales, biases = np.zeros((2, rows, columns // spec.group_size), np.float32)
        return cls(np.zeros(shape, np.uint8), scales, biases, spec)

    def put(self, part: slice, other: AffineCodes) -> None:
        """Replace some rows by those of `other`."""
        for name in ("codes", "scales", "biases"):
            getattr(self, name)[part] = getattr(other, name)

    def split(self, rows: Sequence[int]) -> list[AffineCodes]:
        """The first so many rows, those after them, and so on."""
        ends = np.cumsum(rows).tolist()
        return [self.rows(slice(end - count, end)) for count, end in zip(rows, ends, strict=True)]

    def rows(self, which: slice | npt.NDArray[np.integer]) -> AffineCodes:
        """Some of its rows."""
        return AffineCodes(self.codes[which], self.scales[which], self.biases[which], self.spec)

    @property
    def packed(self) -> Packed:
        """The codes as MLX stores them, `[rows, columns * bits / 32]`."""
        return pack(self.codes, self.spec.bits)


def fit(weight: Float32, spec: QuantSpec, scale_type: ScaleType = "F32") -> AffineCodes:
    """Round `weight` `[rows, columns]` to the nearest of evenly spaced values.

    Zero is one of them, and no value is off by more than half a step. With float32 scales both hold
    exactly, and quantizing the result again changes nothing (unless zero falls half-way between two
    codes: then both ends may round inwards); 16-bit scales add their own rounding.

    Raises:
        ValueError: a weight is not finite, or the rows do not divide into groups.
    """
    groups = as_groups(weight, spec).astype(np.float64)
    scales, biases = nearest_grid(groups.min(-1), groups.max(-1), spec.bits, scale_type)
    codes = np.rint((groups - biases[..., None]) / scales[..., None])
    return from_groups(np.clip(codes, 0, (1 << spec.bits) - 1), scales, biases, spec)


def nearest_grid(
    lower: Array, upper: Array, bits: int, scale_type: ScaleType
) -> tuple[Array, Array]:
    """The scales and biases of `fit` for groups whose extremes are `lower` and `upper`."""
    top = (1 << bits) - 1
    lowest = np.minimum(np.array(lower, np.float64), 0)
    spread = np.maximum(np.array(upper, np.float64), 0) - lowest
    # A scale this short times any code is exact in float32, and so is the bias.
    scales = usable_scales(_shorten(spread / top, scale_type, bits), scale_type)
    zeros = np.clip(np.floor(-lowest / scales + 0.5), 0, top)
    biases = round_scales((-zeros * scales).astype(np.float32), scale_type)
    return as_library(scales, lower), as_library(biases, lower)


def dequantize(quantized: AffineCodes) -> Float32:
    """The weights `[rows, columns]` that the codes stand for, as MLX computes them in float32."""
    codes: Float32 = as_groups(quantized.codes.astype(np.float32), quantized.spec)
    values: Float32 = codes * quantized.scales[..., None] + quantized.biases[..., None]
    return values.reshape(quantized.codes.shape)


def as_groups(values: Array, spec: QuantSpec) -> Array:
    """A view `[rows, groups, group_size]` of a matrix of NumPy or MLX.

    Raises:
        ValueError: not a matrix of whole groups, or not finite.
    """
    if values.ndim != 2 or not spec.fits(values.shape[1]):
        raise ValueError(f"shape {values.shape}: rows do not divide into {spec}")
    if not library(values).isfinite(values).all():
        raise ValueError("weights are not finite")
    return values.reshape(len(values), -1, spec.group_size)


def from_groups(
    codes: npt.NDArray[np.number], scales: npt.NDArray[np.floating],
    biases: npt.NDArray[np.floating], spec: QuantSpec,
) -> AffineCodes:  # fmt: skip
    """The quantized matrix of grouped codes `[rows, groups, group_size]`."""
    return AffineCodes(
        codes.astype(np.uint8).reshape(len(codes), -1),
        scales.astype(np.float32),
        biases.astype(np.float32),
        spec,
    )


def round_scales(values: Array, scale_type: ScaleType) -> Array:
    """Round float32 numbers to the type that scales and biases are stored in, ties to even."""
    xp = library(values)
    if scale_type == "F16":
        values = xp.clip(values, -LARGEST_F16, LARGEST_F16)
        return values.astype(xp.float16).astype(xp.float32)
    if scale_type == "BF16" and xp is np:
        bits = values.astype(np.float32).view(np.uint32)
        rounded = bits + np.uint32(0x7FFF) + (bits >> np.uint32(16) & np.uint32(1))
        return (rounded & np.uint32(0xFFFF0000)).view(np.float32)
    if scale_type == "BF16":
        values = values.astype(xp.bfloat16)
    return values.astype(xp.float32)


def usable_scales(scales: Array, scale_type: ScaleType) -> Array:
    """Scales of at least `SMALLEST_SCALES`: those of flat groups are too small to divide by."""
    xp, smallest = library(scales), SMALLEST_SCALES[scale_type]
    return xp.where(xp.abs(scales) < smallest, smallest, scales).astype(xp.float32)


def _shorten(scales: Float64, scale_type: ScaleType, bits: int) -> Float32:
    """Round scales to the stored type, and in float32 to few enough bits for exact products."""
    if scale_type != "F32":
        return np.asarray(round_scales(scales.astype(np.float32), scale_type))
    mantissa, exponent = np.frexp(scales)
    length = SIGNIFICANT_BITS["F32"] - bits
    # Upwards, so that the far end is never out of reach.
    rounded = np.ldexp(np.ceil(np.ldexp(mantissa, length)), exponent - length)
    return np.asarray(rounded, np.float32)

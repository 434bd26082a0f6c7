"""Weight matrices in the form that onnxruntime's `MatMulNBits` takes, with MLX's exact values.

MLX's affine weights are `scale * code + bias`, `MatMulNBits` computes `scale * (code - 2^(b-1))`;
the difference, `bias + 2^(b-1) * scale` once per group, is applied to the sums of each group of
inputs (`offsets`). With float32 activations only the 4-bit kernel is fast, so other widths become
one or two 4-bit planes: `code = 16 * high + low`. With int8 activations 2, 4 and 8 bits are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]

# Type that activations are rounded to inside matrix products.
Precision = Literal["float32", "int8"]

PLANE_BITS = 4
# Rows that are repacked at a time: bounds the intermediate arrays.
BLOCK_CODES = 2**24


@dataclass(frozen=True, slots=True)
class Plane:
    """Codes `[rows, groups, bytes]` of `bits` bits with their scales `[rows, groups]`."""

    bits: int
    codes: Bytes
    scales: Floats


@dataclass(frozen=True, slots=True)
class Quantized:
    """The sum of one or two planes, and of `offsets` `[groups, rows]` on group sums."""

    columns: int
    group_size: int
    planes: tuple[Plane, ...]
    offsets: Floats

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.offsets.shape[1]


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix `[rows, columns]` in float32."""

    values: Floats

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return self.values.shape[0]


Weight = Quantized | Dense


def pack(
    words: Words, scales: Floats, biases: Floats, bits: int, group_size: int, precision: Precision
) -> Quantized:
    """Repack MLX's affine `words` `[rows, columns * bits / 32]`; 4 bits are taken as they are."""
    rows, groups = scales.shape
    widths = _plane_bits(bits, precision)
    stream = words.view(np.uint8)
    if widths == (bits,):
        layers = [stream]
    else:
        layers = _repack(stream, bits, widths)
    planes = []
    offsets = biases
    for shift, (width, codes) in zip(_shifts(widths), zip(widths, layers, strict=True), strict=True):
        plane_scales = scales * np.float32(2**shift)
        planes.append(Plane(width, codes.reshape(rows, groups, -1), plane_scales))
        offsets = offsets + np.float32(2 ** (width - 1)) * plane_scales
    return Quantized(groups * group_size, group_size, tuple(planes), np.ascontiguousarray(offsets.T))


def stack(weights: Sequence[Weight]) -> list[Weight]:
    """Put matrices with the same inputs above each other, as far as their forms agree."""
    stacked: list[Weight] = [weights[0]]
    for weight in weights[1:]:
        joined = _join(stacked[-1], weight)
        stacked[-1:] = [stacked[-1], weight] if joined is None else [joined]
    return stacked


def _join(above: Weight, below: Weight) -> Weight | None:
    if isinstance(above, Dense) and isinstance(below, Dense):
        return Dense(np.concatenate([above.values, below.values]))
    if not isinstance(above, Quantized) or not isinstance(below, Quantized):
        return None
    if above.group_size != below.group_size or len(above.planes) != len(below.planes):
        return None
    planes = []
    for a, b in zip(above.planes, below.planes, strict=True):
        if a.bits != b.bits:
            return None
        codes, scales = (np.concatenate(pair) for pair in ((a.codes, b.codes), (a.scales, b.scales)))
        planes.append(Plane(a.bits, codes, scales))
    offsets = np.concatenate([above.offsets, below.offsets], axis=1)
    return Quantized(above.columns, above.group_size, tuple(planes), offsets)


def _plane_bits(bits: int, precision: Precision) -> tuple[int, ...]:
    """Widths of the planes that hold codes of `bits` bits, the low plane first."""
    if precision == "float32":
        return (4,) if bits <= 4 else (4, 4)
    return (next(width for width in (2, 4, 8) if bits <= width),)


def _shifts(widths: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(sum(widths[:index]) for index in range(len(widths)))


def _repack(stream: Bytes, bits: int, widths: tuple[int, ...]) -> list[Bytes]:
    """The little-endian bit stream of each row as planes of 4 or one plane of 8 bits per code."""
    rows, row_bytes = stream.shape
    columns = row_bytes * 8 // bits
    planes = [np.empty((rows, columns * width // 8), np.uint8) for width in widths]
    step = max(1, BLOCK_CODES // columns)
    for start in range(0, rows, step):
        codes = _unpack(stream[start : start + step], bits)
        for plane, width, shift in zip(planes, widths, _shifts(widths), strict=True):
            if width == 8:
                plane[start : start + step] = codes
            else:
                part = (codes >> shift) & 15
                plane[start : start + step] = part[:, ::2] | (part[:, 1::2] << 4)
    return planes


def _unpack(stream: Bytes, bits: int) -> Bytes:
    """The codes of each row of a bit stream, one per byte. Eight codes take `bits` bytes."""
    rows, row_bytes = stream.shape
    eights = stream.reshape(rows, row_bytes // bits, bits)
    codes = np.empty((rows, row_bytes // bits, 8), np.uint8)
    for index in range(8):
        byte, shift = divmod(index * bits, 8)
        code = eights[..., byte] >> shift
        if shift + bits > 8:
            code = code | (eights[..., byte + 1] << (8 - shift))
        codes[..., index] = code & (2**bits - 1)
    return codes.reshape(rows, -1)

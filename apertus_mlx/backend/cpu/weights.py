"""Weight matrices in the form that onnxruntime's `MatMulNBits` takes.

MLX's affine weights are `scale * code + bias`, `MatMulNBits` computes `scale * (code - zero)` with
a whole `zero`, the middle of the codes if not given. What is left, a number per group, is applied
to the sums of each group of inputs (`offsets`): exactly MLX's weights.

With float32 activations only the 4-bit kernel is fast, so other widths become one or two 4-bit
planes, `code = 16 * high + low`. With int8 activations 2, 4 and 8 bits are; there the offsets, a
tenth of the time, are left out where whole zeros alone come close (`ZERO_ERROR`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from apertus_mlx.quant.packing import unpack

Floats = npt.NDArray[np.float32]
Bytes = npt.NDArray[np.uint8]
Words = npt.NDArray[np.uint32]

# Type that activations are rounded to inside matrix products, per group.
Activations = Literal["float32", "int8"]

PLANE_BITS = 4
# Up to so many bits, rounding activations to 8 bits adds less than a tenth of the loss (measured as
# divergence from the unquantized model: 1 % at 4 bits, 4 % at 5, but 15 % at 6 bits).
MAX_INT8_BITS = 5
# Whole zeros are close when they move weights by less than this share of their scale (rms);
# rounding to codes moved them by 0.29, so the square of the error grows by less than 1 %.
ZERO_ERROR = 0.025
# Rows that are repacked at a time: bounds the intermediate arrays.
BLOCK_CODES = 2**24


@dataclass(frozen=True, slots=True)
class Plane:
    """Codes `[rows, groups, bytes]` of `bits` bits with their scales `[rows, groups]`."""

    bits: int
    codes: Bytes
    scales: Floats
    # Packed like the codes of each row, `[rows, bytes]`; None: the middle.
    zeros: Bytes | None = None


@dataclass(frozen=True, slots=True)
class Quantized:
    """The sum of one or two planes, and of `offsets` `[groups, rows]`, if any, on group sums."""

    columns: int
    group_size: int
    planes: tuple[Plane, ...]
    offsets: Floats | None
    activations: Activations

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return int(self.planes[0].codes.shape[0])


@dataclass(frozen=True, slots=True)
class Dense:
    """A matrix `[rows, columns]` in float32."""

    values: Floats

    @property
    def rows(self) -> int:
        """Number of outputs."""
        return int(self.values.shape[0])


Weight = Quantized | Dense


def pack(
    words: Words,
    scales: Floats,
    biases: Floats,
    bits: int,
    group_size: int,
    activations: Activations,
) -> Quantized:
    """Repack MLX's affine `words` `[rows, columns * bits / 32]`; 4 bits are taken as they are."""
    rows, groups = scales.shape
    parts = parts_of(bits, activations)
    columns = groups * group_size
    whole = parts == (Part(0, bits, bits),)
    packed = [words.view(np.uint8)] if whole else _repack(words, bits, columns, parts)
    if activations == "int8":
        zeros = _whole_zeros(scales, biases, parts[0])
        if zeros is not None:
            plane = Plane(parts[0].stored_bits, packed[0].reshape(rows, groups, -1), scales, zeros)
            return Quantized(columns, group_size, (plane,), None, activations)
    planes = []
    offsets = biases
    for part, codes in zip(parts, packed, strict=True):
        plane_scales = scales * np.float32(2**part.shift)
        planes.append(Plane(part.stored_bits, codes.reshape(rows, groups, -1), plane_scales))
        offsets = offsets + np.float32(part.middle) * plane_scales
    transposed = np.ascontiguousarray(offsets.T)
    return Quantized(columns, group_size, tuple(planes), transposed, activations)


def _whole_zeros(scales: Floats, biases: Floats, part: Part) -> Bytes | None:
    """Packed zeros, if they alone come close to the biases. MLX itself rounds to whole zeros."""
    safe = np.where(scales == 0, np.float32(1), scales)
    zeros = np.clip(
        np.rint(-biases / safe), -part.raised, (1 << part.stored_bits) - 1 - part.raised
    )
    missed = biases + zeros * scales
    if np.sqrt(np.mean(missed**2)) > ZERO_ERROR * np.sqrt(np.mean(scales**2)):
        return None
    stored = (zeros + part.raised).astype(np.uint8)
    bits = (stored[..., None] >> np.arange(part.stored_bits, dtype=np.uint8)) & 1
    return np.packbits(bits.reshape(len(stored), -1), axis=1, bitorder="little")


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
    if _form(above) != _form(below):
        return None
    planes = tuple(
        Plane(
            a.bits,
            np.concatenate([a.codes, b.codes]),
            np.concatenate([a.scales, b.scales]),
            None if a.zeros is None or b.zeros is None else np.concatenate([a.zeros, b.zeros]),
        )
        for a, b in zip(above.planes, below.planes, strict=True)
    )
    offsets = None
    if above.offsets is not None and below.offsets is not None:
        offsets = np.concatenate([above.offsets, below.offsets], axis=1)
    return Quantized(above.columns, above.group_size, planes, offsets, above.activations)


def _form(weight: Quantized) -> object:
    planes = [(plane.bits, plane.zeros is None) for plane in weight.planes]
    return weight.activations, weight.group_size, weight.offsets is None, planes


@dataclass(frozen=True, slots=True)
class Part:
    """The `bits` bits of a code from `shift` on, stored in `stored_bits`.

    They are stored around the middle of what fits, which the kernel subtracts: products with the
    middle would otherwise be large, and cancel.
    """

    shift: int
    bits: int
    stored_bits: int

    @property
    def middle(self) -> int:
        """The value that is stored as the kernel's zero."""
        return 1 << (self.bits - 1)

    @property
    def raised(self) -> int:
        """What is added before storing."""
        return (1 << (self.stored_bits - 1)) - self.middle


def activations_for(bits: int, precision: str) -> Activations:
    """What activations are rounded to in products with weights of `bits`; see `CPUModel`."""
    if precision == "auto":
        return "int8" if bits <= MAX_INT8_BITS else "float32"
    return "int8" if precision == "int8" else "float32"


def parts_of(bits: int, activations: Activations) -> tuple[Part, ...]:
    """How codes of `bits` are stored: whole, or in planes."""
    if activations == "int8":
        return (Part(0, bits, next(width for width in (2, 4, 8) if bits <= width)),)
    return tuple(
        Part(shift, min(PLANE_BITS, bits - shift), PLANE_BITS)
        for shift in range(0, bits, PLANE_BITS)
    )


def _repack(words: Words, bits: int, columns: int, parts: Sequence[Part]) -> list[Bytes]:
    """The codes of each row, packed anew for each part of them."""
    rows = len(words)
    planes = [np.empty((rows, columns * part.stored_bits // 8), np.uint8) for part in parts]
    step = max(1, BLOCK_CODES // columns)
    for start in range(0, rows, step):
        codes = unpack(words[start : start + step], bits, columns)
        for plane, part in zip(planes, parts, strict=True):
            stored = ((codes >> part.shift) & (2**part.bits - 1)) + np.uint8(part.raised)
            if part.stored_bits == 4:
                stored = stored[:, ::2] | (stored[:, 1::2] << 4)
            plane[start : start + step] = stored
    return planes

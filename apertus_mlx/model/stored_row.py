"""A row of an embedding as it is stored, to numbers, by NumPy alone.

MLX takes 20 µs and more for each operation on so small an array.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.float_formats import E8M0_ONE, e2m1_values, e4m3_values
from apertus_mlx.quant.spec import QuantSpec

Float32 = npt.NDArray[np.float32]


class _Kind(NamedTuple):
    """A type of stored floats: as NumPy reads it, its exponent's bits, and MLX's type."""

    numpy: np.dtype[Any]
    # All set in NaN and infinity.
    exponent: int
    mlx: mx.Dtype


_FLOATS = {
    "BF16": _Kind(np.dtype("<u2"), 0x7F80, mx.bfloat16),
    "F16": _Kind(np.dtype("<f2"), 0x7C00, mx.float16),
    "F32": _Kind(np.dtype("<f4"), 0x7F800000, mx.float32),
}
# Made once: as numbers of Python each would be converted for every row.
_HALF, _LAST = np.uint32(16), np.uint32(1)
_BELOW_HALF, _UPPER = np.uint32(0x7FFF), np.uint32(0xFFFF0000)


class StoredRow:
    """Computes one row of an embedding.

    Args:
        spec: its format; None for floats.
        tensors: the embedding, or its codes, scales and, where the format has them, biases.
        dtype: type of the row, and that to compute in.
        rounds_once: whether the product of code and scale is not rounded before the bias is added.
    """

    def __init__(
        self,
        spec: QuantSpec | None,
        tensors: Sequence[TensorInfo],
        dtype: mx.Dtype,
        rounds_once: bool = False,
    ) -> None:
        self.dtype = dtype
        self._spec, self._tensors = spec, tensors
        self._rounds_once = rounds_once
        # Scales and biases have one type.
        last = tensors[-1].dtype
        self._changes_type = last in _FLOATS and _FLOATS[last].mlx != dtype
        self._scales = None if spec is None or spec.has_biases else _scales_of_byte(spec.mode)

    def __call__(self, data: Sequence[bytes]) -> Float32:
        """The row `[columns]` of its bytes, but for a last rounding to its type.

        Raises:
            RejectedError: a number is not finite.
        """
        with np.errstate(all="ignore"):
            row = self._computed(data)
            # One number shows that all are finite, which is seldom not so.
            if not math.isfinite(row.dot(row)):
                for part, tensor in zip(data, self._tensors, strict=True):
                    if tensor.dtype in _FLOATS:
                        require_finite(part, tensor)
        return row

    def _computed(self, data: Sequence[bytes]) -> Float32:
        spec = self._spec
        if spec is None:
            return floats(data[0], self._tensors[0])
        grouped = codes(data[0], spec).reshape(-1, spec.group_size)
        if self._scales is not None:
            # No product has more digits than its type, so that nothing is rounded.
            grouped *= self._scales.take(np.frombuffer(data[1], np.uint8), axis=0)
            return grouped.reshape(-1)
        both = floats(data[1] + data[2], self._tensors[1])
        if self._changes_type:
            both = self._rounded(both)
        scales, biases = both.reshape(2, -1, 1)
        grouped *= scales
        if not self._rounds_once:
            grouped = self._rounded(grouped)
        grouped += biases
        return grouped.reshape(-1)

    def _rounded(self, values: Float32) -> Float32:
        """To the nearest number of the type to compute in, ties to even."""
        if self.dtype == mx.bfloat16:
            bits = values.view(np.uint32)
            found = bits >> _HALF
            found &= _LAST
            found += _BELOW_HALF
            found += bits
            found &= _UPPER
            return found.view(np.float32)
        return values.astype(np.float16).astype(np.float32) if self.dtype == mx.float16 else values


def floats(data: bytes, tensor: TensorInfo) -> Float32:
    """Stored floats of `tensor`."""
    kind = _FLOATS[tensor.dtype]
    stored = np.frombuffer(data, kind.numpy)
    if kind.mlx == mx.bfloat16:
        bits = stored.astype(np.uint32)
        bits <<= _HALF
        return bits.view(np.float32)
    return stored.astype(np.float32)


def require_finite(data: bytes, tensor: TensorInfo) -> None:
    """Refuse what no sound checkpoint holds.

    Raises:
        RejectedError: a number is not finite.
    """
    kind = _FLOATS[tensor.dtype]
    bits = np.frombuffer(data, f"<u{kind.numpy.itemsize}")
    if (bits & kind.exponent == kind.exponent).any():
        raise RejectedError(
            f"{tensor.file}: {tensor.name}: a value is not finite; the weights are damaged"
        )


def codes(data: bytes, spec: QuantSpec) -> Float32:
    """The values of the codes of a densely packed row."""
    stream = np.frombuffer(data, np.uint8)
    if spec.bits in (2, 4, 8):
        return _values_of_byte(spec.mode, spec.bits).take(stream, axis=0)
    # Eight codes take `bits` bytes.
    words = np.zeros((len(stream) // spec.bits, 8), np.uint8)
    words[:, : spec.bits] = stream.reshape(-1, spec.bits)
    found = words.view("<u8") >> np.arange(0, 8 * spec.bits, spec.bits, dtype=np.uint64)
    found &= np.uint64((1 << spec.bits) - 1)
    return found.astype(np.float32)


@cache
def _values_of_byte(mode: str, bits: int) -> Float32:
    """What the codes in each byte stand for, lowest first, `[256, 8 / bits]`."""
    found = np.arange(256)[:, None] >> np.arange(0, 8, bits) & ((1 << bits) - 1)
    if mode == "affine":
        return found.astype(np.float32)
    values: Float32 = (e4m3_values() if mode == "mxfp8" else e2m1_values())[found]
    return values


@cache
def _scales_of_byte(mode: str) -> Float32:
    """What each byte of a floating-point format's scales stands for, `[256, 1]`."""
    if mode == "nvfp4":
        return e4m3_values()[:, None]
    with np.errstate(over="ignore"):
        scales: Float32 = np.ldexp(np.float32(1), np.arange(256) - E8M0_ONE)[:, None]
    return scales

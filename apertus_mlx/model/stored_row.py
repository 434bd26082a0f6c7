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
from apertus_mlx.quant.packing import unpack
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


class StoredRow:
    """Computes one row of an embedding that is not quantized, or affinely.

    Args:
        spec: its format; None for floats.
        tensors: the embedding, or its codes, scales and biases.
        dtype: type to compute in.
        rounds_once: whether the product of code and scale is not rounded before the bias is added.
    """

    def __init__(
        self,
        spec: QuantSpec | None,
        tensors: Sequence[TensorInfo],
        dtype: mx.Dtype,
        rounds_once: bool = False,
    ) -> None:
        self._spec, self._tensors, self._dtype = spec, tensors, dtype
        self._rounds_once = rounds_once
        # Scales and biases have one type.
        self._changes_type = _FLOATS[tensors[-1].dtype].mlx != dtype

    def __call__(self, data: Sequence[bytes]) -> Float32:
        """The row `[columns]` of its bytes, but for a last rounding to the type to compute in.

        Raises:
            RejectedError: a number is not finite.
        """
        with np.errstate(all="ignore"):
            row = self._computed(data)
            # One number shows that all are finite, which is seldom not so.
            if not math.isfinite(row.sum()):
                for part, tensor in zip(data, self._tensors, strict=True):
                    if tensor.dtype in _FLOATS:
                        require_finite(part, tensor)
        return row

    def _computed(self, data: Sequence[bytes]) -> Float32:
        if self._spec is None:
            return floats(data[0], self._tensors[0])
        scales, biases = (
            floats(part, tensor) for part, tensor in zip(data[1:], self._tensors[1:], strict=True)
        )
        if self._changes_type:
            scales, biases = self._rounded(scales), self._rounded(biases)
        product = codes(data[0], self._spec.bits).reshape(len(scales), -1)
        product *= scales[:, None]
        if not self._rounds_once:
            product = self._rounded(product)
        product += biases[:, None]
        return product.reshape(-1)

    def _rounded(self, values: Float32) -> Float32:
        """To the nearest number of the type to compute in, ties to even."""
        if self._dtype == mx.bfloat16:
            bits = values.view(np.uint32)
            found = bits >> np.uint32(16)
            found &= np.uint32(1)
            found += np.uint32(0x7FFF)
            found += bits
            found &= np.uint32(0xFFFF0000)
            return found.view(np.float32)
        return values.astype(np.float16).astype(np.float32) if self._dtype == mx.float16 else values


def floats(data: bytes, tensor: TensorInfo) -> Float32:
    """Stored floats of `tensor`."""
    if tensor.dtype == "BF16":
        bits = np.frombuffer(data, "<u2").astype(np.uint32)
        bits <<= np.uint32(16)
        return bits.view(np.float32)
    return np.frombuffer(data, _FLOATS[tensor.dtype].numpy).astype(np.float32)


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


def codes(data: bytes, bits: int) -> Float32:
    """The codes of a densely packed row."""
    stream = np.frombuffer(data, np.uint8)
    if bits in (2, 4, 8):
        return _codes_of_byte(bits).take(stream, axis=0).reshape(-1)
    packed = stream[None].view(np.uint32)
    found: Float32 = unpack(packed, bits, len(stream) * 8 // bits)[0].astype(np.float32)
    return found


@cache
def _codes_of_byte(bits: int) -> Float32:
    """The codes in each byte, lowest first, `[256, 8 / bits]`."""
    shifts = np.arange(0, 8, bits)
    return (np.arange(256)[:, None] >> shifts & ((1 << bits) - 1)).astype(np.float32)

"""A row of an embedding as it is stored, to numbers, by NumPy alone.

MLX takes 20 µs and more for each operation on so small an array. NumPy takes one or two, so there
are few operations, and they write to arrays that are there already.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, NamedTuple

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.float_formats import E8M0_ONE, e2m1_values, e4m3_values
from apertus_mlx.quant.spec import QuantSpec

Array = npt.NDArray[Any]
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
    """Computes one row of an embedding at a time, always in the same memory: for one thread.

    Args:
        spec: its format; None for floats.
        tensors: the embedding, or its codes, scales and, where the format has them, biases.
        dtype: type of the row, and that to compute in.
        rounds_once: whether the product of code and scale is not rounded before the bias is added.

    Attributes:
        dtype: as given.
        buffers: of each tensor the bytes of a row `[size]`; whoever asks for a row writes them.
    """

    def __init__(
        self,
        spec: QuantSpec | None,
        tensors: Sequence[TensorInfo],
        dtype: mx.Dtype,
        rounds_once: bool = False,
    ) -> None:
        self.dtype = dtype
        self._tensors = tensors
        sizes = [tensor.size_bytes // tensor.shape[0] for tensor in tensors]
        memory = np.empty(sum(sizes), np.uint8)
        self.buffers: list[Array] = np.split(memory, np.cumsum(sizes)[:-1])
        # What has to be done, in order.
        self._steps: list[Callable[[], object]] = []
        if spec is None:
            self._flat = self._widened(tensors[0], memory)
        else:
            found, unpack = codes(spec, self.buffers[0])
            self._flat, grouped = found.reshape(-1), found.reshape(-1, spec.group_size)
            self._steps += unpack
            if spec.has_biases:
                both = self._widened(tensors[1], memory[sizes[0] :])
                if _FLOATS[tensors[1].dtype].mlx != dtype:
                    self._steps += rounding(both, dtype)
                scales, biases = both.reshape(2, -1, 1)
                self._steps.append(partial(np.multiply, grouped, scales, grouped))
                if not rounds_once:
                    self._steps += rounding(grouped, dtype)
                self._steps.append(partial(np.add, grouped, biases, grouped))
            else:
                # No product has more digits than its type, so that nothing is rounded.
                scales = np.empty((sizes[1], 1), np.float32)
                table, data = _scales_of_byte(spec.mode), self.buffers[1][:, None]
                self._steps.append(partial(table.take, data, None, scales, "clip"))
                self._steps.append(partial(np.multiply, grouped, scales, grouped))
        self._row = self._flat.reshape(1, 1, -1)

    def __call__(self) -> Float32:
        """The row `[1, 1, columns]` of what is in `buffers`, but for a last rounding to its type.

        The next one takes its place.

        Raises:
            RejectedError: a number is not finite.
        """
        with np.errstate(all="ignore"):
            for step in self._steps:
                step()
            # One number shows that all are finite, which is seldom not so.
            finite = math.isfinite(self._flat.dot(self._flat))
        if not finite:
            for data, tensor in zip(self.buffers, self._tensors, strict=True):
                if tensor.dtype in _FLOATS:
                    require_finite(data, tensor)
        return self._row

    def _widened(self, tensor: TensorInfo, memory: Array) -> Float32:
        """What will hold the floats that lie in `memory`."""
        kind = _FLOATS[tensor.dtype]
        stored = memory.view(kind.numpy)
        found = np.zeros(len(stored), np.float32)
        # A number in bfloat16 is the upper half of one in float32.
        target = found.view(np.uint16)[1::2] if kind.mlx == mx.bfloat16 else found
        self._steps.append(partial(np.copyto, target, stored))
        return found


def rounding(values: Float32, dtype: mx.Dtype) -> list[Callable[[], object]]:
    """What rounds `values` to the nearest of `dtype`, ties to even."""
    if dtype == mx.float16:
        half = np.empty(values.shape, np.float16)
        return [partial(np.copyto, half, values, "same_kind"), partial(np.copyto, values, half)]
    if dtype != mx.bfloat16:
        return []
    bits = values.view(np.uint32)
    up = np.empty_like(bits)
    return [
        partial(np.right_shift, bits, _HALF, up),
        partial(np.bitwise_and, up, _LAST, up),
        partial(np.add, up, _BELOW_HALF, up),
        partial(np.add, bits, up, bits),
        partial(np.bitwise_and, bits, _UPPER, bits),
    ]


def codes(spec: QuantSpec, data: Array) -> tuple[Float32, list[Callable[[], object]]]:
    """What will hold the values of the codes of a densely packed row, and what takes them apart."""
    if spec.bits in (2, 4, 8):
        table = _values(spec.mode, spec.bits, 8)
        found = np.empty((len(data), table.shape[1]), np.float32)
        return found, [partial(table.take, data, 0, found, "clip")]
    # So many bytes hold whole codes, which are looked up two or four at a time.
    width, together = (5, 10) if spec.bits == 5 else (6, 12)
    table = _values(spec.mode, spec.bits, together)
    words = np.zeros((len(data) // width, 8), np.uint8)
    shifts = np.arange(0, 8 * width, together)[:, None]
    # NumPy's inner loop goes over the words, of which there are many.
    places = np.empty((len(shifts), len(words)), np.int64)
    found = np.empty((len(words), len(shifts), table.shape[1]), np.float32)
    return found, [
        partial(np.copyto, words[:, :width], data.reshape(-1, width)),
        partial(np.right_shift, words.view(np.int64)[:, 0], shifts, places),
        partial(np.bitwise_and, places, np.int64((1 << together) - 1), places),
        partial(table.take, places.T, 0, found, "clip"),
    ]


def floats(data: bytes, tensor: TensorInfo) -> Float32:
    """Stored floats of `tensor`."""
    kind = _FLOATS[tensor.dtype]
    stored = np.frombuffer(data, kind.numpy)
    if kind.mlx == mx.bfloat16:
        return (stored.astype(np.uint32) << _HALF).view(np.float32)
    return stored.astype(np.float32)


def require_finite(data: bytes | Array, tensor: TensorInfo) -> None:
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


@cache
def _values(mode: str, bits: int, together: int) -> Float32:
    """What the codes in so many bits stand for, lowest first, `[2**together, together / bits]`."""
    shifts = np.arange(0, together, bits)
    found = np.arange(1 << together)[:, None] >> shifts & ((1 << bits) - 1)
    if mode == "affine":
        return found.astype(np.float32)
    values: Float32 = (e4m3_values() if mode == "mxfp8" else e2m1_values())[found]
    return values


@cache
def _scales_of_byte(mode: str) -> Float32:
    """What each byte of a floating-point format's scales stands for."""
    if mode == "nvfp4":
        return e4m3_values()
    with np.errstate(over="ignore"):
        scales: Float32 = np.ldexp(np.float32(1), np.arange(256) - E8M0_ONE)
    return scales

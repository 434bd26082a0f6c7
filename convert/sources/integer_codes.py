"""Matrices of integer codes with scales and zero points per group: `(code - zero) * scale`.

Kept as MLX's affine format this is `scale * code + bias` with `bias = -zero * scale`. With a
constant zero point of half the range the product is a power of two times the scale, so exact in the
scale's own type; a stored zero point makes it exact in float32 when the scale has 16 bits.
"""

from __future__ import annotations

from abc import abstractmethod
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.sources.source import Codes, MatrixSource, Stored
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.packing import pack
from apertus_mlx.quant.spec import AFFINE_BITS, AFFINE_GROUP_SIZES, QuantSpec

FLOAT32_ROUNDING = "zero point x scale rounded to float32, relative error up to 6e-8"


@dataclass(frozen=True)
class IntegerMatrix(MatrixSource):
    """A matrix of integer codes; each format has a class of this kind for how it packs them."""

    name: str
    bits: int
    rows: int
    columns: int
    # Columns that share a scale in the source.
    group_size: int
    # Whether all zero points are half the range.
    symmetric: bool
    weight: TensorInfo
    scale: TensorInfo
    zero: TensorInfo | None
    # The group of each column, where it is stored (`g_idx`).
    order: TensorInfo | None
    # Whether these are not the columns' own order, as after activation ordering.
    reordered: bool
    is_quantized: ClassVar[bool] = True

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Everything that is read."""
        found = (self.weight, self.zero, self.scale, self.order)
        return tuple(tensor for tensor in found if tensor is not None)

    @property
    def dtype(self) -> str:
        """Type of the scales."""
        return self.scale.dtype

    @abstractmethod
    def codes(self, reader: Reader, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows of unsigned codes `[rows, columns]`."""

    @abstractmethod
    def scales(self, reader: Reader, start: int, stop: int) -> mx.array:
        """Scales `[rows, groups]` in their own type."""

    @abstractmethod
    def zeros(self, reader: Reader, start: int, stop: int) -> npt.NDArray[np.int32] | None:
        """Zero points `[rows, groups]`, or None where they are half the range."""

    @property
    def no_form(self) -> str:
        """Why the codes cannot be kept."""
        if self.reordered:
            return (
                "columns are reordered (act-order, desc_act), each matrix's in its own way: the "
                "columns of a group do not lie side by side, as MLX wants them"
            )
        return f"MLX has no {self.bits}-bit codes in groups of {self.group_size}"

    @property
    def stored(self) -> Stored | None:
        """The affine format that holds the same codes; None for groups that MLX has not."""
        if self.reordered:
            return None
        sizes = [size for size in AFFINE_GROUP_SIZES if self.group_size % size == 0]
        if self.bits not in AFFINE_BITS or not sizes or self.columns % self.group_size:
            return None
        spec = QuantSpec(self.bits, sizes[-1])
        if self.symmetric:
            return Stored(spec, self.dtype)
        return Stored(spec, "F32", None, FLOAT32_ROUNDING if self.dtype == "F32" else None)

    def settled(self, reader: Reader) -> IntegerMatrix:
        """The same matrix; `reordered` as the groups of the columns show it.

        Raises:
            RejectedError: a column of a group that there is not.
        """
        if self.order is None:
            return replace(self, reordered=False)
        found = reader.raw(self.order, 0, self.columns)
        plain = np.arange(self.columns) // self.group_size
        # compressed-tensors writes -1 where no order was computed.
        if (found == plain).all() or (found == -1).all():
            return replace(self, order=None, reordered=False)
        if found.min() < 0 or found.max() >= self.columns // self.group_size:
            raise RejectedError(
                f"{self.order.file}: {self.order.name}: groups from {found.min()} to "
                f"{found.max()}, but there are {self.columns // self.group_size}"
            )
        return replace(self, reordered=True)

    def read(self, reader: Reader, start: int, stop: int, _nonfinite: bool = False) -> mx.array:
        """Rows in float32: one rounding of `(code - zero) * scale`."""
        codes = self.codes(reader, start, stop).astype(np.int32)
        zeros = self.zeros(reader, start, stop)
        scales = np.array(self.scales(reader, start, stop).astype(mx.float32))
        groups: npt.NDArray[Any] = np.arange(self.columns) // self.group_size
        if self.reordered and self.order is not None:
            groups = reader.raw(self.order, 0, self.columns)
        steps = codes - (1 << (self.bits - 1) if zeros is None else zeros[:, groups])
        return mx.array(steps.astype(np.float32) * scales[:, groups])

    def read_codes(self, reader: Reader, start: int, stop: int) -> Codes:
        """Rows in the affine format `stored`."""
        stored = self.stored
        assert stored is not None
        weight = mx.array(pack(self.codes(reader, start, stop), self.bits))
        scales = self.scales(reader, start, stop)
        zeros = self.zeros(reader, start, stop)
        wide = scales.astype(mx.float32)
        if zeros is None:
            biases = (wide * -float(1 << (self.bits - 1))).astype(scales.dtype)
        else:
            scales = wide
            biases = -mx.array(zeros.astype(np.float32)) * wide
        if not mx.isfinite(biases).all():
            raise RejectedError(
                f"{self.name}: scales too large to keep in their type; --dequantize --dtype float32"
            )
        copies = self.group_size // stored.spec.group_size
        return Codes(weight, mx.repeat(scales, copies, axis=1), mx.repeat(biases, copies, axis=1))


def signed_to_unsigned(values: npt.NDArray[Any], bits: int) -> npt.NDArray[np.uint8]:
    """Signed codes as unsigned ones, zero becoming half the range."""
    return (values.astype(np.int16) + (1 << (bits - 1))).astype(np.uint8)

"""Matrices of 8- and 4-bit floats.

The codes are kept as they are, and nothing is rounded. A factor for which MLX's formats have no
place is stored beside them: `output_scale` multiplies the matrix product, `output_divisor` divides
it.
"""

from __future__ import annotations

from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.inventory import OUTPUT_DIVISOR, OUTPUT_SCALE
from apertus_mlx.checkpoint.layout import Matrix
from apertus_mlx.checkpoint.matching import FLOAT_DTYPES, Unmatched
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.sources.source import Codes, Factor, MatrixSource, Stored, refuse_nan
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.float_formats import (
    E4M3_NAN,
    E8M0_NAN,
    E8M0_ONE,
    e2m1_values,
    e4m3_values,
)
from apertus_mlx.quant.packing import unpack
from apertus_mlx.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class Float8Matrix(MatrixSource):
    """E4M3 values times one scale per row or per matrix: `code * scale`."""

    rows: int
    columns: int
    weight: TensorInfo
    scale: TensorInfo
    is_quantized: bool = True

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Codes and scales."""
        return self.weight, self.scale

    @property
    def dtype(self) -> str:
        """Type of the scales."""
        return self.scale.dtype

    @property
    def stored(self) -> Stored | None:
        """mxfp8 with group scales of one, and the scale as a factor of the output."""
        spec = QuantSpec(8, 32, "mxfp8")
        if not spec.fits(self.columns):
            return None
        return Stored(spec, "U8", Factor(OUTPUT_SCALE, self.scale.dtype, self._scale_shape))

    @property
    def _scale_shape(self) -> tuple[int, ...]:
        return (self.rows,) if self.rows in self.scale.shape and self.rows > 1 else (1,)

    def read(self, reader: Reader, start: int, stop: int, _nonfinite: bool = False) -> mx.array:
        """Rows in float32."""
        values = e4m3_values()[self._codes(reader, start, stop)]
        scales = np.array(self.read_factor(reader).astype(mx.float32))
        rows = scales[start:stop, None] if scales.size > 1 else scales[None, :]
        return mx.array(values * rows)

    def read_codes(self, reader: Reader, start: int, stop: int) -> Codes:
        """Rows as mxfp8: the same bytes."""
        weight = mx.array(np.ascontiguousarray(self._codes(reader, start, stop)).view(np.uint32))
        scales = mx.full((stop - start, self.columns // 32), E8M0_ONE, mx.uint8)
        return Codes(weight, scales)

    def read_factor(self, reader: Reader) -> mx.array:
        """The scales, `[rows]` or `[1]`."""
        rows = self.scale.shape[0] if self.scale.shape else 1
        return reader.floats(self.scale, 0, rows).reshape(self._scale_shape)

    def _codes(
        self, reader: Reader, start: int, stop: int
    ) -> np.ndarray[tuple[int, ...], np.dtype[np.uint8]]:
        codes = reader.raw(self.weight, start, stop).view(np.uint8)
        refuse_nan(self.weight, codes & 0x7F == E4M3_NAN)
        return codes


@dataclass(frozen=True, slots=True)
class NvFloat4Matrix(MatrixSource):
    """E2M1 codes with an E4M3 scale per 16 and one divisor: `code * scale / divisor`."""

    name: str
    columns: int
    packed: TensorInfo
    scale: TensorInfo
    divisor: TensorInfo
    is_quantized: bool = True
    # The float values come out as if scales were bfloat16.
    dtype: str = "BF16"

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Codes, scales and divisor."""
        return self.packed, self.scale, self.divisor

    @property
    def stored(self) -> Stored | None:
        """nvfp4, bit for bit, and the divisor of the output."""
        spec = QuantSpec(4, 16, "nvfp4")
        if not spec.fits(self.columns):
            return None
        return Stored(spec, "U8", Factor(OUTPUT_DIVISOR, "F32", (1,)))

    def settled(self, reader: Reader) -> NvFloat4Matrix:
        """The same matrix; refuses a divisor that is zero or not finite."""
        if not self._divisor(reader) > 0:
            raise RejectedError(f"{self.name}.weight_global_scale: is not above zero")
        return self

    def read(self, reader: Reader, start: int, stop: int, _nonfinite: bool = False) -> mx.array:
        """Rows in float32, from one float64 division."""
        packed = reader.raw(self.packed, start, stop).view(np.uint32)
        values = e2m1_values()[unpack(packed, 4, self.columns)].astype(np.float64)
        scales = e4m3_values()[np.array(self._scales(reader, start, stop))]
        divisor = self._divisor(reader)
        return mx.array((values * np.repeat(scales, 16, axis=1) / divisor).astype(np.float32))

    def read_codes(self, reader: Reader, start: int, stop: int) -> Codes:
        """Rows as nvfp4: the same bytes."""
        packed = reader.raw(self.packed, start, stop).view(np.uint32)
        return Codes(mx.array(packed), self._scales(reader, start, stop))

    def read_factor(self, reader: Reader) -> mx.array:
        """The divisor, `[1]`."""
        return reader.floats(self.divisor, 0, 1).reshape(1)

    def _divisor(self, reader: Reader) -> float:
        return float(np.array(self.read_factor(reader))[0])

    def _scales(self, reader: Reader, start: int, stop: int) -> mx.array:
        scales = reader.rows(self.scale, start, stop)
        refuse_nan(self.scale, np.array(scales) & 0x7F == E4M3_NAN)
        return scales


@dataclass(frozen=True, slots=True)
class MxFloatMatrix(MatrixSource):
    """E2M1 or E4M3 codes with a power of two (E8M0) per 32: mxfp4 and mxfp8, byte for byte."""

    spec: QuantSpec
    weight: TensorInfo
    scale: TensorInfo
    is_quantized: bool = True
    # The float values come out as if scales were bfloat16.
    dtype: str = "BF16"

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Codes and scales."""
        return self.weight, self.scale

    @property
    def stored(self) -> Stored | None:
        """The same bytes."""
        return Stored(self.spec, "U8")

    def read(self, reader: Reader, start: int, stop: int, _nonfinite: bool = False) -> mx.array:
        """Rows in float32."""
        codes = self.read_codes(reader, start, stop)
        return mx.dequantize(
            codes.weight,
            codes.scales,
            group_size=self.spec.group_size,
            bits=self.spec.bits,
            mode=self.spec.mode,
            dtype=mx.float32,
        )

    def read_codes(self, reader: Reader, start: int, stop: int) -> Codes:
        """Rows as they are stored, in MLX's words."""
        weight = np.ascontiguousarray(reader.raw(self.weight, start, stop)).view(np.uint8)
        if self.spec.bits == 8:
            refuse_nan(self.weight, weight & 0x7F == E4M3_NAN)
        scales = reader.raw(self.scale, start, stop)
        refuse_nan(self.scale, scales == E8M0_NAN)
        return Codes(mx.array(weight.view(np.uint32)), mx.array(scales))


@dataclass(frozen=True, slots=True)
class Float8Blocks(MatrixSource):
    """E4M3 values with one scale per block of rows and columns: `code * scale`."""

    rows: int
    columns: int
    # Rows and columns of a block; those at the edges may be smaller.
    block: tuple[int, int]
    weight: TensorInfo
    scale: TensorInfo
    stored: None = None
    is_quantized: bool = True

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Codes and scales."""
        return self.weight, self.scale

    @property
    def dtype(self) -> str:
        """The type of the values; the scales' would say nothing of the model's."""
        return "BF16"

    @property
    def no_form(self) -> str:
        """Why the codes cannot be kept."""
        height, width = self.block
        return f"8-bit floats with a scale per {height} x {width} weights, which MLX has not"

    def read(self, reader: Reader, start: int, stop: int, _nonfinite: bool = False) -> mx.array:
        """Rows in float32."""
        height, width = self.block
        first, last = start // height, -(-stop // height)
        codes = reader.raw(self.weight, start, stop).view(np.uint8)
        refuse_nan(self.weight, codes & 0x7F == E4M3_NAN)
        scales = np.array(reader.floats(self.scale, first, last).astype(mx.float32))
        rows = np.arange(start, stop) // height - first
        columns = np.arange(self.columns) // width
        return mx.array(e4m3_values()[codes] * scales[rows][:, columns])


def float8_blocks(
    matrix: Matrix, left: Unmatched, scale_name: str, block: tuple[int, int]
) -> Float8Blocks:
    """Take a matrix of E4M3 values and its scales, one per block of `block` rows and columns."""
    rows, columns = matrix.rows, matrix.columns
    height, width = block
    weight = left.need(matrix.weight, ("F8_E4M3",), (rows, columns))
    shape = (-(-rows // height), -(-columns // width))
    scale = left.need(f"{matrix.path}.{scale_name}", FLOAT_DTYPES, shape)
    return Float8Blocks(rows, columns, block, weight, scale)

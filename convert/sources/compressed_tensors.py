"""Checkpoints of the compressed-tensors library (vLLM, llm-compressor).

`pack-quantized` integers become MLX's affine format, `float-quantized` E4M3 becomes mxfp8 with unit
scales and a factor per row, `nvfp4-pack-quantized` becomes nvfp4 with one divisor per matrix;
`mxfp4-pack-quantized` and `mxfp8-quantized` are MLX's formats already. What a module is stored as
is read off its tensors, then looked up among the config's groups: patterns from a checkpoint are
never run as regular expressions.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.layout import Matrix
from apertus_mlx.checkpoint.matching import FLOAT_DTYPES, Unmatched
from apertus_mlx.convert.sources.compressed_tensors_config import Group, float_blocks, parse_groups
from apertus_mlx.convert.sources.hugging_face import open_tensors, plain_matrix
from apertus_mlx.convert.sources.integer_codes import IntegerMatrix, signed_to_unsigned
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.sources.scaled_floats import (
    Float8Matrix,
    MxFloatMatrix,
    NvFloat4Matrix,
    float8_blocks,
)
from apertus_mlx.convert.sources.source import MatrixSource, Source, match_source
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.packing import aligned_width, dense_width, unpack, unpack_aligned
from apertus_mlx.quant.spec import QuantSpec

# What quantized activations need; weights alone are converted.
ACTIVATION_SUFFIXES = (".input_scale", ".input_zero_point", ".input_global_scale")


@dataclass(frozen=True)
class PackedInts(IntegerMatrix):
    """Signed codes packed into int32 along the columns, or as plain int8."""

    shape: TensorInfo | None
    # Whether each word holds whole codes only (compressed-tensors before May 2026).
    aligned: bool

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Everything that is read."""
        found = super().tensors
        return found if self.shape is None else (*found, self.shape)

    def codes(self, reader: Reader, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows of codes from 0 on."""
        values = reader.raw(self.weight, start, stop)
        if self.weight.dtype == "I8":
            return signed_to_unsigned(values, self.bits)
        return self._unpack(values.view(np.uint32), self.columns)

    def scales(self, reader: Reader, start: int, stop: int) -> mx.array:
        """One scale per row and group."""
        if self.scale.shape in ((), (1,), (1, 1)):
            return mx.broadcast_to(reader.floats(self.scale, 0, 1).reshape(1, 1), (stop - start, 1))
        return reader.floats(self.scale, start, stop).reshape(stop - start, -1)

    def zeros(self, reader: Reader, start: int, stop: int) -> npt.NDArray[np.int32] | None:
        """One zero point per row and group, in the same unsigned range as the codes."""
        tensor = self.zero
        if tensor is None:
            return None
        if tensor.dtype == "I8":
            rows = reader.raw(tensor, start, stop).reshape(stop - start, -1)
            return signed_to_unsigned(rows, self.bits).astype(np.int32)
        # Packed along the rows: small enough to read whole.
        packed = reader.raw(tensor, 0, tensor.shape[0]).view(np.uint32)
        zeros = self._unpack(np.ascontiguousarray(packed.T), self.rows).T
        return zeros[start:stop].astype(np.int32)

    def settled(self, reader: Reader) -> IntegerMatrix:
        """The same matrix; refuses a stored shape that is not the config's."""
        if self.shape is not None:
            stored = reader.raw(self.shape, 0, self.shape.shape[0]).tolist()
            if stored != [self.rows, self.columns]:
                raise RejectedError(
                    f"{self.name}.weight_shape: {stored}, the config says "
                    f"{[self.rows, self.columns]}"
                )
        return super().settled(reader)

    def _unpack(self, packed: npt.NDArray[np.uint32], count: int) -> npt.NDArray[np.uint8]:
        return (unpack_aligned if self.aligned else unpack)(packed, self.bits, count)


def source(
    config: ModelConfig, block: Mapping[str, Any], tensors: Mapping[str, TensorInfo], name: str
) -> Source:
    """Recognise a compressed-tensors checkpoint.

    Raises:
        RejectedError: a format or scheme that is not read, by name.
    """
    groups = parse_groups(block, name)
    return by_tensors(
        f"compressed-tensors {block.get('format')}", config, tensors, name, "compressed-tensors",
        groups,
    )  # fmt: skip


def by_tensors(
    form: str,
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    name: str,
    method: str,
    groups: list[Group],
) -> Source:
    """A checkpoint whose matrices are stored under compressed-tensors' names.

    Args:
        form: how people call the format.
        config: what `config.json` says.
        tensors: the stored tensors by name.
        name: what error messages call the checkpoint.
        method: the name of the method by the config.
        groups: how the config says that weights are stored; float formats show it themselves.
    """
    left = open_tensors(config, tensors, name)
    target = replace(config, family="apertus", foreign_quantization=None)
    for key in [key for key in tensors if key.endswith(ACTIVATION_SUFFIXES)]:
        left.drop(key, "for quantized activations, which MLX does not use here")
    return match_source(form, target, left, lambda matrix: _matrix(matrix, left, groups), method)


def _matrix(matrix: Matrix, left: Unmatched, groups: list[Group]) -> MatrixSource:
    path = matrix.path
    if f"{path}.weight_packed" in left:
        packed = left.peek(f"{path}.weight_packed")
        if packed.dtype == "U8":
            is_mx = left.peek(f"{path}.weight_scale").dtype == "U8"
            return mx_floats(matrix, left, 4) if is_mx else _nvfp4(matrix, left)
        return _packed(matrix, packed, left, groups)
    weight = left.peek(matrix.weight)
    if weight.dtype == "F8_E4M3":
        scale = left.peek(f"{path}.weight_scale")
        if scale.dtype == "U8":
            return mx_floats(matrix, left, 8)
        for block in float_blocks(groups, matrix.columns):
            if scale.shape == (-(-matrix.rows // block[0]), -(-matrix.columns // block[1])):
                return float8_blocks(matrix, left, "weight_scale", block)
        return _float8(matrix, left)
    if weight.dtype == "I8":
        return _packed(matrix, weight, left, groups)
    return plain_matrix(matrix, left)


def mx_floats(matrix: Matrix, left: Unmatched, bits: Literal[4, 8]) -> MxFloatMatrix:
    """Take a matrix in mxfp4 or mxfp8."""
    path, rows, columns = matrix.path, matrix.rows, matrix.columns
    spec = QuantSpec(bits, 32, "mxfp4" if bits == 4 else "mxfp8")
    if not spec.fits(columns):
        raise RejectedError(
            f"{left.name}: {path}: {columns} columns do not divide into groups of 32"
        )
    if bits == 4:
        weight = left.need(f"{path}.weight_packed", ("U8",), (rows, columns // 2))
    else:
        weight = left.need(matrix.weight, ("F8_E4M3",), (rows, columns))
    scale = left.need(f"{path}.weight_scale", ("U8",), (rows, columns // 32))
    return MxFloatMatrix(spec, weight, scale)


def _packed(matrix: Matrix, weight: TensorInfo, left: Unmatched, groups: list[Group]) -> PackedInts:
    name, path, rows, columns = left.name, matrix.path, matrix.rows, matrix.columns
    scale = left.peek(f"{path}.weight_scale")
    if scale.dtype not in FLOAT_DTYPES:
        raise RejectedError(f"{name}: {path}.weight_scale: type {scale.dtype}")
    zero_point = left.take(f"{path}.weight_zero_point")
    fitting = set()
    for group in groups:
        width = columns if weight.dtype == "I8" else dense_width(columns, min(group.bits, 32))
        widths = {width} if weight.dtype == "I8" else {width, aligned_width(columns, group.bits)}
        size = group.group_size if group.strategy == "group" else columns
        if group.kind != "int" or not size or size < 1 or columns % size:
            continue
        if group.symmetric != (zero_point is None) or weight.shape != (rows, weight.shape[-1]):
            continue
        if weight.shape[-1] not in widths or not _scale_fits(scale, rows, columns // size):
            continue
        fitting.add((group.bits, size))
    if len(fitting) != 1:
        found = "no group" if not fitting else f"{len(fitting)} groups"
        raise RejectedError(
            f"{name}: {path}: {found} of config_groups can have weights of shape "
            f"{list(weight.shape)} with scales of {list(scale.shape)} (config: {rows} x {columns})"
        )
    ((bits, size),) = fitting
    if not 1 < bits <= 8:
        raise RejectedError(f"{name}: {path}: {bits} bits have no form in MLX")
    count = columns // size
    # Only the weight shows the layout: a few rows of zero points can have one width in both.
    aligned = weight.dtype != "I8" and weight.shape[-1] != dense_width(columns, bits)
    if zero_point is not None:
        height = (aligned_width if aligned else dense_width)(rows, bits)
        int8 = zero_point.dtype == "I8" and zero_point.shape in ((rows, count), (rows,))
        if not int8 and (zero_point.dtype != "I32" or zero_point.shape != (height, count)):
            raise RejectedError(
                f"{name}: {path}.weight_zero_point: {zero_point.dtype} "
                f"{list(zero_point.shape)} does not fit {rows} rows and {count} groups"
            )
    left.take(matrix.weight if weight.dtype == "I8" else f"{path}.weight_packed")
    left.take(f"{path}.weight_scale")
    shape = left.take(f"{path}.weight_shape")
    if shape is not None:
        left.check(f"{path}.weight_shape", shape, ("I32", "I64"), (2,))
    order = left.take(f"{path}.weight_g_idx")
    if order is not None:
        left.check(f"{path}.weight_g_idx", order, ("I32",), (columns,))
    return PackedInts(
        path, bits, rows, columns, size, zero_point is None, weight, scale, zero_point, order,
        order is not None and any(group.reordered for group in groups), shape, aligned,
    )  # fmt: skip


def _scale_fits(scale: TensorInfo, rows: int, groups: int) -> bool:
    if groups > 1:
        return scale.shape == (rows, groups)
    return scale.shape in ((rows, 1), (rows,), (1,), (), (1, 1))


def _float8(matrix: Matrix, left: Unmatched) -> Float8Matrix:
    path, rows, columns = matrix.path, matrix.rows, matrix.columns
    weight = left.need(matrix.weight, ("F8_E4M3",), (rows, columns))
    scale = left.peek(f"{path}.weight_scale")
    if scale.shape not in ((), (1,), (1, 1), (rows,), (rows, 1)):
        raise RejectedError(
            f"{left.name}: {path}.weight_scale: shape {list(scale.shape)}: only one scale per "
            "matrix or per row is read"
        )
    left.check(f"{path}.weight_scale", scale, FLOAT_DTYPES, scale.shape)
    left.take(f"{path}.weight_scale")
    return Float8Matrix(rows, columns, weight, scale)


def _nvfp4(matrix: Matrix, left: Unmatched) -> NvFloat4Matrix:
    path, rows, columns = matrix.path, matrix.rows, matrix.columns
    if columns % 16:
        raise RejectedError(
            f"{left.name}: {path}: {columns} columns do not divide into groups of 16"
        )
    packed = left.need(f"{path}.weight_packed", ("U8",), (rows, columns // 2))
    scale = left.need(f"{path}.weight_scale", ("F8_E4M3",), (rows, columns // 16))
    divisor = left.need(f"{path}.weight_global_scale", ("F32",), (1,))
    return NvFloat4Matrix(path, columns, packed, scale, divisor)

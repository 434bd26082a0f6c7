"""GPTQ and AWQ checkpoints: integer codes packed for CUDA kernels, transposed to MLX's rows.

Both hold `[in, out]` matrices: GPTQ packs the codes along the input, AWQ along the output in an
interleaved order; `qzeros` are packed along the output, in GPTQ's first format less one. The values
are `(code - zero) * scale`. MLX wants `[out, in]`, so a block of rows here is a block of columns
there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.layout import Matrix
from apertus_mlx.checkpoint.matching import FLOAT_DTYPES, Unmatched
from apertus_mlx.convert.sources.hugging_face import open_tensors, plain_matrix
from apertus_mlx.convert.sources.integer_codes import IntegerMatrix
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.sources.source import MatrixSource, Source, match_source
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.arrays import blocks
from apertus_mlx.quant.packing import dense_width, unpack

GPTQ_BITS = (2, 3, 4, 8)
AWQ_BITS = (4,)
# The nibble of each word, from the lowest on, belongs to this column of its eight.
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
COLUMN_BLOCK_BYTES = 4 * 2**20


@dataclass(frozen=True)
class TransposedInts(IntegerMatrix):
    """One matrix of a GPTQ or AWQ checkpoint; `settled` holds it to `symmetric`."""

    zero: TensorInfo
    method: str
    # What has to be added to a stored zero point.
    zero_offset: int

    def codes(self, reader: Reader, start: int, stop: int) -> npt.NDArray[np.uint8]:
        """Rows of codes from 0 on."""
        if self.method == "awq":
            return self._interleaved(reader, self.weight, start, stop).T
        packed = np.ascontiguousarray(_columns(reader, self.weight, start, stop).T).view(np.uint32)
        return unpack(packed, self.bits, self.columns)

    def scales(self, reader: Reader, start: int, stop: int) -> mx.array:
        """One scale per row and group."""
        scales = reader.floats(self.scale, 0, self.scale.shape[0])
        return scales[:, start:stop].T

    def zeros(self, reader: Reader, start: int, stop: int) -> npt.NDArray[np.int32] | None:
        """One zero point per row and group; None where all are half the range."""
        return None if self.symmetric else self._zeros(reader, start, stop)

    def _zeros(self, reader: Reader, start: int, stop: int) -> npt.NDArray[np.int32]:
        if self.method == "awq":
            return self._interleaved(reader, self.zero, start, stop).T.astype(np.int32)
        packed = np.ascontiguousarray(reader.raw(self.zero, 0, self.zero.shape[0])).view(np.uint32)
        stored = unpack(packed, self.bits, self.rows)[:, start:stop]
        return stored.T.astype(np.int32) + self.zero_offset

    def settled(self, reader: Reader) -> IntegerMatrix:
        """The same matrix, its zero points checked against what the config says of them.

        Symmetric ones show by themselves in which of GPTQ's formats they are stored.
        """
        if self.symmetric:
            half = 1 << (self.bits - 1)
            stored = self._zeros(reader, 0, self.rows) - self.zero_offset
            if not (stored == half).all() and not (stored == half - 1).all():
                raise RejectedError(
                    f"{self.name}.qzeros: not half the range, but the config says sym"
                )
        elif (self._zeros(reader, 0, self.rows) >= 1 << self.bits).any():
            raise RejectedError(
                f"{self.name}.qzeros: a zero point of 0, which GPTQ's first format cannot hold; "
                "use a gptq_v2 checkpoint"
            )
        return super().settled(reader)

    def _interleaved(
        self, reader: Reader, tensor: TensorInfo, start: int, stop: int
    ) -> npt.NDArray[np.uint8]:
        first, last = start // 8, -(-stop // 8)
        packed = _columns(reader, tensor, first, last).view(np.uint32)
        codes = unpack(packed, 4, 8 * packed.shape[1]).reshape(*packed.shape, 8)
        ordered = codes[:, :, np.argsort(AWQ_ORDER)].reshape(len(packed), -1)
        return ordered[:, start - 8 * first : stop - 8 * first]


@dataclass(frozen=True, slots=True)
class Packing:
    """What a config says of all matrices.

    Attributes:
        method: `gptq` or `awq`.
        bits: of a code.
        group_size: columns that share a scale; -1: all.
        symmetric: whether all zero points are half the range.
        zero_offset: what has to be added to a stored zero point.
        reordered: whether the columns of a group may lie apart (`desc_act`).
        varies: whether single matrices have other bits and groups than these.
    """

    method: str
    bits: int
    group_size: int
    symmetric: bool
    zero_offset: int
    reordered: bool
    varies: bool


def source(
    config: ModelConfig,
    method: str,
    block: Mapping[str, Any],
    tensors: Mapping[str, TensorInfo],
    name: str,
) -> Source:
    """Recognise a GPTQ or AWQ checkpoint.

    Raises:
        RejectedError: bits, format or tensors that are not read, by name.
    """
    packing = _packing(method, block, f"{name}: quantization_config")
    left = open_tensors(config, tensors, name)
    target = replace(config, family="apertus", foreign_quantization=None)
    return match_source(
        method.upper(), target, left, lambda matrix: _matrix(matrix, left, packing), method
    )


def _packing(method: str, block: Mapping[str, Any], where: str) -> Packing:
    bits = block.get("bits", block.get("w_bit"))
    allowed = GPTQ_BITS if method == "gptq" else AWQ_BITS
    if isinstance(bits, bool) or bits not in allowed:
        raise RejectedError(
            f"{where}: bits: {str(bits)[:40]}: {method} has {', '.join(map(str, allowed))}"
        )
    size = block.get("group_size", block.get("q_group_size"))
    if isinstance(size, bool) or not isinstance(size, int) or (size < 1 and size != -1):
        raise RejectedError(f"{where}: group_size: {str(size)[:40]}: expected a size, or -1")
    offset = _zero_offset(method, block, where)
    exceptions = _exceptions(block)
    symmetric = method == "gptq" and block.get("sym") is True
    return Packing(
        method,
        bits,
        size,
        symmetric and all(entry.get("sym", True) is True for entry in exceptions),
        offset,
        any(map(_reorders, (block, *exceptions))),
        bool(exceptions),
    )


def _reorders(entry: Mapping[str, Any]) -> bool:
    """Whether columns may lie apart from their group; static groups are made before the order."""
    return entry.get("desc_act") is True and entry.get("static_groups") is not True


def _exceptions(block: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What holds for single modules: of GPTQModel (`dynamic`) or AutoRound (`extra_config`).

    Which these are is never asked of the patterns: the tensors show bits and groups.
    """
    found = [block.get(key) for key in ("dynamic", "extra_config")]
    entries = [entry for each in found if isinstance(each, dict) for entry in each.values()]
    return [entry for entry in entries if isinstance(entry, dict)]


def _zero_offset(method: str, block: Mapping[str, Any], where: str) -> int:
    if method == "awq":
        version = str(block.get("version", "gemm")).lower()
        if version != "gemm":
            raise RejectedError(f"{where}: version {version[:40]!r}: only gemm is read")
        if block.get("zero_point", True) is not True:
            raise RejectedError(f"{where}: zero_point: only true is read")
        return 0
    form = str(block.get("checkpoint_format") or "gptq")
    if form not in ("gptq", "gptq_v2"):
        raise RejectedError(
            f"{where}: checkpoint_format {form[:40]!r} is not read; save it as gptq or gptq_v2"
        )
    return 1 if form == "gptq" else 0


def _matrix(matrix: Matrix, left: Unmatched, packing: Packing) -> MatrixSource:
    path, rows, columns = matrix.path, matrix.rows, matrix.columns
    if f"{path}.qweight" not in left:
        return plain_matrix(matrix, left)
    if f"{path}.bias" in left:
        raise RejectedError(f"{left.name}: {path}.bias: Apertus has no biases")
    bits, size = packing.bits, columns if packing.group_size == -1 else packing.group_size
    is_gptq = packing.method == "gptq"
    if packing.varies:
        bits, size = _shown(matrix, left, is_gptq)
    if columns % size or rows * bits % 32 or columns * bits % 32:
        raise RejectedError(
            f"{left.name}: {path}: {rows} x {columns} does not divide into groups of {size}"
        )
    groups = columns // size
    packed = (columns * bits // 32, rows) if is_gptq else (columns, rows * bits // 32)
    weight = left.need(f"{path}.qweight", ("I32", "U32"), packed)
    zero = left.need(f"{path}.qzeros", ("I32", "U32"), (groups, dense_width(rows, bits)))
    scale = left.need(f"{path}.scales", FLOAT_DTYPES, (groups, rows))
    order = left.take(f"{path}.g_idx")
    if order is not None:
        left.check(f"{path}.g_idx", order, ("I32",), (columns,))
    return TransposedInts(
        path, bits, rows, columns, size, packing.symmetric, weight, scale, zero, order,
        packing.reordered and order is not None, packing.method, packing.zero_offset,
    )  # fmt: skip


def _shown(matrix: Matrix, left: Unmatched, is_gptq: bool) -> tuple[int, int]:
    """Bits and group size as the shapes of the tensors show them."""
    weight, scale = (left.peek(f"{matrix.path}.{part}") for part in ("qweight", "scales"))
    allowed = GPTQ_BITS if is_gptq else AWQ_BITS
    words, plain = (weight.shape or (0,))[0 if is_gptq else -1], matrix.columns
    if not is_gptq:
        plain = matrix.rows
    fitting = [bits for bits in allowed if plain * bits == 32 * words]
    groups = (scale.shape or (0,))[0]
    if not fitting or groups < 1 or matrix.columns % groups:
        raise RejectedError(
            f"{left.name}: {matrix.path}: qweight {list(weight.shape)} with scales "
            f"{list(scale.shape)} fit no bits and groups of {matrix.rows} x {matrix.columns}"
        )
    return fitting[0], matrix.columns // groups


def _columns(reader: Reader, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[np.generic]:
    """Columns of a row-major matrix, read in blocks of rows."""
    rows, width = tensor.shape
    found = np.empty((rows, stop - start), np.int32)
    for part in blocks(rows, COLUMN_BLOCK_BYTES // (4 * width)):
        block = reader.raw(tensor, part.start, part.stop)
        found[part] = block[:, start:stop].view(np.int32)
    return found

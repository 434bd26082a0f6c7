"""MLX folders, quantized by mlx-lm or by this package: codes pass through unchanged."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.inventory import OUTPUT_DIVISOR, match_matrix
from apertus_mlx.checkpoint.layout import Matrix
from apertus_mlx.checkpoint.matching import Unmatched
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.sources.source import (
    Codes,
    Factor,
    MatrixSource,
    PlainMatrix,
    Source,
    Stored,
    match_source,
    refuse_nan,
)
from apertus_mlx.quant.float_formats import E4M3_NAN, E8M0_NAN
from apertus_mlx.quant.spec import QuantSpec


@dataclass(frozen=True, slots=True)
class MlxMatrix(MatrixSource):
    """A matrix in one of MLX's quantized formats."""

    spec: QuantSpec
    weight: TensorInfo
    scales: TensorInfo
    biases: TensorInfo | None
    # What the product is multiplied by or divided by (`output_scale`, `output_divisor`).
    factor: TensorInfo | None = None
    is_quantized: bool = True

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Codes, scales and, where there are, biases and a factor."""
        found = (self.weight, self.scales, self.biases, self.factor)
        return tuple(tensor for tensor in found if tensor is not None)

    @property
    def dtype(self) -> str:
        """Type of the scales; bfloat16 stands in for the 8-bit scales of the float formats."""
        return self.scales.dtype if self.spec.has_biases else "BF16"

    @property
    def stored(self) -> Stored:
        """Its own format."""
        if self.factor is None:
            return Stored(self.spec, self.scales.dtype)
        suffix = self.factor.name.rpartition(".")[2]
        factor = Factor(suffix, self.factor.dtype, self.factor.shape)
        return Stored(self.spec, self.scales.dtype, factor)

    def read(self, reader: Reader, start: int, stop: int, _nonfinite: bool = False) -> mx.array:
        """Rows in float32."""
        codes = self.read_codes(reader, start, stop)
        biases = None if codes.biases is None else codes.biases.astype(mx.float32)
        scales = codes.scales.astype(mx.float32) if self.spec.has_biases else codes.scales
        values = mx.dequantize(
            codes.weight,
            scales,
            biases,
            group_size=self.spec.group_size,
            bits=self.spec.bits,
            mode=self.spec.mode,
            dtype=mx.float32,
        )
        if self.factor is None:
            return values
        factor = self.read_factor(reader).astype(mx.float32)
        rows = factor[start:stop, None] if factor.size > 1 else factor
        return values / rows if self.factor.name.endswith(OUTPUT_DIVISOR) else values * rows

    def read_factor(self, reader: Reader) -> mx.array:
        """The factor, `[rows]` or `[1]`."""
        assert self.factor is not None
        return reader.floats(self.factor, 0, self.factor.shape[0])

    def read_codes(self, reader: Reader, start: int, stop: int) -> Codes:
        """Rows as they are stored."""
        weight = reader.rows(self.weight, start, stop)
        if self.biases is None:
            codes = Codes(weight, reader.rows(self.scales, start, stop))
            self._refuse_nan(codes)
            return codes
        scales = reader.floats(self.scales, start, stop)
        return Codes(weight, scales, reader.floats(self.biases, start, stop))

    def _refuse_nan(self, codes: Codes) -> None:
        """Float formats have bytes that mean NaN: one for scales, and one with a sign for codes."""
        scales = np.array(codes.scales)
        if self.spec.mode == "nvfp4":
            refuse_nan(self.scales, scales & 0x7F == E4M3_NAN)
        else:
            refuse_nan(self.scales, scales == E8M0_NAN)
        if self.spec.mode == "mxfp8":
            refuse_nan(self.weight, np.array(codes.weight).view(np.uint8) & 0x7F == E4M3_NAN)


def source(config: ModelConfig, tensors: Mapping[str, TensorInfo], name: str) -> Source:
    """Recognise an MLX folder, quantized wherever scales are stored and the config says how."""
    left = Unmatched(tensors, name)
    return match_source(
        "MLX", config, left, lambda matrix: _matrix(matrix, config, left), "quantized"
    )


def _matrix(matrix: Matrix, config: ModelConfig, left: Unmatched) -> MatrixSource:
    stored = match_matrix(matrix, config, left)
    if stored.spec is None:
        return PlainMatrix(stored.tensors[0])
    weight, scales, *biases = stored.tensors
    for tensor in biases:
        left.check(tensor.name, tensor, (scales.dtype,), tensor.shape)
    return MlxMatrix(stored.spec, weight, scales, biases[0] if biases else None, stored.factor)

"""What every source format says: for each tensor of the output, where it lies and how to read it.

These values are made from headers alone; only methods that take a `Reader` read arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Protocol

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.layout import Matrix
from apertus_mlx.checkpoint.matching import Unmatched
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.sizes import counted


@dataclass(frozen=True, slots=True)
class Factor:
    """A factor of the output rows for which MLX's format has no place, stored beside the codes.

    `output_scale` multiplies what the matrix product gives, `output_divisor` divides it; shape
    `[rows]` or `[1]`.
    """

    suffix: str
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Stored:
    """The MLX format in which a matrix's own codes can be kept."""

    spec: QuantSpec
    # safetensors type of scales and biases.
    scale_dtype: str
    factor: Factor | None = None
    # What keeping the codes loses, in words; None where it is exact.
    loss: str | None = None


@dataclass(frozen=True, slots=True)
class Codes:
    """Rows of a matrix in an MLX format: packed codes, scales, and biases where it has them."""

    weight: mx.array
    scales: mx.array
    biases: mx.array | None = None


class MatrixSource(Protocol):
    """How one weight matrix is stored; every format has a class of this kind."""

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The tensors that it is read from."""

    @property
    def dtype(self) -> str:
        """The safetensors type of its values, or of its scales where it is quantized."""

    @property
    def stored(self) -> Stored | None:
        """How its own codes can be kept; None where it is not quantized, or MLX has no form."""

    @property
    def is_quantized(self) -> bool:
        """Whether it holds codes instead of values."""

    @property
    def no_form(self) -> str:
        """Why codes have no form in MLX, where `stored` is None."""
        return "MLX has no form for these codes"

    def settled(self, _reader: Reader, /) -> MatrixSource:
        """The same matrix with what only its small tensors show, before anything is written.

        Raises:
            RejectedError: they contradict what else is known.
        """
        return self

    def read(self, reader: Reader, start: int, stop: int, _nonfinite: bool = False) -> mx.array:
        """Rows as floats `[stop - start, columns]`; `_nonfinite` lets NaN in values pass."""

    def read_codes(self, _reader: Reader, _start: int, _stop: int, /) -> Codes:
        """Rows from start to stop in the format `stored`."""
        raise AssertionError(f"{self} has no codes; the plan must not ask")

    def read_factor(self, _reader: Reader, /) -> mx.array:
        """The factor that `stored.factor` describes."""
        raise AssertionError(f"{self} has no factor; the plan must not ask")


@dataclass(frozen=True, slots=True)
class PlainMatrix(MatrixSource):
    """A matrix stored as bfloat16, float16 or float32 values."""

    tensor: TensorInfo
    stored: None = None
    is_quantized: bool = False

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """The one tensor."""
        return (self.tensor,)

    @property
    def dtype(self) -> str:
        """Type of the values."""
        return self.tensor.dtype

    def read(self, reader: Reader, start: int, stop: int, _nonfinite: bool = False) -> mx.array:
        """Rows as they are stored."""
        return reader.floats(self.tensor, start, stop, _nonfinite)


@dataclass(frozen=True, slots=True)
class Source:
    """A recognised checkpoint: every tensor of the output with what it is read from.

    Attributes:
        format: how people call the format.
        name: what error messages call the checkpoint.
        config: that of the output's model.
        layout: the weight matrices of that model, in its order.
        matrices: module path -> how the matrix is stored.
        vectors: tensor name -> where it lies; None where it is absent and has a known default.
        dropped: source tensor -> why it has no place in the output.
        tied: pairs of tensors, head and embedding, that must hold the same bytes.
    """

    format: str
    name: str
    config: ModelConfig
    layout: tuple[Matrix, ...]
    matrices: Mapping[str, MatrixSource]
    vectors: Mapping[str, TensorInfo | None]
    dropped: Mapping[str, str]
    tied: tuple[tuple[TensorInfo, TensorInfo], ...]

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix holds codes."""
        return any(matrix.is_quantized for matrix in self.matrices.values())

    def settled(self, reader: Reader) -> Source:
        """The same checkpoint with what only the small tensors of its matrices show.

        Raises:
            RejectedError: see `MatrixSource.settled`.
        """
        found = {path: matrix.settled(reader) for path, matrix in self.matrices.items()}
        return replace(self, matrices=found)


def refuse_nan(tensor: TensorInfo, broken: npt.NDArray[np.bool_]) -> None:
    """Refuse codes or scales of which some mean NaN."""
    if broken.any():
        raise RejectedError(
            f"{tensor.file}: {tensor.name}: "
            f"{counted(int(broken.sum()), 'value is', 'values are')} NaN; the checkpoint is "
            "damaged or its training diverged"
        )


def match_source(
    form: str,
    config: ModelConfig,
    left: Unmatched,
    match: Callable[[Matrix], MatrixSource],
    quantized_by: str | None = None,
) -> Source:
    """Match every tensor of the model `config` with what is stored.

    Args:
        form: how people call the format.
        config: that of the output's model.
        left: the tensors.
        match: takes the tensors of one weight matrix.
        quantized_by: what the config says of the weights, where it says that they are quantized.

    Raises:
        RejectedError: a tensor is missing or unexpected, or nothing is quantized.
    """
    tied = left.take_tied_head(config)
    found = left.matrices(config, match)
    vectors = left.vectors(config)
    left.refuse_rest()
    matrices = {matrix.path: source for matrix, source in found.items()}
    source = Source(form, left.name, config, tuple(found), matrices, vectors, left.dropped, tied)
    if quantized_by is not None and not source.is_quantized:
        raise RejectedError(f"{left.name}: the config says {quantized_by}, but no tensor is")
    return source

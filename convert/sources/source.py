"""What every source format offers: for each target tensor, where it lies and how to read it.

Values of these types are made from headers alone; arrays appear only when a `Reader` is passed.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Protocol

import mlx.core as mx

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.inventory import FLOAT_DTYPES, IGNORED_SUFFIX, XIELU_DEFAULTS
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import QuantSpec

MAX_NAMES_SHOWN = 10


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
    """How one weight matrix is stored."""

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

    def check(self, reader: Reader) -> None:
        """Refuse what only small tensors can show, before anything is written."""

    def read(self, reader: Reader, start: int, stop: int, allow_nonfinite: bool) -> mx.array:
        """Rows as floats `[stop - start, columns]`."""

    def read_codes(self, reader: Reader, start: int, stop: int) -> Codes:
        """Rows in the format `stored`."""

    def read_factor(self, reader: Reader) -> mx.array:
        """The factor that `stored.factor` describes."""


@dataclass(frozen=True, slots=True)
class PlainMatrix:
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

    def check(self, reader: Reader) -> None:
        """Nothing to check."""

    def read(self, reader: Reader, start: int, stop: int, allow_nonfinite: bool) -> mx.array:
        """Rows as they are stored."""
        return reader.floats(self.tensor, start, stop, allow_nonfinite)

    def read_codes(self, *_: object, **__: object) -> Codes:
        """There are none."""
        raise AssertionError(f"{self} has nothing of the kind; the plan must not ask")

    def read_factor(self, *_: object, **__: object) -> mx.array:
        """There is none."""
        raise AssertionError(f"{self} has nothing of the kind; the plan must not ask")


@dataclass(frozen=True, slots=True)
class Source:
    """A recognised checkpoint: every target tensor with what it is read from."""

    format: str
    name: str
    config: ModelConfig
    matrices: Mapping[str, MatrixSource]
    # Tensor name -> where it lies, None where it is absent and has a known default.
    vectors: Mapping[str, TensorInfo | None]
    # Source tensor -> why it has no place in the output.
    dropped: Mapping[str, str] = field(default_factory=dict)
    notes: tuple[str, ...] = ()
    # Head and embedding that must hold the same bytes, because the config ties them.
    tied_pair: tuple[TensorInfo, TensorInfo] | None = None

    @property
    def is_quantized(self) -> bool:
        """Whether any matrix holds codes."""
        return any(matrix.is_quantized for matrix in self.matrices.values())


class Tensors:
    """The tensors of a checkpoint under their target names, and the account of which were used."""

    def __init__(self, tensors: Mapping[str, TensorInfo], name: str, prefix: str = "") -> None:
        self.name = name
        self.dropped: dict[str, str] = {}
        self._left: dict[str, TensorInfo] = {}
        for key, tensor in tensors.items():
            inner = prefix and key.startswith(prefix)
            self._left["model." + key.removeprefix(prefix) if inner else key] = tensor

    def __contains__(self, key: str) -> bool:
        return key in self._left

    def take(self, key: str) -> TensorInfo | None:
        """The tensor called `key`, which then counts as used; None where there is none."""
        return self._left.pop(key, None)

    def peek(self, key: str) -> TensorInfo:
        """The tensor called `key`, which stays unused for now."""
        if key not in self._left:
            raise RejectedError(f"{self.name}: {key}: missing")
        return self._left[key]

    def need(self, key: str, dtypes: Iterable[str], shape: tuple[int, ...]) -> TensorInfo:
        """The tensor called `key`, of one of `dtypes` and of `shape`."""
        tensor = self._left.get(key)
        if tensor is None:
            raise RejectedError(f"{self.name}: {key}: missing")
        self.check(key, tensor, dtypes, shape)
        del self._left[key]
        return tensor

    def check(
        self, key: str, tensor: TensorInfo, dtypes: Iterable[str], shape: tuple[int, ...]
    ) -> None:
        """Refuse a tensor of another type or shape."""
        same = tensor.shape == shape or (len(shape) < 2 and {tensor.shape, shape} == {(), (1,)})
        if not same:
            raise RejectedError(
                f"{self.name}: {key}: shape {list(tensor.shape)}, the config says {list(shape)}"
            )
        if tensor.dtype not in dtypes:
            raise RejectedError(
                f"{self.name}: {key}: type {tensor.dtype}, expected {' or '.join(dtypes)}"
            )

    def drop(self, key: str, reason: str) -> None:
        """Leave a tensor out of the output."""
        if self._left.pop(key, None) is not None:
            self.dropped[key] = reason

    def drop_where(self, prefixes: tuple[str, ...], reason: str) -> None:
        """Leave out all tensors whose names start so."""
        for key in [key for key in self._left if key.startswith(prefixes)]:
            self.drop(key, reason)

    def vectors(self, config: ModelConfig) -> dict[str, TensorInfo | None]:
        """Norms and xIELU parameters; None for the constants that some exporters leave out."""
        self._report_missing(config)
        found: dict[str, TensorInfo | None] = {}
        for key, shape in layout.vectors(config):
            if key not in self._left and key.rsplit(".", 1)[-1] in XIELU_DEFAULTS:
                found[key] = None
            else:
                found[key] = self.need(key, FLOAT_DTYPES, shape)
        return found

    def refuse_left(self) -> None:
        """Refuse what nothing has used, apart from buffers that follow from the config."""
        for key in [key for key in self._left if key.endswith(IGNORED_SUFFIX)]:
            self.drop(key, "derived from the config")
        if self._left:
            raise RejectedError(f"{self.name}: unexpected {listed(sorted(self._left))}")

    def take_tied_head(self) -> tuple[TensorInfo, TensorInfo] | None:
        """The stored head of a model with tied embeddings and its embedding, unquantized both.

        Call it before the embedding is taken.
        """
        head = self._left.get(f"{layout.HEAD}.weight")
        if head is None:
            return None
        embedding = self._left.get(f"{layout.EMBEDDING}.weight")
        if embedding is None or (embedding.dtype, embedding.shape) != (head.dtype, head.shape):
            raise RejectedError(
                f"{self.name}: {layout.HEAD}.weight: stored beside tied embeddings of another form"
            )
        self.drop(f"{layout.HEAD}.weight", "equal to the tied embedding")
        return head, embedding

    def _report_missing(self, config: ModelConfig) -> None:
        missing = [
            key
            for key, _ in layout.vectors(config)
            if key not in self._left and key.rsplit(".", 1)[-1] not in XIELU_DEFAULTS
        ]
        if missing:
            raise RejectedError(f"{self.name}: missing {listed(sorted(missing))}")


def listed(names: list[str]) -> str:
    """A count and the first names, for error messages."""
    shown = ", ".join(name[:80] for name in names[:MAX_NAMES_SHOWN])
    more = len(names) - MAX_NAMES_SHOWN
    what = "tensor" if len(names) == 1 else f"{len(names)} tensors:"
    return f"{what} {shown}" + (f" and {more} more" if more > 0 else "")

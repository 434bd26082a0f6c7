"""A plan: every output tensor with its sources, transform, format, bytes and place.

`planning` makes a plan; `execute` follows it and decides nothing.
"""

from __future__ import annotations

import hashlib
import json
import math
from dataclasses import dataclass
from typing import Any, Literal

from apertus_mlx.backend.hardware import has_gpu
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.convert.distill.resources import Resources
from apertus_mlx.convert.distill.student import Trained
from apertus_mlx.convert.plan.policy import Method, Request
from apertus_mlx.convert.plan.writing_memory import writing_memory_bytes
from apertus_mlx.convert.sources.reading import BLOCK_BYTES, block_rows
from apertus_mlx.convert.sources.source import Factor, MatrixSource, Source
from apertus_mlx.convert.transforms import names as transforms
from apertus_mlx.quant.affine import ScaleType
from apertus_mlx.quant.grid import Kind
from apertus_mlx.quant.spec import QuantSpec

DTYPE_BYTES = {"U32": 4, "F32": 4, "BF16": 2, "F16": 2, "U8": 1}
CONFIG_DTYPES: dict[str, ScaleType] = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
DTYPE_NAMES = {value: key for key, value in CONFIG_DTYPES.items()}
# Interpreter and libraries; bytes that checking a tokenizer takes per byte of its file; copies of a
# block in memory. Measured on Linux.
BASE_MEMORY_BYTES = 48_000_000
TOKENIZER_COPIES = 33
BLOCK_COPIES = 4
# Of the 8B; for a source on the Hub.
TYPICAL_TOKENIZER_BYTES = 16_000_000

# Of a window of the text for calibration, and most of all of them.
WINDOW_TOKENS = 512
CALIBRATION_TOKENS = 128 * WINDOW_TOKENS
# Tokens that are tuned on at once, or one window.
TUNING_TOKENS = 1024
# Up to so many columns calibration finds scales group by group. That takes a second factor; and
# where there are more columns, they differ more in importance.
GROUPWISE_COLUMNS = 4096
# Up to so many bits calibration searches for codes beyond the nearest minimum, which takes longer.
# With 3 they fit the text they are calibrated on more closely, and other text no better.
ANNEALED_BITS = 2
# Models of more weights tune scales, biases and norms alone: codes that learn take twelve to
# sixteen times the memory of codes that stay.
CODES_LEARN_UP_TO = 1 << 28
# Tokens to calibrate and to learn codes from, more than are taken from a text; the original writes
# the rest. On validation text the embedded model at 2 bits diverged by 0.0112 after 8 epochs on so
# many and by 0.0116 after 4; on half as many by 0.0115, and without text of its own by 0.0244.
CODES_LEARN_FROM = 1 << 17

Transform = Literal[
    "copy",  # values in their own type
    "cast",  # values rounded to the output's float type
    "quantize",  # values become codes
    "grid",  # values lie on a quantization grid: exactly their codes are found
    "keep",  # codes stay, as the source has them
    "dequantize",  # codes become values
    "requantize",  # codes become values, and these become other codes
    "fill",  # a constant that the source leaves out gets its default
]


@dataclass(frozen=True, slots=True)
class OutputTensor:
    """One tensor of the output: `size_bytes` at `offset` of the data of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str = ""
    offset: int = 0

    @property
    def size_bytes(self) -> int:
        """Exact size."""
        return DTYPE_BYTES[self.dtype] * math.prod(self.shape)


@dataclass(frozen=True, slots=True)
class Step:
    """What is done to produce the tensors of one module or vector."""

    path: str
    transform: Transform
    outputs: tuple[OutputTensor, ...]
    dtype: ScaleType
    spec: QuantSpec | None = None
    matrix: MatrixSource | None = None
    vector: TensorInfo | None = None
    # The grid on which the source's values lie, where the transform is `grid`.
    grid: Kind | None = None
    # Why it stays unquantized although quantization was asked for.
    reason: str | None = None
    # What is lost, in words; None where nothing is, or where the loss is what was asked for.
    loss: str | None = None
    # How new codes are found.
    method: Method = "rtn"
    # Whether rotation or smoothing changes its values (`transforms`).
    changes_basis: bool = False

    @property
    def source_tensors(self) -> tuple[TensorInfo, ...]:
        """What is read."""
        if self.matrix is not None:
            return self.matrix.tensors
        return (self.vector,) if self.vector is not None else ()

    @property
    def source_bytes(self) -> int:
        """Bytes that are read."""
        return sum(tensor.size_bytes for tensor in self.source_tensors)

    @property
    def columns(self) -> int:
        """Weights in a row of a matrix."""
        width = self.outputs[0].shape[1]
        return width * 32 // self.spec.bits if self.spec else width

    @property
    def block_rows(self) -> int:
        """Rows that are processed at once."""
        rows = self.outputs[0].shape[0]
        per_value = 2
        if self.matrix is not None and self.matrix.is_quantized:
            per_value = 8  # codes are unpacked and scaled in 32 bits
        if self.grid is not None:
            per_value = 32  # the search takes several float64 copies
        return min(rows, block_rows(max(self.source_bytes // rows, per_value * self.columns)))

    @property
    def factor(self) -> Factor | None:
        """The factor that is stored beside kept codes, if they need one."""
        if self.transform != "keep" or self.matrix is None or self.matrix.stored is None:
            return None
        return self.matrix.stored.factor

    @property
    def memory_bytes(self) -> int:
        """Estimate of what its blocks take."""
        if self.matrix is None:
            return 4 * self.source_bytes
        if self.changes_basis:
            return 3 * 4 * self.outputs[0].shape[0] * self.columns
        return BLOCK_COPIES * min(BLOCK_BYTES, self.source_bytes)

    @property
    def size_bytes(self) -> int:
        """Bytes that are written."""
        return sum(tensor.size_bytes for tensor in self.outputs)


def calibration_memory_bytes(config: ModelConfig, tune: bool = False) -> int:
    """Estimate of what calibration takes: two layers, two streams, moments and their factor.

    With `tune` the original writes more text where codes learn.
    """
    learns = tune and trained_by_tuning(config) == "weights"
    tokens = max(CALIBRATION_TOKENS, CODES_LEARN_FROM) if learns else CALIBRATION_TOKENS
    hidden, inner = config.hidden_size, config.intermediate_size
    queries = config.num_attention_heads * config.head_dim
    keys = config.num_key_value_heads * config.head_dim
    layer = 2 * hidden * (queries + keys + inner)
    streams = 2 * tokens * (hidden + queries)
    widest = max(hidden, inner, queries)
    # Moments, factor and what is missing, or a second factor too; and what fits 2,048 rows.
    squares = max(3 * widest**2, 4 * min(widest, GROUPWISE_COLUMNS) ** 2)
    moments = squares + (16 if has_gpu() else 12) * min(2048, hidden) * widest
    # A table, a byte for each of its codes, and what fits 2,048 rows; the heads that are compared.
    table = config.vocab_size * hidden
    # MLX's copy of the second is there before NumPy's is let go.
    compared = (3 if has_gpu() else 2) * table
    embedding = max(5 * table // 4 + 12 * min(2048, config.vocab_size) * hidden, compared)
    return 4 * (max(2 * layer + moments, embedding) + streams)


def tuning_memory_bytes(config: ModelConfig) -> int:
    """Estimate of what `--tune` takes: the training, or writing text for it where that is more."""
    trained = trained_by_tuning(config)
    training = Resources(config, trained, WINDOW_TOKENS, TUNING_TOKENS).memory_bytes
    writing = writing_memory_bytes(config, WINDOW_TOKENS) if trained == "weights" else 0
    return max(training, writing)


def trained_by_tuning(config: ModelConfig) -> Trained:
    """What `--tune` trains in a model of this size."""
    return "weights" if layout.parameter_count(config) <= CODES_LEARN_UP_TO else "scales"


@dataclass(frozen=True, slots=True)
class OutputFile:
    """A shard: its header as it will be written, and the size of what follows."""

    name: str
    header: bytes
    data_bytes: int

    @property
    def size_bytes(self) -> int:
        """Size of the whole file."""
        return len(self.header) + self.data_bytes


@dataclass(frozen=True, slots=True)
class Plan:
    """Everything that a conversion will do.

    Attributes:
        dtype: the type of everything that is not codes; new scales and biases are rounded to it.
    """

    source: Source
    request: Request
    dtype: ScaleType
    steps: tuple[Step, ...]
    files: tuple[OutputFile, ...]
    notes: tuple[str, ...]
    tokenizer_bytes: int

    @property
    def weight_bytes(self) -> int:
        """Bytes of all output tensors."""
        return sum(step.size_bytes for step in self.steps)

    @property
    def source_bytes(self) -> int:
        """Bytes that will be read."""
        return sum(step.source_bytes for step in self.steps)

    @property
    def parameters(self) -> int:
        """Parameters of the model, xIELU's scalars not counted."""
        return layout.parameter_count(self.source.config)

    @property
    def bits_per_weight(self) -> float:
        """Bits per parameter with everything that is stored."""
        return 8 * self.weight_bytes / self.parameters

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """Module path -> format, for the quantized modules of the output."""
        return {step.path: step.spec for step in self.steps if step.spec is not None}

    @property
    def annealed(self) -> frozenset[str]:
        """Matrices whose codes calibration searches for beyond the nearest minimum."""
        calibrated = (step for step in self.steps if step.method == "gptq")
        return frozenset(s.path for s in calibrated if s.spec and s.spec.bits <= ANNEALED_BITS)

    @property
    def calibrates(self) -> bool:
        """Whether it needs texts."""
        return self.request.smooth or any(step.method == "gptq" for step in self.steps)

    @property
    def peak_memory_bytes(self) -> int:
        """Estimate of the most memory that execution will hold."""
        widest = max((step.memory_bytes for step in self.steps), default=0)
        fixed = BASE_MEMORY_BYTES + TOKENIZER_COPIES * self.tokenizer_bytes
        return fixed + max(widest, self.calibration_memory_bytes, self.tuning_memory_bytes)

    @property
    def calibration_memory_bytes(self) -> int:
        """What calibration adds to that which every conversion takes."""
        if not self.calibrates:
            return 0
        return calibration_memory_bytes(self.source.config, self.request.tune)

    @property
    def tuning_memory_bytes(self) -> int:
        """The same of `--tune`: of training, or of writing text for it."""
        return tuning_memory_bytes(self.source.config) if self.request.tune else 0

    def fingerprint(self) -> str:
        """Identifies what will be written; equal fingerprints give equal bytes."""
        parts: list[Any] = [
            [step.path, step.transform, step.grid, step.method, str(step.spec), step.dtype]
            for step in self.steps
        ]
        parts += [[file.name, file.header.hex()] for file in self.files]
        parts.append(transforms.record(self.request, self.source.config))
        if self.request.tune:
            parts.append("tuned")
        return hashlib.sha256(json.dumps(parts).encode()).hexdigest()

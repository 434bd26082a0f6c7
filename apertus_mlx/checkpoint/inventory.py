"""What a checkpoint holds: each part of the model with its tensors, from config and headers alone.

The inventory of a folder and that of a repository on the Hub (`hub.fetch_headers`) are one type.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig, read_config
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.matching import FLOAT_DTYPES, Unmatched, without_left_over
from apertus_mlx.checkpoint.quantization_block import CONVERTIBLE, unread
from apertus_mlx.checkpoint.slopes import check_slopes
from apertus_mlx.checkpoint.tensors import Checkpoint, open_checkpoint
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import QuantSpec

# Factors of a whole matrix or of each row, where the codes' own format has no place for them: the
# product is multiplied by the one and divided by the other.
OUTPUT_SCALE, OUTPUT_DIVISOR = "output_scale", "output_divisor"
TOKENIZER_FILE = "tokenizer.json"


@dataclass(frozen=True, slots=True)
class StoredMatrix(layout.Matrix):
    """A weight matrix with its format and the tensors that hold it.

    Attributes:
        spec: its quantized format; None where it is stored as floats.
        tensors: the weight; for a quantized matrix also scales and, in affine formats, biases.
        factor: what the product is multiplied by or divided by, where something is stored.
    """

    spec: QuantSpec | None
    tensors: tuple[TensorInfo, ...]
    factor: TensorInfo | None = None

    def weight_bytes(self, float_bytes: int) -> int:
        """Bytes in memory where each float, and each scale and bias, takes `float_bytes`."""
        if self.spec is None:
            return self.rows * self.columns * float_bytes
        return self.spec.weight_bytes(self.rows, self.columns, float_bytes)


@dataclass(frozen=True, slots=True)
class Part:
    """What one of several machines holds of a checkpoint.

    Attributes:
        rank: which of them it is, from 0 on.
        ranks: how many there are.
        layers: those that it holds whole; None: a share of every layer.
    """

    rank: int
    ranks: int
    layers: range | None = None

    def __str__(self) -> str:
        share = "a share of each layer"
        if self.layers is not None:
            share = f"layers {self.layers.start} to {self.layers[-1]}"
        return f"rank {self.rank} of {self.ranks} with {share}"


@dataclass(frozen=True)
class Inventory:
    """A checkpoint whose tensors match its config.

    Attributes:
        part: where only that is here, which it is; config, matrices and vectors are those of it.
        matrices: each weight matrix by its module path, in the model's order.
        vectors: norms and xIELU parameters by name; None for a constant that is not stored.
        dropped: tensors that are in the files but not in the model, and why.
        tied: pairs of tensors, head and embedding, that must hold the same bytes.
        tokenizer_bytes: size of the tokenizer's file; None where only headers were read.
    """

    config: ModelConfig
    checkpoint: Checkpoint
    matrices: Mapping[str, StoredMatrix]
    vectors: Mapping[str, TensorInfo | None]
    dropped: Mapping[str, str]
    tied: tuple[tuple[TensorInfo, TensorInfo], ...] = ()
    tokenizer_bytes: int | None = None
    part: Part | None = None

    @property
    def name(self) -> str:
        """What error messages call the checkpoint."""
        return self.checkpoint.name

    @property
    def specs(self) -> dict[str, QuantSpec]:
        """Module path -> format, for the quantized matrices."""
        return {path: m.spec for path, m in self.matrices.items() if m.spec is not None}

    @property
    def factors(self) -> dict[str, TensorInfo]:
        """Module path -> the factor of its product, for the few that have one."""
        return {path: m.factor for path, m in self.matrices.items() if m.factor is not None}

    @cached_property
    def code_bytes(self) -> int:
        """Bytes of all that is no float: codes, and scales of formats that have a byte for each."""
        return sum(matrix.weight_bytes(0) for matrix in self.matrices.values())

    @cached_property
    def floats(self) -> int:
        """How many floats there are: weights, scales and biases, norms, parameters of xIELU."""
        in_matrices = sum(matrix.weight_bytes(1) for matrix in self.matrices.values())
        vectors = sum(math.prod(shape) for _, shape in layout.vectors(self.config))
        return in_matrices - self.code_bytes + vectors

    @property
    def float_dtypes(self) -> set[str]:
        """The safetensors types of all floats in matrices, scales and biases included."""
        tensors = [tensor for matrix in self.matrices.values() for tensor in matrix.tensors]
        return {tensor.dtype for tensor in tensors if tensor.dtype in FLOAT_DTYPES}

    @property
    def stored_bytes(self) -> int:
        """Bytes of all tensors that belong to the model."""
        dropped = sum(self.checkpoint.tensors[key].size_bytes for key in self.dropped)
        return self.checkpoint.size_bytes - dropped

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Tensor name -> shape in the model, for everything that is loaded."""
        found = {t.name: t.shape for m in self.matrices.values() for t in m.tensors}
        first = self.part.layers.start if self.part and self.part.layers else 0
        found.update(layout.vectors(self.config, first))
        found.update((tensor.name, tensor.shape) for tensor in self.factors.values())
        return found


def take_inventory(directory: Path, name: str | None = None) -> Inventory:
    """The inventory of a folder, from headers, xIELU's constants and a tied head alone.

    `name` is what error messages call it, if not by its path.

    Raises:
        NotFoundError: there is no such folder.
        RejectedError: a tensor is missing, unexpected, or of another shape or type than the config
            says; the weights are in a format that has to be converted first; or a constant of xIELU
            is such that float32 cannot compute with it.
    """
    config = read_config(directory)
    checkpoint = open_checkpoint(directory)
    if name is not None:
        checkpoint = replace(checkpoint, name=name)
    inventory = match_inventory(config, checkpoint)
    for head, embedding in inventory.tied:
        if not checkpoint.same_bytes(head, embedding):
            raise RejectedError(
                f"{checkpoint.name}: {head.name} differs from the embedding, "
                "but tie_word_embeddings is true"
            )
    check_slopes(checkpoint)
    tokenizer = directory / TOKENIZER_FILE
    size_bytes = tokenizer.stat().st_size if tokenizer.is_file() else 0
    return replace(inventory, tokenizer_bytes=size_bytes)


def match_inventory(config: ModelConfig, checkpoint: Checkpoint) -> Inventory:
    """Match the tensors of `checkpoint` with `config`; opens no file.

    Raises:
        RejectedError: see `take_inventory`.
    """
    name = checkpoint.name
    config = without_left_over(config, checkpoint.tensors)
    if config.foreign_quantization is not None:
        method = config.foreign_quantization[0]
        if method not in CONVERTIBLE:
            raise unread(name, method)
        raise RejectedError(
            f"{name}: weights are quantized by {method!r}; convert them first: apertus-mlx convert"
        )
    if config.family != "apertus":
        raise RejectedError(
            f"{name}: Apertus 1.5 is multimodal; extract its text part: apertus-mlx convert"
        )
    left = Unmatched(checkpoint.tensors, name)
    tied = left.take_tied_head(config)
    found = left.matrices(config, lambda matrix: match_matrix(matrix, config, left))
    if config.quantization is not None and not any(matrix.spec for matrix in found.values()):
        raise RejectedError(f"{name}: the config says quantized, but no tensor is")
    matrices = {matrix.path: stored for matrix, stored in found.items()}
    vectors = left.vectors(config)
    left.refuse_rest()
    return Inventory(config, checkpoint, matrices, vectors, left.dropped, tied)


def match_matrix(matrix: layout.Matrix, config: ModelConfig, left: Unmatched) -> StoredMatrix:
    """Take the tensors of a matrix: in MLX's formats where scales are stored, else as floats.

    Raises:
        RejectedError: a tensor is missing or of another shape or type than the config says.
    """
    path, rows, columns = matrix.path, matrix.rows, matrix.columns
    spec = config.quantization.spec_for(path) if config.quantization else None
    if f"{path}.scales" not in left:
        if spec is not None and left.peek(matrix.weight).dtype == "U32":
            raise RejectedError(f"{left.name}: {path}.scales: missing")
        weight = left.need(matrix.weight, FLOAT_DTYPES, (rows, columns))
        return StoredMatrix(path, rows, columns, None, (weight,))
    if spec is None:
        raise RejectedError(
            f"{left.name}: {path} is quantized, but the config's quantization does not say so"
        )
    if not spec.fits(columns):
        raise RejectedError(f"{left.name}: {path}: {columns} columns do not divide into {spec}")
    groups = (rows, spec.groups(columns))
    weight = left.need(matrix.weight, ("U32",), (rows, spec.packed_columns(columns)))
    scales = left.need(f"{path}.scales", FLOAT_DTYPES if spec.has_biases else ("U8",), groups)
    tensors: tuple[TensorInfo, ...] = (weight, scales)
    if spec.has_biases:
        tensors += (left.need(f"{path}.biases", FLOAT_DTYPES, groups),)
    factor = None if path == layout.EMBEDDING else _factor(matrix, left)
    return StoredMatrix(path, rows, columns, spec, tensors, factor)


def _factor(matrix: layout.Matrix, left: Unmatched) -> TensorInfo | None:
    found = [left.take(f"{matrix.path}.{kind}") for kind in (OUTPUT_SCALE, OUTPUT_DIVISOR)]
    factors = [tensor for tensor in found if tensor is not None]
    if not factors:
        return None
    if len(factors) > 1:
        raise RejectedError(f"{left.name}: {matrix.path} has both a scale and a divisor")
    factor = factors[0]
    one_for_all = factor.shape == (1,)
    left.check(factor.name, factor, FLOAT_DTYPES, (1,) if one_for_all else (matrix.rows,))
    return factor

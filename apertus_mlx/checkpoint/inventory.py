"""Matches a checkpoint's tensors with its config: names, shapes and types, from headers alone."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.config import ModelConfig, read_config
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.slopes import check_slopes
from apertus_mlx.checkpoint.tensors import Checkpoint, open_checkpoint
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.model_files import open_file

FLOAT_DTYPES = ("BF16", "F16", "F32")
# What stands in for xIELU constants that some exporters leave out.
XIELU_DEFAULTS = {"beta": 0.5, "eps": -1e-6}
# Factors of a whole matrix or of each row, where the codes' own format has no place for them: the
# product is multiplied by the one and divided by the other.
OUTPUT_SCALE, OUTPUT_DIVISOR = "output_scale", "output_divisor"
# Buffers that Hugging Face models may carry and that are derived from the config.
IGNORED_SUFFIX = "rotary_emb.inv_freq"
MAX_NAMES_SHOWN = 10
COMPARE_BLOCK_BYTES = 2**22


@dataclass(frozen=True, slots=True)
class Inventory:
    """A checkpoint whose tensors match its config: what the loader will read."""

    config: ModelConfig
    checkpoint: Checkpoint
    # Module path -> format, for the quantized ones.
    specs: dict[str, QuantSpec]
    # Tensors that are in the files but not in the model, and why.
    dropped: dict[str, str]
    # Module path -> the factor of its product, for the few that have one.
    factors: dict[str, TensorInfo]


def take_inventory(directory: Path) -> Inventory:
    """Match the tensors of `directory` with its config, from headers and xIELU's constants alone.

    Raises:
        RejectedError: a tensor is missing, unexpected, or of another shape or type than the config
            says; the weights are in a format that has to be converted first; or a constant of xIELU
            is such that float32 cannot compute with it.
    """
    config = read_config(directory)
    checkpoint = open_checkpoint(directory)
    name = str(directory)
    if config.foreign_quantization is not None:
        raise RejectedError(
            f"{name}: weights are quantized by {config.foreign_quantization[0]!r}; "
            "convert them first: apertus-mlx convert"
        )
    if config.family != "apertus":
        raise RejectedError(
            f"{name}: Apertus 1.5 is multimodal; extract its text part: apertus-mlx convert"
        )
    specs = _read_specs(config, checkpoint, name)
    factors = _read_factors(config, specs, checkpoint, name)
    expected = dict(expected_tensors(config, specs))
    expected.update({f.name: (FLOAT_DTYPES, f.shape) for f in factors.values()})
    dropped = _unused_tensors(config, checkpoint, expected, name)
    optional = {key for key in expected if key.rsplit(".", 1)[-1] in XIELU_DEFAULTS}
    missing = sorted(expected.keys() - checkpoint.tensors.keys() - optional)
    if missing:
        raise RejectedError(f"{name}: missing {_listed(missing)}")
    for key, (dtypes, shape) in expected.items():
        tensor = checkpoint.tensors.get(key)
        if tensor is None:
            continue
        same = tensor.shape == shape or (len(shape) < 2 and {tensor.shape, shape} == {(), (1,)})
        if not same:
            raise RejectedError(
                f"{name}: {key}: shape {list(tensor.shape)}, the config says {list(shape)}"
            )
        if tensor.dtype not in dtypes:
            raise RejectedError(
                f"{name}: {key}: type {tensor.dtype}, expected {' or '.join(dtypes)}"
            )
    check_slopes(checkpoint)
    return Inventory(config, checkpoint, specs, dropped, factors)


def _read_specs(config: ModelConfig, checkpoint: Checkpoint, name: str) -> dict[str, QuantSpec]:
    """The format of each quantized matrix: those that have scales, as the config says."""
    specs = {}
    for matrix in layout.matrices(config):
        has_scales = f"{matrix.path}.scales" in checkpoint.tensors
        spec = config.quantization.spec_for(matrix.path) if config.quantization else None
        if not has_scales:
            tensor = checkpoint.tensors.get(matrix.weight)
            if spec is not None and tensor is not None and tensor.dtype == "U32":
                raise RejectedError(f"{name}: {matrix.path}.scales: missing")
            continue
        if spec is None:
            raise RejectedError(
                f"{name}: {matrix.path} is quantized, but the config's quantization does not say so"
            )
        if not spec.fits(matrix.columns):
            raise RejectedError(
                f"{name}: {matrix.path}: {matrix.columns} columns do not divide into {spec}"
            )
        specs[matrix.path] = spec
    if config.quantization is not None and not specs:
        raise RejectedError(f"{name}: the config says quantized, but no tensor is")
    return specs


def _read_factors(
    config: ModelConfig, specs: dict[str, QuantSpec], checkpoint: Checkpoint, name: str
) -> dict[str, TensorInfo]:
    factors = {}
    for matrix in layout.matrices(config):
        if matrix.path not in specs or matrix.path == layout.EMBEDDING:
            continue
        for suffix in (OUTPUT_SCALE, OUTPUT_DIVISOR):
            tensor = checkpoint.tensors.get(f"{matrix.path}.{suffix}")
            if tensor is None:
                continue
            if matrix.path in factors:
                raise RejectedError(f"{name}: {matrix.path} has both a scale and a divisor")
            if tensor.shape not in ((1,), (matrix.rows,)):
                raise RejectedError(
                    f"{name}: {tensor.name}: shape {list(tensor.shape)}, expected [1] or "
                    f"[{matrix.rows}]"
                )
            factors[matrix.path] = tensor
    return factors


def expected_tensors(
    config: ModelConfig, specs: dict[str, QuantSpec]
) -> Iterator[tuple[str, tuple[tuple[str, ...], tuple[int, ...]]]]:
    """Each tensor's name with the types and the shape that it may have."""
    for matrix in layout.matrices(config):
        spec = specs.get(matrix.path)
        if spec is None:
            yield matrix.weight, (FLOAT_DTYPES, (matrix.rows, matrix.columns))
            continue
        groups = (matrix.rows, spec.groups(matrix.columns))
        yield matrix.weight, (("U32",), (matrix.rows, spec.packed_columns(matrix.columns)))
        yield f"{matrix.path}.scales", (FLOAT_DTYPES if spec.has_biases else ("U8",), groups)
        if spec.has_biases:
            yield f"{matrix.path}.biases", (FLOAT_DTYPES, groups)
    for key, shape in layout.vectors(config):
        yield key, (FLOAT_DTYPES, shape)


def _unused_tensors(
    config: ModelConfig,
    checkpoint: Checkpoint,
    expected: dict[str, Any],
    name: str,
) -> dict[str, str]:
    dropped = {}
    unexpected = []
    for key in sorted(checkpoint.tensors.keys() - expected.keys()):
        if key.endswith(IGNORED_SUFFIX):
            dropped[key] = "derived from the config"
        elif config.tie_word_embeddings and key.startswith(f"{layout.HEAD}."):
            _require_equal_head(checkpoint, key, name)
            dropped[key] = "equal to the tied embedding"
        else:
            unexpected.append(key)
    if unexpected:
        raise RejectedError(f"{name}: unexpected {_listed(unexpected)}")
    return dropped


def _require_equal_head(checkpoint: Checkpoint, key: str, name: str) -> None:
    """Some exporters store the tied head as well; it must be the embedding, byte for byte."""
    head = checkpoint.tensors[key]
    tied = checkpoint.tensors.get(key.replace(layout.HEAD, layout.EMBEDDING, 1))
    if tied is None or (tied.dtype, tied.shape) != (head.dtype, head.shape):
        raise RejectedError(f"{name}: {key}: stored beside tied embeddings of another form")
    if not _same_bytes(checkpoint, head.name, tied.name):
        raise RejectedError(
            f"{name}: {key} differs from the embedding, but tie_word_embeddings is true"
        )


def _same_bytes(checkpoint: Checkpoint, first: str, second: str) -> bool:
    a, b = checkpoint.tensors[first], checkpoint.tensors[second]
    with open_file(checkpoint.path(a)) as file_a, open_file(checkpoint.path(b)) as file_b:
        file_a.seek(a.offset)
        file_b.seek(b.offset)
        left = a.size_bytes
        while left > 0:
            size = min(COMPARE_BLOCK_BYTES, left)
            if file_a.read(size) != file_b.read(size):
                return False
            left -= size
    return True


def _listed(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:MAX_NAMES_SHOWN])
    more = len(names) - MAX_NAMES_SHOWN
    return f"{len(names)} tensors: {shown}" + (f" and {more} more" if more > 0 else "")

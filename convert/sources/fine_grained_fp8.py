"""The `fp8` method of transformers (and of DeepSeek): E4M3 with a scale per block of weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.layout import Matrix
from apertus_mlx.checkpoint.matching import Unmatched
from apertus_mlx.convert.sources.hugging_face import open_tensors, plain_matrix
from apertus_mlx.convert.sources.scaled_floats import float8_blocks
from apertus_mlx.convert.sources.source import MatrixSource, Source, match_source
from apertus_mlx.errors import RejectedError

SCALE = "weight_scale_inv"  # what the values are multiplied by, despite its name


def source(
    config: ModelConfig, block: Mapping[str, Any], tensors: Mapping[str, TensorInfo], name: str
) -> Source:
    """Recognise a checkpoint with one scale per block.

    Raises:
        RejectedError: no block size, or tensors that do not fit it.
    """
    size = block.get("weight_block_size")
    if not isinstance(size, list) or [type(n) for n in size] != [int, int] or min(size) < 1:
        raise RejectedError(
            f"{name}: quantization_config: weight_block_size: {str(size)[:40]}: expected the rows "
            "and columns that share a scale; other 8-bit floats are read as compressed-tensors"
        )
    left = open_tensors(config, tensors, name)
    target = replace(config, family="apertus", foreign_quantization=None)
    blocks = (size[0], size[1])
    return match_source(
        "fp8 in blocks", target, left, lambda matrix: _matrix(matrix, left, blocks), "fp8"
    )


def _matrix(matrix: Matrix, left: Unmatched, block: tuple[int, int]) -> MatrixSource:
    if f"{matrix.path}.{SCALE}" not in left:
        return plain_matrix(matrix, left)
    return float8_blocks(matrix, left, SCALE, block)

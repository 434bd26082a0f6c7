"""Decides, from config and headers, which format a checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.matching import without_left_over
from apertus_mlx.checkpoint.quantization_block import unread
from apertus_mlx.convert.sources import (
    auto_round,
    compressed_tensors,
    fine_grained_fp8,
    gptq_awq,
    hugging_face,
    mlx,
)
from apertus_mlx.convert.sources.source import Source


def recognise(
    config: ModelConfig,
    tensors: Mapping[str, TensorInfo],
    name: str,
    untied_head: bool = False,
) -> Source:
    """The source that `config` and the headers describe.

    Raises:
        RejectedError: a format that is not read, or tensors that contradict the config.
    """
    config = without_left_over(config, tensors)
    if config.foreign_quantization is not None:
        method, block = config.foreign_quantization
        if method == "compressed-tensors":
            return compressed_tensors.source(config, block, tensors, name)
        if method in ("gptq", "awq"):
            return gptq_awq.source(config, method, block, tensors, name)
        if method == "auto-round":
            return auto_round.source(config, block, tensors, name)
        if method == "fp8":
            return fine_grained_fp8.source(config, block, tensors, name)
        raise unread(name, method)
    if config.quantization is not None:
        return mlx.source(config, tensors, name)
    return hugging_face.source(config, tensors, name, untied_head)

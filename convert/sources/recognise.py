"""Decides, from config and headers, which format a checkpoint has."""

from __future__ import annotations

from collections.abc import Mapping

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.convert.sources import compressed_tensors, gptq_awq, hugging_face, mlx
from apertus_mlx.convert.sources.source import Source
from apertus_mlx.errors import RejectedError


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
    if config.foreign_quantization is not None:
        method, block = config.foreign_quantization
        if method == "compressed-tensors":
            return compressed_tensors.source(config, block, tensors, name)
        if method in ("gptq", "awq"):
            return gptq_awq.source(config, method, block, tensors, name)
        raise RejectedError(
            f"{name}: quantized by {method[:40]!r}, which is not read; convert the original "
            "checkpoint, or a compressed-tensors, GPTQ or AWQ version"
        )
    if config.quantization is not None:
        return mlx.source(config, tensors, name)
    return hugging_face.source(config, tensors, name, untied_head)

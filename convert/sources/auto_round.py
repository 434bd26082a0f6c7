"""AutoRound's own format: the tensors of another format, which `packing_format` names."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.convert.sources import compressed_tensors, fine_grained_fp8, gptq_awq
from apertus_mlx.convert.sources.source import Source
from apertus_mlx.errors import RejectedError

# The format of the integers: method, and what GPTQ calls its form.
INTEGERS = {
    "auto_gptq": ("gptq", "gptq"), "gptqmodel": ("gptq", "gptq_v2"), "auto_round":
    ("gptq", "gptq_v2"), "auto_awq": ("awq", None),
}  # fmt: skip


def source(
    config: ModelConfig, block: Mapping[str, Any], tensors: Mapping[str, TensorInfo], name: str
) -> Source:
    """Recognise an AutoRound checkpoint.

    Raises:
        RejectedError: a packing or tensors that are not read, by name.
    """
    packing = str(block.get("packing_format") or "auto_round")
    kind = packing.removeprefix("auto_round:")
    if kind in INTEGERS:
        method, form = INTEGERS[kind]
        found = gptq_awq.source(config, method, {**block, "checkpoint_format": form}, tensors, name)
    elif kind == "llm_compressor":
        # Microscaling and NVFP4 floats, whose tensors say all about themselves.
        found = compressed_tensors.by_tensors(packing, config, tensors, name, "auto-round", [])
    elif kind == "fp8" and block.get("weight_block_size") is not None:
        found = fine_grained_fp8.source(config, block, tensors, name)
    elif kind in ("fp8", "fp8_static"):
        found = compressed_tensors.by_tensors(packing, config, tensors, name, "auto-round", [])
    else:
        raise RejectedError(
            f"{name}: quantization_config: packing_format {packing[:60]!r} is not read; export it "
            "with AutoRound as mlx, auto_gptq, auto_awq or llm_compressor"
        )
    return found

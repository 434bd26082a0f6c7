"""Which kernels run: those that the doctor has proved right and fast on this very machine."""

from __future__ import annotations

import os
from collections.abc import Mapping

import mlx.core as mx

from apertus_mlx.backend.hardware import has_gpu, has_metal
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.backend.metal.verdict import NOTHING, Accepted, find_accepted, this_machine
from apertus_mlx.checkpoint.config import ModelConfig
from apertus_mlx.quant.spec import QuantSpec

SWITCH_VARIABLE = "APERTUS_MLX_KERNELS"


def enabled(config: ModelConfig, specs: Mapping[str, QuantSpec], dtype: mx.Dtype) -> Accepted:
    """What the doctor found right and fast; nothing without Metal, a verdict, or if switched off.

    Args:
        config: the model's.
        specs: module path -> format, for the quantized ones.
        dtype: the type it computes in.
    """
    if switched_off() or not (has_metal() and has_gpu()):
        return NOTHING
    return find_accepted(this_machine(), kernels_for(config, specs, dtype))


def switched_off() -> bool:
    """Whether `APERTUS_MLX_KERNELS=0` is set."""
    return os.environ.get(SWITCH_VARIABLE) == "0"

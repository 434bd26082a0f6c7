"""Refuses constants of xIELU with which float32 cannot compute.

xIELU squares its input and multiplies the square by a slope; the next RMS norm squares that again.
Float32 holds squares of numbers up to 1.8e19. Inputs of trained models stay below 1e4 and their
slopes below 170. A slope of 1e6 still leaves a factor of 1e5 for the matrix between xIELU and the
norm; with much larger ones all logits come out equal, without any error.
"""

from __future__ import annotations

import math
import struct

from apertus_mlx.checkpoint.header import DTYPE_BITS, TensorInfo
from apertus_mlx.checkpoint.layout import ALPHAS, CONSTANTS
from apertus_mlx.checkpoint.tensors import Checkpoint
from apertus_mlx.errors import RejectedError
from apertus_mlx.system.model_files import open_file

# A slope is softplus of what is stored, which exceeds that by 0.7 at most.
MAX_SLOPE = 1e6
# In the equation eps only keeps expm1 away from 0; trained models have -1e-6.
MAX_EPS = 1.0


def check_slopes(checkpoint: Checkpoint) -> None:
    """Read the few numbers and refuse what no training arrives at.

    Raises:
        RejectedError: a constant is not finite or too large; names the tensor.
    """
    for name, tensor in checkpoint.tensors.items():
        constant = name.rsplit(".", 1)[-1]
        if ".act_fn." not in name or constant not in (*ALPHAS, *CONSTANTS):
            continue
        most = MAX_EPS if constant == "eps" else MAX_SLOPE
        value = _value(checkpoint, tensor)
        if value is not None and not abs(value) <= most:
            raise RejectedError(
                f"{checkpoint.name}: {name}: {value:g} is beyond what a trained model has "
                f"(at most {most:g}); the checkpoint is damaged"
            )


def _value(checkpoint: Checkpoint, tensor: TensorInfo) -> float | None:
    """The one number of `tensor`; None where it is no single float, which others refuse."""
    if tensor.dtype not in ("BF16", "F16", "F32") or math.prod(tensor.shape) != 1:
        return None
    with open_file(checkpoint.path(tensor)) as file:
        file.seek(tensor.offset)
        data = file.read(DTYPE_BITS[tensor.dtype] // 8)
    if len(data) != tensor.size_bytes:
        raise RejectedError(f"{tensor.file}: became shorter while it was read; start again")
    if tensor.dtype == "BF16":
        data = b"\0\0" + data
    (value,) = struct.unpack("<e" if tensor.dtype == "F16" else "<f", data)
    return float(value)

"""Reads of a weight file only what one rank holds: some rows of a matrix, or some columns."""

from __future__ import annotations

import math
import os
from typing import BinaryIO

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint.header import DTYPE_BITS, TensorInfo
from apertus_mlx.errors import RejectedError

# What numpy reads it as, and what MLX takes that for. numpy has no bfloat16.
_TYPES = {
    "U8": (np.uint8, mx.uint8),
    "U32": (np.uint32, mx.uint32),
    "BF16": (np.uint16, mx.bfloat16),
    "F16": (np.float16, mx.float16),
    "F32": (np.float32, mx.float32),
}


def read_part(file: BinaryIO, whole: TensorInfo, shape: tuple[int, ...], rank: int) -> mx.array:
    """Read the part of rank `rank`, which has `shape`, of the tensor `whole`.

    The axis of which `shape` has less is the one that is split.

    Raises:
        RejectedError: the file ends before.
    """
    bytes_each = DTYPE_BITS[whole.dtype] // 8
    numpy_type, mlx_type = _TYPES[whole.dtype]
    found = np.empty(shape, numpy_type)
    into = found.reshape(-1).view(np.uint8).data
    if len(shape) == 2 and shape[1] != whole.shape[1]:
        row, own = whole.shape[1] * bytes_each, shape[1] * bytes_each
        for index in range(shape[0]):
            start = whole.offset + index * row + rank * own
            _fill(file, into[index * own : (index + 1) * own], start, whole)
    else:
        own = math.prod(shape) * bytes_each
        start = 0 if own == whole.size_bytes else rank * own
        _fill(file, into, whole.offset + start, whole)
    array = mx.array(found)
    return array if array.dtype == mlx_type else array.view(mlx_type)


def _fill(file: BinaryIO, into: memoryview, start: int, tensor: TensorInfo) -> None:
    done = 0
    while done < len(into):
        count = os.preadv(file.fileno(), [into[done:]], start + done)
        if count == 0:
            raise RejectedError(
                f"{tensor.file}: {tensor.name}: was changed while it was loaded; start again"
            )
        done += count

"""Reads tensors of a checkpoint by blocks of rows, so that memory depends on the block alone.

It reads at positions and maps nothing: mapped pages count as resident while they are in use.
"""

from __future__ import annotations

from collections.abc import Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.errors import RejectedError
from apertus_mlx.system.model_files import checked, open_file
from apertus_mlx.system.sizes import counted

# Source bytes that are in memory at once, unless one row is larger.
BLOCK_BYTES = 8 * 2**20

# What each safetensors type is read as, and the MLX type of the same bits.
_NUMPY_TYPES: dict[str, tuple[str, mx.Dtype]] = {
    "BF16": ("<u2", mx.bfloat16),
    "F16": ("<f2", mx.float16),
    "F32": ("<f4", mx.float32),
    "U8": ("u1", mx.uint8),
    "I8": ("i1", mx.int8),
    "F8_E4M3": ("u1", mx.uint8),
    "U32": ("<u4", mx.uint32),
    "I32": ("<i4", mx.int32),
    "I64": ("<i8", mx.int64),
}
MLX_TYPES = {"BF16": mx.bfloat16, "F16": mx.float16, "F32": mx.float32}
# The bits of a 16- or 32-bit float without its sign, and the smallest pattern that is not finite.
_NOT_FINITE = {"BF16": (0x7FFF, 0x7F80), "F16": (0x7FFF, 0x7C00), "F32": (0x7FFFFFFF, 0x7F800000)}


@dataclass(frozen=True, slots=True)
class FileState:
    """What must not change about a source file while it is read."""

    size_bytes: int
    modified_ns: int


class Reader(ExitStack):
    """Opens each weight file of `directory` once; use it as a context manager."""

    def __init__(self, directory: Path) -> None:
        super().__init__()
        self._directory = directory
        self._files: dict[str, BinaryIO] = {}

    def raw(self, tensor: TensorInfo, start: int, stop: int) -> npt.NDArray[np.generic]:
        """Rows `start` to `stop` of `tensor` as the file holds them (16-bit floats as integers).

        A tensor without dimensions has one row.
        """
        rows = tensor.shape[0] if tensor.shape else 1
        row_bytes = tensor.size_bytes // max(rows, 1)
        buffer = np.empty((stop - start) * row_bytes, np.uint8)
        if tensor.file not in self._files:
            path = self._directory / tensor.file
            self._files[tensor.file] = self.enter_context(open_file(path))
        file = self._files[tensor.file]
        file.seek(tensor.offset + start * row_bytes)
        if file.readinto(buffer.data) < len(buffer):  # type: ignore[attr-defined]
            raise RejectedError(f"{tensor.file}: became shorter while it was read; start again")
        name, _ = _NUMPY_TYPES[tensor.dtype]
        shape = (stop - start, *tensor.shape[1:]) if tensor.shape else ()
        return buffer.view(name).reshape(shape)

    def rows(self, tensor: TensorInfo, start: int, stop: int) -> mx.array:
        """Rows `start` to `stop` of `tensor`; 8-bit floats come as their bits in uint8."""
        return _as_stored(tensor, self.raw(tensor, start, stop))

    def whole(self, tensor: TensorInfo) -> mx.array:
        """All of `tensor`."""
        return self.rows(tensor, 0, tensor.shape[0] if tensor.shape else 1)

    def floats(
        self, tensor: TensorInfo, start: int, stop: int, allow_nonfinite: bool = False
    ) -> mx.array:
        """Rows of a float tensor, refused where they hold NaN or infinity.

        Raises:
            RejectedError: a value is not finite; names the tensor and counts them in these rows.
        """
        values = self.raw(tensor, start, stop)
        if not allow_nonfinite:
            mask, limit = _NOT_FINITE[tensor.dtype]
            bits = values.view(f"u{values.dtype.itemsize}")
            magnitudes = bits & mask
            if magnitudes.size and magnitudes.max() >= limit:
                count = int((magnitudes >= limit).sum())
                raise RejectedError(
                    f"{tensor.file}: {tensor.name}: "
                    f"{counted(count, 'value is', 'values are')} NaN or infinite (rows "
                    f"{start} to {stop}); the checkpoint is damaged or its training diverged"
                )
        return _as_stored(tensor, values)


def _as_stored(tensor: TensorInfo, values: npt.NDArray[np.generic]) -> mx.array:
    array, wanted = mx.array(values), _NUMPY_TYPES[tensor.dtype][1]
    return array if array.dtype == wanted else array.view(wanted)


def block_rows(row_bytes: int) -> int:
    """How many rows of `row_bytes` are read at once."""
    return max(1, BLOCK_BYTES // max(row_bytes, 1))


def file_states(directory: Path, files: Iterable[str]) -> dict[str, FileState]:
    """Size and modification time of each file."""
    states = {}
    for file in files:
        found = checked(directory / file).stat()
        states[file] = FileState(found.st_size, found.st_mtime_ns)
    return states

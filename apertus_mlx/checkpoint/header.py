"""The header of a safetensors file as checked values.

Format: 8 bytes little-endian header length, a JSON object of `name -> {dtype, shape,
data_offsets}`, then the data without holes or overlaps (the safetensors README is the
specification). Local files are first put before the safetensors library itself: MLX's own reader
accepts negative dimensions, overlaps and offsets that wrap around.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apertus_mlx.errors import RejectedError
from apertus_mlx.system.model_files import LFS_POINTER, checked, open_file, refuse_pointer
from apertus_mlx.system.rust_panics import PanicError, guarded
from apertus_mlx.system.strict_json import parse_object

MAX_HEADER_BYTES = 16 * 2**20
MAX_TENSORS = 100_000
MAX_NAME_LENGTH = 300

# Bits per element; safetensors calls the packed 4-bit float F4 and counts its shape in elements.
DTYPE_BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8,
    "U16": 16, "I16": 16, "F16": 16, "BF16": 16,
    "U32": 32, "I32": 32, "F32": 32,
    "U64": 64, "I64": 64, "F64": 64,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """Where one tensor lies: `size_bytes` bytes at `offset` of `file`."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    file: str
    offset: int
    size_bytes: int


def read_header(path: Path) -> list[TensorInfo]:
    """Check `path` with the safetensors library and return its tensors in file order.

    Raises:
        RejectedError: the file is damaged, hostile or no safetensors file; nothing was allocated.
    """
    try:
        with open_file(path) as file:
            file_size = os.fstat(file.fileno()).st_size
            start = file.read(len(LFS_POINTER))
            refuse_pointer(start, str(path))
            length = header_length(start[:8], file_size, str(path))
            file.seek(8)
            raw = file.read(length)
    except OSError as error:
        raise RejectedError(f"{path}: cannot be read ({error.strerror})") from None
    tensors = parse_header(raw, file_size, path.name, str(path))
    _pass_gatekeeper(path)
    return tensors


def header_length(first_bytes: bytes, file_size: int, name: str) -> int:
    """The header length that the first 8 bytes declare, checked against the file size."""
    if file_size < 8 or len(first_bytes) < 8:
        raise RejectedError(f"{name}: {file_size} bytes is too short for a safetensors file")
    length = int.from_bytes(first_bytes[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise RejectedError(f"{name}: declares a header of {length} bytes; not a safetensors file")
    if length < 2 or 8 + length > file_size:
        raise RejectedError(
            f"{name}: declares a header of {length} bytes in a file of {file_size}: truncated? "
            "Fetch the file again"
        )
    return length


def parse_header(raw: bytes, file_size: int, file: str, name: str) -> list[TensorInfo]:
    """Tensors of the header `raw` of a file of `file_size` bytes, in data order."""
    if not raw.startswith(b"{"):
        raise RejectedError(f"{name}: the header is not a JSON object; not a safetensors file")
    header = parse_object(raw, f"{name}: header")
    header.pop("__metadata__", None)
    if len(header) > MAX_TENSORS:
        raise RejectedError(f"{name}: {len(header)} tensors are more than any Apertus has")
    data_start = 8 + len(raw)
    tensors = [
        _parse_entry(key, value, data_start, file, f"{name}: tensor {key[:80]!r}")
        for key, value in header.items()
    ]
    tensors.sort(key=lambda tensor: (tensor.offset, tensor.size_bytes))
    position = data_start
    for tensor in tensors:
        if tensor.offset != position:
            kind = "overlaps another" if tensor.offset < position else "leaves a hole before it"
            raise RejectedError(f"{name}: tensor {tensor.name[:80]!r} {kind}")
        position += tensor.size_bytes
    if position != file_size:
        problem = "truncated" if position > file_size else "followed by other bytes"
        problem += "; fetch the file again"
        raise RejectedError(
            f"{name}: holds {file_size} bytes where its header describes {position}: {problem}"
        )
    return tensors


def _parse_entry(key: str, entry: Any, data_start: int, file: str, name: str) -> TensorInfo:
    if len(key) > MAX_NAME_LENGTH:
        raise RejectedError(f"{name}: the name is longer than {MAX_NAME_LENGTH} characters")
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise RejectedError(f"{name}: expected exactly dtype, shape and data_offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in DTYPE_BITS:
        raise RejectedError(f"{name}: dtype {str(dtype)[:40]!r} is not supported")
    if not isinstance(shape, list) or not _are_below(2**31, shape):
        raise RejectedError(f"{name}: shape {str(shape)[:60]} is not a list of sizes below 2^31")
    if not isinstance(offsets, list) or len(offsets) != 2 or not _are_below(2**63, offsets):
        raise RejectedError(f"{name}: data_offsets {str(offsets)[:60]} are not two offsets")
    size_bytes = DTYPE_BITS[dtype] // 8
    for size in shape:
        size_bytes *= size
    if offsets[1] - offsets[0] != size_bytes:
        raise RejectedError(
            f"{name}: {dtype} {shape} takes {size_bytes} bytes, data_offsets give "
            f"{offsets[1] - offsets[0]}"
        )
    return TensorInfo(key, dtype, tuple(shape), file, data_start + offsets[0], size_bytes)


def _are_below(limit: int, values: list[Any]) -> bool:
    return all(type(value) is int and 0 <= value < limit for value in values)


def _pass_gatekeeper(path: Path) -> None:
    from safetensors import SafetensorError, safe_open

    real = checked(path)
    try:
        with guarded(safe_open, os.fspath(real), framework="np"):
            pass
    except (SafetensorError, PanicError, OSError, ValueError) as error:
        raise RejectedError(f"{path}: refused by the safetensors library ({error})") from None

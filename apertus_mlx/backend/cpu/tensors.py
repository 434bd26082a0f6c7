"""A checkpoint's tensors as arrays, read one at a time; the embedding's rows stay in the file."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal

import mlx.core as mx
import numpy as np
import numpy.typing as npt

from apertus_mlx.backend.cpu.runtime import Array
from apertus_mlx.backend.cpu.weights import Dense, Floats, Weight, activations_for, pack
from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.inventory import OUTPUT_DIVISOR, Inventory
from apertus_mlx.checkpoint.matching import XIELU_DEFAULTS
from apertus_mlx.checkpoint.rows import StoredRows
from apertus_mlx.errors import RejectedError
from apertus_mlx.quant.packing import unpack
from apertus_mlx.quant.spec import QuantSpec
from apertus_mlx.system.model_files import open_file
from apertus_mlx.system.sizes import counted

# How activations are rounded in products with quantized weights.
Precision = Literal["auto", "float32", "int8"]
STORED_TYPES: dict[str, type[np.generic]] = {
    "BF16": np.uint16,
    "F16": np.float16,
    "F32": np.float32,
    "U32": np.uint32,
    "U8": np.uint8,
}


class Tensors:
    """Reads what `take_inventory` found.

    Raises:
        RejectedError: from any method, when values are not finite.
    """

    def __init__(
        self,
        inventory: Inventory,
        precision: Precision,
        on_bytes: Callable[[int, int], None] | None = None,
    ) -> None:
        self._inventory = inventory
        self._checkpoint = inventory.checkpoint
        self._precision = precision
        self._on_bytes = on_bytes
        self._bytes_read = 0

    def matrix(self, path: str) -> Weight:
        """The weight of module `path`: quantized as the checkpoint has it, else in float32.

        MLX's floating-point modes have no kernel here and are widened to float32.
        """
        spec = self._inventory.specs.get(path)
        if spec is None:
            return Dense(self.floats(f"{path}.weight"))
        words = self._read(f"{path}.weight")
        if not spec.has_biases:
            return Dense(
                _dequantized(words, self._read(f"{path}.scales"), spec) * self._factor(path)
            )
        scales, biases = self.floats(f"{path}.scales"), self.floats(f"{path}.biases")
        activations = activations_for(spec.bits, self._precision)
        return pack(words, scales, biases, spec.bits, spec.group_size, activations)

    def rounded_bits(self) -> list[int]:
        """The bits of those weights before whose products activations are rounded to int8."""
        specs = self._inventory.specs.values()
        codes = {spec.bits for spec in specs if spec.has_biases}
        return sorted(b for b in codes if activations_for(b, self._precision) == "int8")

    def _factor(self, path: str) -> Floats:
        """What the product of module `path` is multiplied by, one entry per row or for all."""
        tensor = self._inventory.factors.get(path)
        if tensor is None:
            return np.ones(1, np.float32)
        factor = self.floats(tensor.name)[:, None]
        return np.float32(1) / factor if tensor.name.endswith(OUTPUT_DIVISOR) else factor

    def floats(self, name: str) -> Floats:
        """A floating-point tensor in float32."""
        values = _widened(self._read(name))
        if not np.isfinite(values).all():
            wrong = counted(int(np.count_nonzero(~np.isfinite(values))), "value is", "values are")
            raise RejectedError(
                f"{self._checkpoint.directory}: {name}: {wrong} not finite; the weights are damaged"
            )
        return values

    def scalar(self, name: str) -> float:
        """One of xIELU's parameters."""
        if name not in self._checkpoint.tensors:
            return XIELU_DEFAULTS[name.rsplit(".", 1)[-1]]
        return float(self.floats(name).reshape(()))

    def embedding(self) -> Callable[[npt.NDArray[np.int64]], Floats]:
        """A function from token ids `[rows]` to their embeddings `[rows, D]`."""
        path = layout.EMBEDDING
        spec = self._inventory.specs.get(path)
        weight = self._rows(f"{path}.weight")
        if spec is None:
            return lambda ids: _widened(weight(ids))
        scales = self._rows(f"{path}.scales")
        biases = self._rows(f"{path}.biases") if spec.has_biases else None

        def rows(ids: npt.NDArray[np.int64]) -> Floats:
            words = weight(ids)
            if biases is None:
                return _dequantized(words, scales(ids), spec)
            columns = words.shape[1] * 32 // spec.bits
            codes = unpack(words, spec.bits, columns).astype(np.float32)
            grouped = codes.reshape(len(ids), -1, spec.group_size)
            grouped *= _widened(scales(ids))[..., None]
            grouped += _widened(biases(ids))[..., None]
            return codes

        return rows

    def _read(self, name: str) -> Array:
        info = self._checkpoint.tensors[name]
        kind = STORED_TYPES[info.dtype]
        self._bytes_read += info.size_bytes
        if self._on_bytes is not None:
            self._on_bytes(self._bytes_read, self._checkpoint.size_bytes)
        path = self._checkpoint.path(info)
        flat: Array = np.empty(math.prod(info.shape), kind)
        with open_file(path) as file:
            file.seek(info.offset)
            if file.readinto(flat.view(np.uint8).data) != info.size_bytes:  # type: ignore[attr-defined]
                raise RejectedError(f"{path}: was changed while it was loaded; start again")
        return flat.reshape(info.shape)

    def _rows(self, name: str) -> Callable[[npt.NDArray[np.int64]], Array]:
        """A function that reads single rows of a matrix. Mapped, each would take 16 pages."""
        info = self._checkpoint.tensors[name]
        kind = np.dtype(STORED_TYPES[info.dtype])
        stored = StoredRows(self._checkpoint, [info])
        return lambda ids: np.frombuffer(stored.read(ids.tolist())[0], kind).reshape(len(ids), -1)


def _dequantized(words: Array, scales: Array, spec: QuantSpec) -> Floats:
    """Weights in one of MLX's floating-point modes."""
    codes = (mx.array(words), mx.array(scales))
    wide = mx.dequantize(*codes, None, spec.group_size, spec.bits, mode=spec.mode)
    return np.asarray(wide.astype(mx.float32))


def _widened(values: Array) -> Floats:
    """Float32 values of a stored tensor; bfloat16 comes as its bit patterns."""
    if values.dtype == np.uint16:
        return np.asarray((values.astype(np.uint32) << 16).view(np.float32))
    return np.asarray(values, np.float32)

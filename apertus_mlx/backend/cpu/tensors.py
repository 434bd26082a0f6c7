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
from apertus_mlx.model.stored_row import StoredRow
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
        """A function from token ids `[rows]` to their embeddings `[rows, D]`; for one thread."""
        stored = self._inventory.matrices[layout.EMBEDDING]
        tensors, spec = stored.tensors, stored.spec
        kinds = [np.dtype(STORED_TYPES[tensor.dtype]) for tensor in tensors]
        # Mapped, each row would take 16 pages.
        rows = StoredRows(self._checkpoint, tensors)
        one = StoredRow(spec, tensors, mx.float32)

        def found(ids: npt.NDArray[np.int64]) -> Floats:
            if len(ids) == 1:
                rows.read_into(int(ids[0]), one.buffers)
                return one().reshape(1, -1).copy()
            weight, *rest = (
                np.frombuffer(data, kind).reshape(len(ids), -1)
                for data, kind in zip(rows.read(ids.tolist()), kinds, strict=True)
            )
            if spec is None:
                return _widened(weight)
            if not spec.has_biases:
                return _dequantized(weight, rest[0], spec)
            codes = unpack(weight, spec.bits, stored.columns).astype(np.float32)
            grouped = codes.reshape(len(ids), -1, spec.group_size)
            scales, biases = map(_widened, rest)
            grouped *= scales[..., None]
            grouped += biases[..., None]
            return codes

        return found

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

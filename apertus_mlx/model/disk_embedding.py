"""An embedding whose rows stay in the checkpoint: a token's row is read when it is needed.

It gives the very numbers that the embedding in memory gives: the few rows of a call make a small
embedding of the same kind. The ids have to be known to read rows, so a call waits for them.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import numpy.typing as npt

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.checkpoint.rows import StoredRows
from apertus_mlx.errors import RejectedError, UsageError
from apertus_mlx.model.embedding import ProductEmbedding

# What the bytes of each safetensors type are read as, and the bits of its exponent, which are all
# set in NaN and infinity.
_STORED = {"BF16": "<u2", "F16": "<f2", "F32": "<f4", "U32": "<u4", "U8": "u1"}
_NOT_FINITE = {"BF16": 0x7F80, "F16": 0x7C00, "F32": 0x7F800000}
PARTS = ("weight", "scales", "biases")


class DiskEmbedding(nn.Module):
    """The rows of an untied embedding, in a file."""

    def __init__(self, inventory: Inventory, dtype: mx.Dtype, row_by_product: bool = False) -> None:
        """Open the files of the embedding.

        Args:
            inventory: the checkpoint.
            dtype: type to compute in.
            row_by_product: see `Model.fuse`.

        Raises:
            UsageError: the head is the embedding.
            RejectedError: a file is missing.
        """
        super().__init__()
        require_untied(inventory)
        stored = inventory.matrices[layout.EMBEDDING]
        self._dtype = dtype
        self._rows = StoredRows(inventory.checkpoint, stored.tensors)
        self._small: Any
        if stored.spec is None:
            self._small = nn.Embedding(1, stored.columns)
        else:
            spec = stored.spec
            self._small = nn.QuantizedEmbedding(
                1, stored.columns, spec.group_size, spec.bits, spec.mode
            )
        self._small.freeze()
        # As in memory (`Model.fuse`): one row by product, if that is exact for three of them.
        self._fill([0, (stored.rows - 1) // 2, stored.rows - 1])
        if row_by_product and ProductEmbedding.is_exact(self._small):
            self._small = ProductEmbedding(self._small)

    def __call__(self, x: mx.array) -> mx.array:
        """Rows `[..., D]` of the token ids `x`.

        Raises:
            RejectedError: a file was changed since, or a row holds what is not finite.
        """
        if x.size == 1:
            self._fill(np.array(x).reshape(-1).tolist())
            places = np.zeros(x.shape, np.uint32)
        else:
            ids, found = np.unique(np.array(x), return_inverse=True)
            self._fill(ids.tolist())
            places = found.astype(np.uint32).reshape(x.shape)
        rows: mx.array = self._small(mx.array(places))
        return rows

    def _fill(self, ids: list[int]) -> None:
        """Make the small embedding that of these tokens."""
        found = self._rows.read(ids)
        for name, tensor, data in zip(PARTS, self._rows.tensors, found, strict=False):
            values = np.frombuffer(data, _STORED[tensor.dtype]).reshape(len(ids), -1)
            if tensor.dtype in _NOT_FINITE:
                self._small[name] = self._floats(values, tensor)
            else:
                self._small[name] = mx.array(values)

    def _floats(self, values: npt.NDArray[Any], tensor: TensorInfo) -> mx.array:
        """Stored floats in the type to compute in; most is done here, where nothing is queued."""
        bits = values.view(f"u{values.itemsize}")
        mask = _NOT_FINITE[tensor.dtype]
        if (bits & mask == mask).any():
            raise RejectedError(
                f"{tensor.file}: {tensor.name}: a value is not finite; the weights are damaged"
            )
        if tensor.dtype == "BF16":
            if self._dtype == mx.bfloat16:
                return mx.array(values).view(mx.bfloat16)
            values = (values.astype(np.uint32) << 16).view(np.float32)
        elif self._dtype == mx.float32:
            values = values.astype(np.float32)
        array = mx.array(values)
        return array if array.dtype == self._dtype else array.astype(self._dtype)


def require_untied(inventory: Inventory) -> None:
    """Refuse a model whose head is the embedding, which needs all of it.

    Raises:
        UsageError: it is.
    """
    if inventory.config.tie_word_embeddings:
        raise UsageError(
            f"--embedding disk: the head of {inventory.name} is its embedding, of which every "
            "token needs all rows; leave the option out"
        )

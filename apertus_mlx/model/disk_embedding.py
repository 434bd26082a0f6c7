"""An embedding whose rows stay in the checkpoint: a token's row is read when it is needed.

It gives the very numbers that the embedding in memory gives: the few rows of a call make a small
embedding of the same kind. A single row is computed by NumPy where that gives the same for some
tokens, and the latest of these are kept. The ids have to be known to read rows, so a call waits for
them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.checkpoint.rows import StoredRows
from apertus_mlx.errors import UsageError
from apertus_mlx.model.embedding import ProductEmbedding
from apertus_mlx.model.kept_rows import KeptRows
from apertus_mlx.model.stored_row import StoredRow, floats, require_finite
from apertus_mlx.quant.spec import QuantSpec

# What the bytes of codes are read as.
_CODES = {"U32": "<u4", "U8": "u1"}
PARTS = ("weight", "scales", "biases")
# Of the ids of a token by itself.
ONE = (1, 1)


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
        some = [0, (stored.rows - 1) // 2, stored.rows - 1]
        self._fill(some)
        if row_by_product and ProductEmbedding.is_exact(self._small):
            self._small = ProductEmbedding(self._small)
        self._row = next(filter(partial(self._is_exact, some), self._candidates(stored.spec)), None)
        self._kept = KeptRows(stored.rows)

    def __call__(self, x: mx.array) -> mx.array:
        """Rows `[..., D]` of the token ids `x`.

        Raises:
            RejectedError: a file was changed since, or a row holds what is not finite.
        """
        if x.size == 1 and self._row is not None:
            token: Any = x.item()
            row = self._kept.get(token)
            if row is None:
                row = self._one(self._row, token)
                self._kept.put(token, row)
            else:
                self._rows.require_unchanged()
            return row if x.shape == ONE else row.reshape(*x.shape, -1)
        ids, found = np.unique(np.array(x), return_inverse=True)
        self._fill(ids.tolist())
        rows: mx.array = self._small(mx.array(found.astype(np.uint32).reshape(x.shape)))
        return rows

    def _one(self, row: StoredRow, token: int) -> mx.array:
        """The row `[1, 1, D]` of a token, read and computed."""
        self._rows.read_into(token, row.buffers)
        # The constructor rounds at once, where `astype` would be one more operation.
        return mx.array(row(), row.dtype)

    def _fill(self, ids: list[int]) -> None:
        """Make the small embedding that of these tokens."""
        found = self._rows.read(ids)
        for name, tensor, data in zip(PARTS, self._rows.tensors, found, strict=False):
            if tensor.dtype in _CODES:
                values = mx.array(np.frombuffer(data, _CODES[tensor.dtype]).reshape(len(ids), -1))
            else:
                require_finite(data, tensor)
                values = mx.array(floats(data, tensor).reshape(len(ids), -1), self._dtype)
            self._small[name] = values

    def _candidates(self, spec: QuantSpec | None) -> Iterator[StoredRow]:
        """Ways to compute a single row without MLX."""
        # Of a floating-point format MLX chooses it.
        dtype = self._small(mx.zeros((1,), mx.uint32)).dtype
        yield StoredRow(spec, self._rows.tensors, dtype)
        if spec is not None and spec.has_biases:
            yield StoredRow(spec, self._rows.tensors, dtype, rounds_once=True)

    def _is_exact(self, ids: Sequence[int], row: StoredRow) -> bool:
        """Whether `row` gives what MLX gives for these tokens, each by itself."""
        for token in ids:
            self._fill([token])
            expected = self._small(mx.zeros((1,), mx.uint32)).reshape(-1)
            found = self._one(row, token).reshape(-1)
            if found.dtype != expected.dtype or not mx.array_equal(found, expected).item():
                return False
        return True


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

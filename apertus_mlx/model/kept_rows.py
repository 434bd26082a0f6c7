"""The latest rows of an embedding on disk, ready to compute with: a text repeats its tokens."""

from __future__ import annotations

from collections import OrderedDict
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import mlx.core as mx

# Of so many rows of the embedding one is kept: 512 of 131,072.
SHARE = 256


class KeptRows:
    """Rows by token; the one whose last use is longest ago goes first.

    Args:
        rows: of the embedding.
    """

    def __init__(self, rows: int) -> None:
        self._most = rows // SHARE
        self._arrays: OrderedDict[int, mx.array] = OrderedDict()

    def get(self, token: int) -> mx.array | None:
        """The row of a token; None where it is not kept."""
        found = self._arrays.get(token)
        if found is not None:
            self._arrays.move_to_end(token)
        return found

    def put(self, token: int, row: mx.array) -> None:
        """Keep one more."""
        self._arrays[token] = row
        if len(self._arrays) > self._most:
            self._arrays.popitem(last=False)


def kept_bytes(rows: int, columns: int, compute_bytes: int) -> int:
    """Most that the kept rows of an embedding `[rows, columns]` take."""
    return rows // SHARE * columns * compute_bytes

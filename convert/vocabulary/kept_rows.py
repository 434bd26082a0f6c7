"""A checkpoint without the rows of the tokens that are cut, in embedding and head."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import mlx.core as mx
import numpy as np

from apertus_mlx.checkpoint import layout
from apertus_mlx.checkpoint.header import TensorInfo
from apertus_mlx.convert.sources.reading import Reader
from apertus_mlx.convert.sources.source import Codes, MatrixSource, Source, Stored
from apertus_mlx.convert.vocabulary.byte_pairs import Ids

# Rows that nobody wants are read along where that saves a read of its own.
LARGEST_GAP = 8


@dataclass(frozen=True, slots=True)
class KeptRows(MatrixSource):
    """Some rows of a matrix, `ids` ascending."""

    whole: MatrixSource
    ids: Ids

    @property
    def tensors(self) -> tuple[TensorInfo, ...]:
        """Those of the whole matrix."""
        return self.whole.tensors

    @property
    def dtype(self) -> str:
        """As in the whole matrix."""
        return self.whole.dtype

    @property
    def stored(self) -> Stored | None:
        """As in the whole matrix; a factor for each row is cut with the rows."""
        stored = self.whole.stored
        if stored is None or stored.factor is None or stored.factor.shape == (1,):
            return stored
        return replace(stored, factor=replace(stored.factor, shape=(len(self.ids),)))

    @property
    def is_quantized(self) -> bool:
        """As in the whole matrix."""
        return self.whole.is_quantized

    @property
    def no_form(self) -> str:
        """As in the whole matrix."""
        return self.whole.no_form

    def settled(self, reader: Reader) -> MatrixSource:
        """See `MatrixSource`."""
        return replace(self, whole=self.whole.settled(reader))

    def read(self, reader: Reader, start: int, stop: int, nonfinite: bool = False) -> mx.array:
        """Rows `start` to `stop` of those kept, as floats."""
        parts = [
            self.whole.read(reader, first, last, nonfinite)[rows]
            for first, last, rows in _spans(self.ids[start:stop])
        ]
        return parts[0] if len(parts) == 1 else mx.concatenate(parts)

    def read_codes(self, reader: Reader, start: int, stop: int) -> Codes:
        """Rows `start` to `stop` of those kept, as the whole matrix has them."""
        parts: list[list[mx.array]] = []
        for first, last, rows in _spans(self.ids[start:stop]):
            codes = self.whole.read_codes(reader, first, last)
            arrays = (codes.weight, codes.scales, codes.biases)
            parts.append([array[rows] for array in arrays if array is not None])
        return Codes(*(mx.concatenate(list(part)) for part in zip(*parts, strict=True)))

    def read_factor(self, reader: Reader) -> mx.array:
        """The factor of the rows that are kept."""
        factor = self.whole.read_factor(reader)
        return factor if factor.size == 1 else factor[mx.array(self.ids)]


def keep_rows(source: Source, kept: Ids) -> Source:
    """The source whose token `i` is token `kept[i]` of the whole one.

    A head with fewer rows than the embedding keeps those of its tokens that are kept.
    """
    whole = source.config
    head_ids = kept[kept < whole.output_vocab_size]
    config = replace(whole, vocab_size=len(kept), output_vocab_size=len(head_ids))
    matrices = dict(source.matrices)
    for path, ids in ((layout.EMBEDDING, kept), (layout.HEAD, head_ids)):
        if path in matrices:
            matrices[path] = KeptRows(matrices[path], ids)
    return replace(source, config=config, layout=tuple(layout.matrices(config)), matrices=matrices)


def _spans(ids: Ids) -> Iterator[tuple[int, int, mx.array | slice]]:
    """Stretches of rows to read, and which of them are wanted."""
    breaks = np.flatnonzero(np.diff(ids) > LARGEST_GAP) + 1
    for part in np.split(ids, breaks):
        first, last = int(part[0]), int(part[-1]) + 1
        every = last - first == len(part)
        yield first, last, slice(None) if every else mx.array(part - first)

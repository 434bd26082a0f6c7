"""Growing memory for rows along the positions' axis: without end, or as a ring.

A store holds several arrays `[B, heads, S, width]` that grow together, each in one piece, because
attention kernels read one piece. What is expected gets room at once, and is never copied; beyond
that, room is added in steps of an eighth (at least 256 rows): at most that much is unused, and
however long the cache gets, growing copies a row some ten times in all.
"""

from __future__ import annotations

from collections.abc import Sequence
from copy import copy
from typing import Self

import mlx.core as mx

MIN_STEP = 256


def capacity_for(rows: int) -> int:
    """Rows allocated to hold `rows`: a multiple of 256, or of an eighth of a power of two."""
    step = max(MIN_STEP, 1 << max(0, rows.bit_length() - 4))
    return -(-rows // step) * step


class Store:
    """Keeps every row.

    `whole`: there is never room for more rows than are held, so that `rows()` are no slices, which
    some products refuse. Each `append` then copies all.
    """

    def __init__(self, whole: bool = False) -> None:
        self.whole = whole
        self.arrays: list[mx.array] = []
        self.length = 0
        # Rows in all that are known to come; room for them is made with the first.
        self.expected = 0

    @property
    def held(self) -> int:
        """Number of rows held."""
        return self.length

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return sum(array.nbytes for array in self.arrays)

    @property
    def room(self) -> int:
        """Number of rows allocated."""
        return self.arrays[0].shape[2] if self.arrays else 0

    def capacity(self, rows: int) -> int:
        """Rows allocated once `rows` have come."""
        return rows if self.whole else capacity_for(rows)

    def append(
        self,
        new: Sequence[mx.array],
        keep_evicted: bool = False,  # noqa: ARG002 - nothing is pushed out here
    ) -> list[mx.array]:
        """Write rows behind the others; returns all that are to be read, of each array.

        `keep_evicted`: also those that these rows push out, for queries that still see them.
        """
        start = self.length
        self.length += new[0].shape[2]
        self.reserve(self.length, new)
        for array, rows in zip(self.arrays, new, strict=True):
            array[:, :, start : self.length] = rows
        return self.rows()

    def rows(self) -> list[mx.array]:
        """All rows held, of each array; no array while there are none."""
        if self.held == 0:
            return []
        return [array[:, :, : self.held] for array in self.arrays]

    def numbers(self, new: int) -> mx.array:
        """Which rows, counting all that ever came, `append` of `new` rows returns."""
        return mx.arange(self.length + new)

    def reserve(self, rows: int, like: Sequence[mx.array]) -> None:
        """Make room for `rows` in all, in the shapes and types of `like`."""
        wanted = self.capacity(rows if self.whole else max(rows, self.expected))
        if wanted <= self.room:
            return
        blank = [
            mx.zeros((*array.shape[:2], wanted - self.room, array.shape[3]), array.dtype)
            for array in like
        ]
        if not self.arrays:
            self.arrays = blank
            return
        self.arrays = [
            mx.concatenate([array, more], axis=2)
            for array, more in zip(self.arrays, blank, strict=True)
        ]

    def restore(self, rows: Sequence[mx.array], length: int) -> None:
        """Take over what `rows()` of an equal store gave when it had `length`."""
        held = rows[0].shape[2] if rows else 0
        self.arrays, self.length = [], 0
        if held:
            self.append(rows)
        self.length = length

    def fork(self) -> Self:
        """A store with the same rows that goes its own way; who writes first copies them."""
        twin = copy(self)
        twin.arrays = [mx.array(array) for array in self.arrays]
        return twin

    def compact(self) -> None:
        """Give back the room that the rows held do not need."""
        self.expected, wanted = 0, self.capacity(self.held)
        if wanted < self.room:
            self.arrays = [mx.contiguous(array[:, :, :wanted]) for array in self.arrays if wanted]

    def can_shrink(self, length: int) -> bool:
        """Whether what was held with `length` rows is still there."""
        return length <= self.length

    def shrink(self, length: int) -> None:
        """Go back to `length` rows."""
        self.length = length
        if self.whole:
            self.compact()


class Ring(Store):
    """Keeps the first `kept` rows and the latest of the others, `size` in all.

    Attributes:
        spare: of the rows that an `append` with `keep_evicted` pushes out, how many are held until
            the next one, so that `shrink` can bring them back.
    """

    def __init__(self, size: int, kept: int = 0, whole: bool = False) -> None:
        super().__init__(whole)
        self.size = size
        self.kept = kept
        self.spare = 0
        # What stood in the places of the latest rows, of each array.
        self._displaced: list[mx.array] = []

    @property
    def held(self) -> int:
        """Number of rows held."""
        return min(self.length, self.size)

    @property
    def nbytes(self) -> int:
        """Bytes allocated."""
        return super().nbytes + sum(array.nbytes for array in self._displaced)

    def capacity(self, rows: int) -> int:
        """Rows allocated once `rows` have come; never more than the ring has."""
        return min(super().capacity(rows), self.size)

    def append(self, new: Sequence[mx.array], keep_evicted: bool = False) -> list[mx.array]:
        """As `Store` does; rows come back in the order of their places in the ring."""
        count = new[0].shape[2]
        self._displaced = []
        if self.length + count <= self.size:
            return super().append(new)
        place = int(self._place(self.length))
        if place + count <= self.room and not keep_evicted:
            self.length += count
            for array, rows in zip(self.arrays, new, strict=True):
                array[:, :, place : place + count] = rows
            return self.rows()
        together = list(new)
        if self.length:
            held = zip(self.rows(), new, strict=True)
            together = [mx.concatenate([old, rows], axis=2) for old, rows in held]
        chosen = self._survivors(count)
        self._displaced = self._leaving(together, count)
        self.length += count
        # Row by row in memory, or later writes could not happen in place.
        self.arrays = [mx.contiguous(mx.take(array, chosen, axis=2)) for array in together]
        return together if keep_evicted else self.rows()

    def numbers(self, new: int) -> mx.array:
        """See `Store.numbers`, for an `append` that keeps what it pushes out."""
        return mx.concatenate(
            [self._numbers_held(self.length), mx.arange(self.length, self.length + new)]
        )

    def can_shrink(self, length: int) -> bool:
        """Only rows that nothing has overwritten can come back, or that are held as spare ones."""
        displaced = self._displaced[0].shape[2] if self._displaced else 0
        return length <= self.length and self.length - max(length, self.size) <= displaced

    def shrink(self, length: int) -> None:
        """Go back to `length` rows, and to those that the later ones pushed out."""
        back = self.length - max(length, self.size)
        if length == 0:
            self._displaced = []
        elif back > 0:
            last = self.length
            places = mx.array([self._place(number) for number in range(last - back, last)])
            for array, rows in zip(self.arrays, self._displaced, strict=True):
                array[:, :, places] = rows[:, :, -back:]
            self._displaced = [rows[:, :, :-back] for rows in self._displaced]
        self.length = length

    def restore(self, rows: Sequence[mx.array], length: int) -> None:
        """See `Store.restore`."""
        super().restore(rows, length)
        self._displaced = []

    def _leaving(self, together: list[mx.array], count: int) -> list[mx.array]:
        """Of `together`, all rows held and `count` new ones, those that the last of these push out.

        At most `spare`, in the order of the rows that take their places.
        """
        after, turn = self.length + count, self.size - self.kept
        first = max(self.length, self.size, after - min(self.spare, turn))
        if first >= after:
            return []
        before = [number - turn for number in range(first, after)]
        indices = mx.array(
            [
                self._place(number) if number < self.length else self.held + number - self.length
                for number in before
            ]
        )
        # Copies: the rows must not keep the whole ring alive.
        return [mx.contiguous(mx.take(array, indices, axis=2)) for array in together]

    def _place(self, number: int) -> int:
        if number < self.size:
            return number
        return self.kept + (number - self.kept) % (self.size - self.kept)

    def _numbers_held(self, length: int) -> mx.array:
        """The row in each place once `length` rows have come."""
        if length <= self.size:
            return mx.arange(length)
        places, last = mx.arange(self.kept, self.size), length - 1
        turning = last - (last - places) % (self.size - self.kept)
        return mx.concatenate([mx.arange(self.kept), turning])

    def _survivors(self, count: int) -> mx.array:
        """For each place, which of the held and `count` new rows, in this order, will be there."""
        numbers = self._numbers_held(self.length + count)
        # A row that stays is in its place already.
        return mx.where(
            numbers < self.length, mx.arange(self.size), numbers + (self.held - self.length)
        )

"""The links of ranks that compute in one process: in turn, or in threads."""

from __future__ import annotations

from dataclasses import dataclass, field
from threading import Barrier

import mlx.core as mx


@dataclass
class Wire:
    """The links of one rank; `carried` is the same list for all of them."""

    rank: int
    ranks: int
    carried: list[mx.array] = field(default_factory=list)

    def from_before(self, shape: tuple[int, ...], dtype: mx.Dtype) -> mx.array | None:
        if self.rank == 0:
            return None
        x = self.carried[-1]
        assert (x.shape, x.dtype) == (shape, dtype)
        return x

    def to_next(self, x: mx.array) -> mx.array:
        self.carried.append(x)
        return x


class Table:
    """Where ranks in threads meet; each has its own place of `rank`."""

    def __init__(self, ranks: int) -> None:
        self.barrier = Barrier(ranks)
        self.given: list[mx.array] = [mx.array(0)] * ranks

    def rank(self, number: int) -> Place:
        return Place(self, number)


@dataclass
class Place:
    """The exchange of one rank."""

    table: Table
    number: int

    def sum(self, x: mx.array) -> mx.array:
        return mx.stack(self._all(x)).sum(axis=0).astype(x.dtype)

    def gather(self, x: mx.array) -> mx.array:
        return mx.concatenate(self._all(x))

    def _all(self, x: mx.array) -> list[mx.array]:
        mx.eval(x)
        self.table.given[self.number] = x
        self.table.barrier.wait()
        found = self.table.given[:]
        self.table.barrier.wait()
        return found

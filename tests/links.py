"""The links of ranks that compute in turn, in one process."""

from __future__ import annotations

from dataclasses import dataclass, field

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

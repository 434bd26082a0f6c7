"""What ranks do alike during one answer, whatever has become of their connections."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import pytest

from apertus_mlx.generation.agreement import Agreement


@dataclass
class Sums:
    """Ranks of which the others send `sent`; or what a lost connection leaves."""

    rank: int
    sent: list[int]
    lost: int | None = None

    def sum(self, own: mx.array) -> mx.array:
        if self.lost is not None:
            return mx.full(own.shape, self.lost, mx.uint32)
        return own + mx.array(self.sent, mx.uint32)


@pytest.mark.parametrize(
    ("ranks", "stops", "token", "stopped"),
    [
        (Sums(0, [0, 0]), False, 7, False),
        (Sums(0, [0, 1]), False, 7, True),
        (Sums(1, [9, 0]), False, 9, False),
        (Sums(1, [9, 1]), True, 9, True),
        # An id that nothing was sent for is looked up in the embedding before anybody sees it.
        (Sums(0, [], lost=2**32 - 1), False, 383, True),
        (Sums(1, [], lost=2**31), False, 383, True),
    ],
)
def test_rank_0_draws_and_each_may_stop(ranks: Any, stops: bool, token: int, stopped: bool) -> None:
    agreement = Agreement(ranks, 384, lambda: stops)
    assert int(agreement.token(mx.array(7))) == token
    # The latest word may still be on its way.
    assert not agreement.stopped()
    agreement.token(mx.array(7))
    assert agreement.stopped() == stopped

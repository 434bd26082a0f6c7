"""One of two ranks, of which rank 0 stands still; run by test_standing_rank.py, in each process."""

from __future__ import annotations

import faulthandler
import os
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import mlx.core as mx

from apertus_mlx.backend import rank_watch
from apertus_mlx.backend.memory_limits import mlx_limits
from apertus_mlx.backend.mlx import load_inventory
from apertus_mlx.backend.rank_channel import RankChannel
from apertus_mlx.backend.ranks import Ranks, join
from apertus_mlx.cache import CacheConfig
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.cli import several
from apertus_mlx.generation.led_model import Order, follow
from apertus_mlx.model.split import part_of

PROMPT: Order = {"rows": [[1, None, 0]], "shape": [1, 64], "gone": []}


class LastSum:
    """Asks the other rank for the last sum of a pass alone, to which that never adds.

    Of more work MLX would wait for a part as soon as it is begun, while other threads run.
    """

    def __init__(self, ranks: Ranks, passed: int) -> None:
        self.ranks, self.passed = ranks, passed

    def sum(self, x: mx.array) -> mx.array:
        self.passed -= 1
        return x if self.passed >= 0 else self.ranks.sum(x)


def wait_in(case: str, ranks: Ranks, folder: Path, orders: Iterator[Order]) -> None:
    part = part_of(take_inventory(folder), ranks.size, ranks.rank)
    # Of the embedding one, and two of each layer.
    links = LastSum(ranks, 2 * part.config.num_hidden_layers)
    model = load_inventory(part, "float32", ranks=cast(Ranks, links))
    ranks.any(False)
    if case == "a prompt":
        follow(model, CacheConfig(), lambda ids: ids, with_free_buffers(orders))
        return
    with mlx_limits(10**8, 0):
        next(orders)
        mx.async_eval(ranks.sum(mx.zeros((1,))))


def with_free_buffers(orders: Iterator[Order]) -> Iterator[Order]:
    """MLX gives back nothing, and waits for nothing, where it keeps none."""
    for order in orders:
        mx.eval(mx.ones((10**6,)) + 1)
        yield order


def main(case: str, folder: Path) -> None:
    rank_watch.INTERVAL_S, rank_watch.SILENCE_S = 0.1, 0.6
    several.meet("serve")
    ranks = join()
    assert ranks is not None
    faulthandler.dump_traceback_later(60, exit=True)
    channel = RankChannel(ranks)
    if ranks.rank:
        wait_in(case, ranks, folder, channel.orders())
    else:
        ranks.any(False)
        channel.tell(PROMPT)
        os.kill(os.getpid(), signal.SIGSTOP)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))

"""What rank 0 tells all other ranks to do, in one order for all: lines of JSON."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator, Mapping
from contextlib import suppress
from typing import Any

from apertus_mlx.backend.rank_sockets import connect
from apertus_mlx.backend.ranks import RankLostError, Ranks

# A rank that takes nothing for so long is gone, and `RankWatch` has said so before.
_STUCK_S = 60.0


class RankChannel:
    """From rank 0 to all others; every rank has to make one at the same time.

    Raises:
        NotFoundError: a rank cannot be reached.
    """

    def __init__(self, ranks: Ranks) -> None:
        self._others = list(connect(ranks).values())
        for each in self._others:
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            each.settimeout(_STUCK_S if ranks.rank == 0 else None)

    def tell(self, order: Mapping[str, Any]) -> None:
        """Of rank 0: send an order.

        Raises:
            RankLostError: a rank is gone.
        """
        line = json.dumps(order).encode() + b"\n"
        try:
            for each in self._others:
                each.sendall(line)
        except OSError:
            raise RankLostError("the connection to another rank was lost") from None

    def orders(self) -> Iterator[dict[str, Any]]:
        """Of the others: all orders, as they come.

        Raises:
            RankLostError: rank 0 is gone.
        """
        with suppress(OSError), self._others[0].makefile("rb") as lines:
            for line in lines:
                if line.endswith(b"\n"):  # else rank 0 has died over it
                    yield json.loads(line)
        raise RankLostError("the connection to rank 0 was lost")

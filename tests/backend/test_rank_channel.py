"""Orders of rank 0: they come whole and in order, and an end of rank 0 is noticed."""

from __future__ import annotations

import socket

import pytest

from apertus_mlx.backend import rank_channel
from apertus_mlx.backend.rank_channel import RankChannel
from apertus_mlx.backend.ranks import RankLostError, Ranks


def test_orders(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        here = socket.create_connection(server.getsockname())
        there, _ = server.accept()
    ends = [{1: here}, {0: there}]
    monkeypatch.setattr(rank_channel, "connect", lambda ranks: ends[ranks.rank])
    first, second = (RankChannel(Ranks(rank, 2, (), None)) for rank in (0, 1))  # type: ignore[arg-type]
    told = [{"rows": [[number, None, 0]], "text": "ä\n"} for number in range(300)]
    for order in told:
        first.tell(order)
    here.sendall(b'{"rows": ')
    here.close()
    heard = second.orders()
    assert [next(heard) for _ in told] == told
    with pytest.raises(RankLostError, match="the connection to rank 0 was lost"):
        next(heard)
    with pytest.raises(RankLostError, match="the connection to another rank was lost"):
        first.tell({})

"""Who of several ranks says what has failed."""

from __future__ import annotations

import socket
import threading
from queue import SimpleQueue
from types import SimpleNamespace
from typing import Any

import pytest

from apertus_mlx.backend import rank_watch
from apertus_mlx.backend.rank_watch import RankWatch
from apertus_mlx.errors import NotFoundError

RANK_0_FAILED = bytes([254])


@pytest.mark.parametrize("heard_by", ["the thread", "nobody"])
def test_what_befalls_rank_0_too_is_left_to_it(
    monkeypatch: pytest.MonkeyPatch, heard_by: str
) -> None:
    """Whether the thread that watches has taken the news, or it is still on its way."""
    ours, theirs = socket.socketpair()
    heard = threading.Event()
    ranks: Any = SimpleNamespace(rank=1, size=2, hosts=None, name=lambda rank: f"rank {rank}")

    def pause(_: float) -> None:
        heard.set()
        # Until this rank is on its way out as well.
        watch._closing.wait()

    monkeypatch.setattr(rank_watch, "connect", lambda _: {0: ours})
    monkeypatch.setattr(rank_watch.time, "sleep", pause)
    watch = RankWatch(ranks, lambda *_: None)
    if heard_by == "the thread":
        theirs.send(RANK_0_FAILED)
        assert heard.wait(30)
    else:
        watch._closing.set()
        watch._thread.join()
        theirs.send(RANK_0_FAILED)
    theirs.shutdown(socket.SHUT_WR)
    assert not watch.leave(2)
    theirs.close()


def test_a_rank_that_fails_alone_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = socket.socketpair()
    ranks: Any = SimpleNamespace(rank=1, size=2, hosts=None, name=lambda rank: f"rank {rank}")
    monkeypatch.setattr(rank_watch, "connect", lambda _: {0: ours})
    watch = RankWatch(ranks, lambda *_: None)
    watch._closing.set()
    watch._thread.join()
    theirs.shutdown(socket.SHUT_WR)
    assert watch.leave(2)
    theirs.close()


def test_a_rank_that_stands_still_before_they_are_connected_ends_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """MLX waits for it for ever."""
    told: SimpleQueue[tuple[str | None, int]] = SimpleQueue()

    def connect(_: object) -> None:
        line, code = told.get(timeout=60)
        assert code == 4
        raise NotFoundError(f"ended: {line}")

    monkeypatch.setattr(rank_watch, "MEETING_S", 0)
    monkeypatch.setattr(rank_watch, "connect", connect)
    ranks: Any = SimpleNamespace(rank=1, size=2, hosts=None)
    with pytest.raises(NotFoundError, match="ended: another rank has been silent for 0 s"):
        RankWatch(ranks, lambda *given: told.put(given))


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_dies_before_they_are_connected_is_no_bug(rank: int) -> None:
    def shared(_: object) -> list[int]:
        raise RuntimeError("[ring] connection to a peer was lost")

    ranks: Any = SimpleNamespace(rank=rank, size=2, hosts=(), shared=shared)
    with pytest.raises(NotFoundError, match="the connection to another rank was lost"):
        RankWatch(ranks, lambda *_: None)

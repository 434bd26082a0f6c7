"""Notices that a rank is gone: MLX may wait for one for ever, as for a machine without its cable.

Rank 0 has a connection to each other one. Over it both say every second that they are there, and
at the end how it went. It leaves the numbers to MLX and carries single bytes.
"""

from __future__ import annotations

import selectors
import threading
import time
from collections.abc import Callable
from contextlib import suppress

from apertus_mlx.backend.rank_sockets import connect
from apertus_mlx.backend.ranks import MEETING_S, Ranks
from apertus_mlx.errors import NotFoundError

INTERVAL_S = 1.0
# A machine that has said nothing for so long is gone.
SILENCE_S = 10.0
# Time for a rank to say by itself what has befallen all of them, before others speak for it.
GRACE_S = 1.0
# The exit code of what Ctrl-C ends.
INTERRUPTED = 130
# Bytes; any other one is the number of a rank that is gone.
_THERE, _INTERRUPTED, _FAILED, _DONE = 0, 253, 254, 255
MOST_RANKS = _INTERRUPTED


class RankWatch:
    """Watches the other ranks from a thread until this one ends.

    `on_loss` is called in that thread, once, with a line that names the rank that is gone, or None
    where another one tells it, and the exit code; it has to end the process. `is_abandoned` tells
    whether whoever started this rank is gone, which then ends as by Ctrl-C.
    """

    def __init__(
        self,
        ranks: Ranks,
        on_loss: Callable[[str | None, int], None],
        is_abandoned: Callable[[], bool] = lambda: False,
    ) -> None:
        """Connect; every rank has to.

        Raises:
            NotFoundError: a rank cannot be reached.
        """
        self._ranks, self._on_loss, self._is_abandoned = ranks, on_loss, is_abandoned
        # Until they are connected, nobody sees that one of them stands still.
        line = f"another rank has been silent for {MEETING_S} s"
        late = threading.Timer(MEETING_S, on_loss, [line, NotFoundError.exit_code])
        late.daemon = True
        late.start()
        try:
            self._others = connect(ranks)
        finally:
            late.cancel()
        self._heard = dict.fromkeys(self._others, time.monotonic())
        self._ended: set[int] = set()
        self._failed: set[int] = set()
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="ranks", daemon=True)
        self._thread.start()

    def leave(self, code: int) -> bool:
        """Tell the others with which exit code this rank ends, and stop watching.

        Returns whether this rank is to say what failed: rank 0 always, another one where rank 0
        has not failed, too.
        """
        self._closing.set()
        self._thread.join(3 * INTERVAL_S)
        self._tell({0: _DONE, INTERRUPTED: _INTERRUPTED}.get(code, _FAILED))
        # The thread may have heard of it before it was stopped.
        speaks = 0 not in self._failed
        if speaks and code not in (0, INTERRUPTED) and self._ranks.rank:
            # Rank 0 lets its time of grace pass before it says anything, or ends.
            self._others[0].settimeout(SILENCE_S)
            with suppress(OSError):
                while speaks and (heard := self._others[0].recv(64)):
                    speaks = _FAILED not in heard
        for connection in self._others.values():
            connection.close()
        return speaks

    def _run(self) -> None:
        with selectors.DefaultSelector() as selector:
            for rank, connection in self._others.items():
                connection.setblocking(False)
                selector.register(connection, selectors.EVENT_READ, rank)
            told = 0.0
            while not self._closing.is_set():
                # First what has come: this process itself may have stood still.
                for key, _ in selector.select(INTERVAL_S / 4):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                now = time.monotonic()
                if now - told > INTERVAL_S:
                    self._tell(_THERE)
                    told = now
                    if self._is_abandoned():
                        self._tell(_INTERRUPTED)
                        self._on_loss(None, INTERRUPTED)
                for rank in self._others.keys() - self._ended:
                    if now - self._heard[rank] > SILENCE_S:
                        self._lose(rank, f"has been silent for {SILENCE_S:.0f} s")

    def _hear(self, rank: int) -> bool:
        """Take what a rank says; returns whether there may be more."""
        try:
            heard = self._others[rank].recv(64)
        except BlockingIOError:
            return True
        except OSError:
            heard = b""
        self._heard[rank] = time.monotonic()
        if _DONE in heard:
            self._ended.add(rank)
        elif _INTERRUPTED in heard:
            # It may be on its way to this rank, too.
            time.sleep(GRACE_S)
            self._lose(rank, "was interrupted", code=INTERRUPTED)
        elif _FAILED in heard:
            self._failed.add(rank)
            # What it is befalls all of them as a rule; whoever is on the way to say it may.
            time.sleep(GRACE_S)
            self._lose(rank, "has failed", tells_itself=True)
        elif gone := [byte for byte in heard if byte != _THERE]:
            self._lose(gone[0], "is gone", tells_itself=True)
        elif not heard and rank not in self._ended:
            time.sleep(GRACE_S)
            self._lose(rank, "is gone: its process has ended")
        return bool(heard)

    def _lose(
        self, rank: int, how: str, tells_itself: bool = False, code: int = NotFoundError.exit_code
    ) -> None:
        if self._closing.is_set():
            return
        if self._ranks.rank == 0:
            self._tell(rank if code != INTERRUPTED else _INTERRUPTED)
        line = f"{self._ranks.name(rank)} {how}"
        # Rank 0 speaks, and of rank 0 its neighbour.
        silent = tells_itself or self._ranks.rank > 1 or code == INTERRUPTED
        self._on_loss(None if silent else line, code)

    def _tell(self, byte: int) -> None:
        for connection in self._others.values():
            with suppress(OSError):
                connection.send(bytes([byte]))

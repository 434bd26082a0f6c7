"""A command on several machines: it meets the other ranks, rank 0 speaks, all end together."""

from __future__ import annotations

import os
import select
import signal
import stat
import time
from collections.abc import Callable
from functools import partial
from threading import Timer
from typing import TYPE_CHECKING

from apertus_mlx.cli import sink
from apertus_mlx.errors import UsageError

if TYPE_CHECKING:
    from apertus_mlx.backend.rank_watch import RankWatch

COMMANDS = ("generate", "chat", "serve", "bench")
# Longer than the watch takes to find out which rank is gone.
VERDICT_S = 15.0
# The longest that a rank waits for whoever reads what it prints, where all of them end.
PRINTING_S = 5.0
_watches: list[RankWatch] = []


def meet(command: str | None) -> None:
    """Meet the other ranks, if `mlx.launch` has started this process as one of several.

    Raises:
        UsageError: the command is for one machine.
        NotFoundError: the ranks cannot reach each other.
    """
    if "MLX_RANK" not in os.environ or command is None:
        return
    from apertus_mlx.backend.rank_watch import RankWatch
    from apertus_mlx.backend.ranks import join

    ranks = join()
    if ranks is None:
        return
    if ranks.rank:
        sink.hush()
    if signal.getsignal(signal.SIGHUP) is signal.SIG_DFL:
        # On other machines Ctrl-C ends ssh, which then hangs up.
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGINT))
    _watches.append(RankWatch(ranks, _end, partial(_is_abandoned, os.getppid())))
    if command not in COMMANDS:
        raise UsageError(
            f"{command}: computes on one machine; mlx.launch can start {', '.join(COMMANDS)}"
        )


def is_one_of_many() -> bool:
    """Whether this process computes together with others."""
    return bool(_watches)


def speaks() -> bool:
    """Whether this process has the files and the terminal of whoever sits there."""
    from apertus_mlx.backend.ranks import joined

    ranks = joined()
    return ranks is None or ranks.rank == 0


def of_rank_0(find: Callable[[], str]) -> str:
    """What rank 0 finds, which is no empty text; every rank has to ask.

    Raises:
        Exception: what rank 0 met; on the others a `UsageError`.
    """
    from apertus_mlx.backend.ranks import joined

    ranks = joined()
    if ranks is None:
        return find()
    found, met = "", None
    try:
        found = find() if ranks.rank == 0 else ""
    except Exception as error:  # noqa: BLE001 - whatever it is, the others wait
        met = error
    told = bytes(ranks.shared(list(found.encode()))).decode()
    if met is not None:
        raise met
    if not told:
        raise UsageError("rank 0 has found nothing")
    return told


def explain_loss(error: Exception) -> Exception:
    """What an error means where ranks compute together; for a lost one the watch says which.

    Does not return if the watch ends the process.
    """
    if not _watches:
        return error
    from apertus_mlx.backend.ranks import lost

    known = lost(error)
    if known is not None:
        time.sleep(VERDICT_S)
    return known or error


def leave(code: int) -> str:
    """Tell the other ranks with which exit code this one ends.

    Returns what its error begins with; it is printed where rank 0 does not fail as well.
    """
    if not _watches:
        return ""
    from apertus_mlx.backend.ranks import joined

    speaks, ranks = _watches.pop().leave(code), joined()
    if ranks is None or ranks.rank == 0:
        return ""
    sink.hush(not speaks)
    return f"{ranks.name(ranks.rank)}: "


def _is_abandoned(parent: int) -> bool:
    """Whether `mlx.launch` is gone, which started this process and wrote to its stdin."""
    if os.getppid() == parent or not stat.S_ISFIFO(os.fstat(0).st_mode):
        return False
    pipe = select.poll()
    pipe.register(0, 0)
    return any(events & select.POLLHUP for _, events in pipe.poll(0))


def _end(line: str | None, code: int) -> None:
    """End the process, though its main thread may wait for MLX for ever."""
    try:
        late = Timer(PRINTING_S, os._exit, [code])
        late.daemon = True
        late.start()
        sink.finish()
        if line is not None:
            sink.hush(False)
            sink.note(f"error: {line}; all ranks end")
    finally:
        os._exit(code)

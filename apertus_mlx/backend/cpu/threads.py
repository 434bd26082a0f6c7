"""How many threads compute on the CPU."""

from __future__ import annotations

import os

from apertus_mlx.backend import hardware
from apertus_mlx.errors import UsageError

THREADS_VARIABLE = "APERTUS_MLX_THREADS"


def thread_count() -> int:
    """What `APERTUS_MLX_THREADS` says, else one for each core.

    Raises:
        UsageError: it says no number, or more than this machine has processors: threads that wait
            for others keep a processor busy, and 16 of them on 2 take a hundred times as long.
    """
    stated = os.environ.get(THREADS_VARIABLE, "")
    if not stated:
        return hardware.physical_cores()
    most = hardware.processors()
    if not (stated.isascii() and stated.isdecimal() and len(stated) < 10):
        raise UsageError(f"{THREADS_VARIABLE}={stated[:40]!r}: expected a number from 1 to {most}")
    if not 1 <= int(stated) <= most:
        raise UsageError(
            f"{THREADS_VARIABLE}={stated}: expected 1 to {most}, the processors of this machine"
        )
    return int(stated)

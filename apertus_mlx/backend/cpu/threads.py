"""How many threads compute on the CPU."""

from __future__ import annotations

import os
from pathlib import Path

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
        return physical_cores()
    most = os.cpu_count() or 1
    if not (stated.isascii() and stated.isdecimal() and len(stated) < 10):
        raise UsageError(f"{THREADS_VARIABLE}={stated[:40]!r}: expected a number from 1 to {most}")
    if not 1 <= int(stated) <= most:
        raise UsageError(
            f"{THREADS_VARIABLE}={stated}: expected 1 to {most}, the processors of this machine"
        )
    return int(stated)


def physical_cores() -> int:
    """Cores this process may run on; two hardware threads of one core count once."""
    if not hasattr(os, "sched_getaffinity"):
        return max(1, os.cpu_count() or 1)
    cores = set()
    for cpu in os.sched_getaffinity(0):
        path = Path(f"/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list")
        try:
            cores.add(path.read_text())
        except OSError:
            cores.add(str(cpu))
    return max(1, min(len(cores), _quota()))


def _quota() -> int:
    """Whole cores that a container's limit (cgroup v2) leaves; spinning beyond it stalls."""
    try:
        limit, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, int(limit) // int(period))
    except (OSError, ValueError):
        return os.cpu_count() or 1

"""This machine: what it can give a run, and MLX's limits for as long as the run lasts."""

from __future__ import annotations

import os
import resource
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx

# MLX starts to collect garbage at this share of what Metal recommends.
WORKING_SET_SHARE = 0.95
AVAILABLE_SHARE = 0.9


def on_gpu() -> bool:
    """Whether MLX computes on a GPU here."""
    return bool(mx.default_device() != mx.cpu)


def available_bytes(gpu: bool | None = None) -> int:
    """Memory that a run may take: what Metal recommends, else what the system says is free.

    Only Linux says that; elsewhere it is the machine's whole memory, less a tenth.

    `gpu`: whether MLX's GPU is to compute it; None: where MLX has one.
    """
    working_set = mx.device_info().get("max_recommended_working_set_size")
    if isinstance(working_set, int) and (on_gpu() if gpu is None else gpu):
        return int(WORKING_SET_SHARE * working_set)
    free = [_linux_available(), _control_group_left(), _physical_bytes()]
    return int(AVAILABLE_SHARE * min(size for size in free if size is not None))


def peak_bytes(gpu: bool) -> int:
    """The most memory that this process has held: MLX's where its `gpu` computes, else resident."""
    if gpu:
        return mx.get_peak_memory()
    # What Linux says of a process's resources begins with its parent's peak.
    peak = _kilobytes(Path("/proc/self/status"), "VmHWM:")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


@contextmanager
def mlx_limits(buffer_cache_bytes: int, wired_bytes: int) -> Iterator[None]:
    """Set how much MLX keeps of freed memory, and wires of that in use; restore both at the end."""
    previous = mx.set_cache_limit(buffer_cache_bytes)
    try:
        with _wired(wired_bytes):
            yield
    finally:
        mx.set_cache_limit(previous)
        mx.clear_cache()


@contextmanager
def _wired(size_bytes: int) -> Iterator[None]:
    """Keep up to `size_bytes` resident on a GPU; more than Metal recommends may hang a machine."""
    working_set = mx.device_info().get("max_recommended_working_set_size")
    if not on_gpu() or not isinstance(working_set, int):
        yield
        return
    previous = mx.set_wired_limit(min(size_bytes, int(WORKING_SET_SHARE * working_set)))
    try:
        yield
    finally:
        # Buffers in use by the GPU must not lose their residency.
        mx.synchronize()
        mx.set_wired_limit(previous)


def _linux_available() -> int | None:
    return _kilobytes(Path("/proc/meminfo"), "MemAvailable:")


def _kilobytes(path: Path, name: str) -> int | None:
    """Bytes that Linux gives in kilobytes on the line that begins with `name`."""
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(name)), None)


def _control_group_left() -> int | None:
    folder = Path("/sys/fs/cgroup")
    try:
        most = (folder / "memory.max").read_text().strip()
        used = (folder / "memory.current").read_text().strip()
    except OSError:
        return None
    return int(most) - int(used) if most.isdigit() and used.isdigit() else None


def _physical_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

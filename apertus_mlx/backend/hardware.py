"""What this machine has, and the one place that asks: GPU, chip, processors, memory.

Everything is asked when it is needed. Importing this module imports no MLX: a command that needs
none starts without it.
"""

from __future__ import annotations

import ctypes
import os
import resource
import sys
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

# MLX starts to collect garbage at this share of what Metal recommends.
WORKING_SET_SHARE = 0.95
AVAILABLE_SHARE = 0.9


def has_gpu() -> bool:
    """Whether MLX computes on a GPU here."""
    import mlx.core as mx

    return bool(mx.default_device() != mx.cpu)


def has_metal() -> bool:
    """Whether that GPU, or one that MLX was told not to use, is Apple's."""
    import mlx.core as mx

    return mx.metal.is_available()


def has_cuda() -> bool:
    """Whether MLX computes on a GPU of Nvidia's here."""
    import mlx.core as mx

    return mx.cuda.is_available() and has_gpu()


def mlx_library() -> str:
    """Which of MLX's libraries is loaded: `metal`, `cuda` or `cpu`."""
    import mlx.core as mx

    return "metal" if mx.metal.is_available() else "cuda" if mx.cuda.is_available() else "cpu"


def refuses_slices() -> bool:
    """Whether MLX's quantized products take codes in one piece only, no slice of a larger array."""
    return has_cuda()


def device_info() -> dict[str, str | int]:
    """What MLX says of the device that it computes on."""
    import mlx.core as mx

    return mx.device_info()


def device_name() -> str:
    """What MLX calls that device, such as `Apple M4 Pro`."""
    return str(device_info().get("device_name", os.uname().machine))


def chip_name() -> str | None:
    """What macOS calls the chip, such as `Apple M4 Pro`; None elsewhere."""
    if sys.platform != "darwin":
        return None
    library = ctypes.CDLL(None)
    name, size = b"machdep.cpu.brand_string", ctypes.c_size_t(256)
    value = ctypes.create_string_buffer(size.value)
    if library.sysctlbyname(name, value, ctypes.byref(size), None, 0) != 0:
        return None
    return value.value.decode()


def has_library(name: str) -> bool:
    """Whether the Python package `name` is installed; it is not imported."""
    return find_spec(name) is not None


def processors() -> int:
    """Processors of the machine, hardware threads of one core counted apart."""
    return os.cpu_count() or 1


def usable_processors() -> list[int]:
    """Numbers of the processors that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return sorted(os.sched_getaffinity(0))
    return list(range(processors()))


def physical_cores() -> int:
    """Cores this process may run on; two hardware threads of one core count once on Linux."""
    cores = set()
    for cpu in usable_processors():
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
        return processors()


def working_set_bytes() -> int | None:
    """The most memory that Metal recommends to use at a time; None without Metal."""
    size = device_info().get("max_recommended_working_set_size")
    return size if isinstance(size, int) else None


@dataclass(frozen=True, slots=True)
class Card:
    """A GPU with memory of its own."""

    name: str
    memory_bytes: int
    free_bytes: int


def card() -> Card | None:
    """The GPU that MLX computes on, if it has memory of its own; None for Apple's, and without."""
    info = device_info() if has_gpu() else {}
    memory, free = info.get("total_memory"), info.get("free_memory")
    if not isinstance(memory, int) or not isinstance(free, int):
        return None
    return Card(str(info.get("device_name", "GPU")), memory, free)


def available_bytes(gpu: bool | None = None) -> int:
    """Memory that a run may take: what Metal recommends or the card has free, else the system.

    What is free only Linux says; elsewhere it is the machine's whole memory, less a tenth.

    `gpu`: whether MLX's GPU is to compute it; None: where MLX has one.
    """
    if has_gpu() if gpu is None else gpu:
        working_set, own = working_set_bytes(), card()
        if working_set is not None:
            return int(WORKING_SET_SHARE * working_set)
        if own is not None:
            return int(AVAILABLE_SHARE * own.free_bytes)
    free = [_linux_available(), _control_group_left(), physical_bytes()]
    return int(AVAILABLE_SHARE * min(size for size in free if size is not None))


def peak_bytes(gpu: bool) -> int:
    """The most memory that this process has held: MLX's where its `gpu` computes, else resident."""
    if gpu:
        import mlx.core as mx

        return mx.get_peak_memory()
    # What Linux says of a process's resources begins with its parent's peak.
    peak = _kilobytes(Path("/proc/self/status"), "VmHWM:")
    if peak is not None:
        return peak
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


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


def physical_bytes() -> int:
    """Memory that the machine has."""
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")

"""How much memory MLX keeps and wires, for as long as runs last."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from apertus_mlx.backend import hardware
from apertus_mlx.backend.ranks import settle

_lock = threading.Lock()
# Bytes of freed memory to keep and bytes to wire, for each run; and MLX's own before the first.
_runs: list[tuple[int, int]] = []
_before: list[tuple[int, int | None]] = []


@contextmanager
def mlx_limits(buffer_cache_bytes: int, wired_bytes: int) -> Iterator[None]:
    """Set how much MLX keeps of freed memory, and wires of that in use; restore both at the end.

    Of runs side by side the largest buffer cache counts, and the sum of what is to be wired.
    """
    own = (buffer_cache_bytes, wired_bytes)
    with _lock:
        _runs.append(own)
        previous = _apply()
        if len(_runs) == 1:
            _before.append(previous)
    try:
        yield
    finally:
        with _lock:
            _runs.remove(own)
            if _runs:
                _apply()
            else:
                _set(*_before.pop())
        clear_pool()


def clear_pool() -> None:
    """Give the buffers that MLX keeps, but that are free, back to the system."""
    settle()
    mx.clear_cache()


def _apply() -> tuple[int, int | None]:
    working_set = hardware.working_set_bytes()
    wired = None
    if hardware.has_gpu() and working_set is not None:
        # More than Metal recommends may hang a machine.
        most = int(hardware.WORKING_SET_SHARE * working_set)
        wired = min(sum(wired for _, wired in _runs), most)
    return _set(max(kept for kept, _ in _runs), wired)


def _set(buffer_cache_bytes: int, wired_bytes: int | None) -> tuple[int, int | None]:
    """Set both and return what they were; None leaves the wired limit alone."""
    settle()
    previous = mx.set_cache_limit(buffer_cache_bytes)
    if wired_bytes is None:
        return previous, None
    # Buffers in use by the GPU must not lose their residency.
    mx.synchronize()
    return previous, mx.set_wired_limit(wired_bytes)

"""How much memory MLX keeps and wires, for as long as a run lasts."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx

from apertus_mlx.backend import hardware


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
    working_set = hardware.working_set_bytes()
    if not hardware.has_gpu() or working_set is None:
        yield
        return
    previous = mx.set_wired_limit(min(size_bytes, int(hardware.WORKING_SET_SHARE * working_set)))
    try:
        yield
    finally:
        # Buffers in use by the GPU must not lose their residency.
        mx.synchronize()
        mx.set_wired_limit(previous)

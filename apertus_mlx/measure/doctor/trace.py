"""What can be said of a kernel without Metal: whether its text and its launch can be made."""

from __future__ import annotations

import tempfile
from pathlib import Path

import mlx.core as mx

from apertus_mlx.backend.metal.kernel import Kernel, build


def trace(kernel: Kernel) -> str | None:
    """Put `kernel` into a graph as MLX would call it; the reason if that fails."""
    try:
        run = build(kernel)
        inputs = kernel.trial(0)
        with tempfile.TemporaryDirectory() as folder:  # noqa: TID251 - some kB, for a moment
            path = Path(folder) / "kernel.mlxfn"
            mx.export_function(str(path), lambda *arrays: run(arrays), *inputs)
            held = kernel.text().source.strip().encode() in path.read_bytes()
    except Exception as error:  # noqa: BLE001 - whatever it is, the kernel is off
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return None if held else "MLX does not keep its text"

"""A GPU with memory of its own that takes no slices: MLX here, with what CUDA says and refuses."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest

NAME = "NVIDIA H100 80GB HBM3"
REFUSAL = "[quantized_matmul] No implementation for problem shape: 1x64x300x8, transpose: true."


def refuse_slices(patch: pytest.MonkeyPatch) -> None:
    """MLX's quantized product takes whole arrays only, as on CUDA."""
    product = mx.quantized_matmul

    def whole_only(x: mx.array, *codes: mx.array, **settings: Any) -> mx.array:
        mx.eval(codes)
        if not all(memoryview(array).c_contiguous for array in codes):
            raise RuntimeError(REFUSAL)
        return product(x, *codes, **settings)

    patch.setattr(mx, "quantized_matmul", whole_only)


@contextmanager
def simulated_card(
    total_bytes: int = 85 * 10**9, free_bytes: int = 80 * 10**9
) -> Iterator[pytest.MonkeyPatch]:
    """MLX as if it computed on a card; nothing is compiled, for that takes a C++ compiler here."""
    said = {
        "device_name": NAME, "architecture": "sm_90", "uuid": "GPU-0", "total_memory": total_bytes,
        "free_memory": free_bytes, "compute_capability_major": 9,
    }  # fmt: skip
    mx.disable_compile()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mx, "default_device", object)
            patch.setattr(mx, "gpu", mx.cpu)
            patch.setattr(mx, "device_info", lambda: dict(said))
            patch.setattr(mx.cuda, "is_available", lambda: True)
            refuse_slices(patch)
            yield patch
    finally:
        mx.enable_compile()

"""MLX here as if it computed on a GPU: with what it says of one, and what it refuses there.

`pytest --simulated card` and `pytest --simulated mac` run all tests so; processes that they start
compute as ever. Nothing is compiled, for that takes a C++ compiler here, and no kernel of this
package is in use.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
import pytest

NAME = "NVIDIA H100 80GB HBM3"
MAC = "Apple M4 Pro"
REFUSAL = "[quantized_matmul] No implementation for problem shape: 1x64x300x8, transpose: true."
GPU = mx.Device(mx.gpu, 0)
# Of MLX, what makes or takes a device's stream.
STREAMS = ("default_stream", "new_stream", "new_thread_local_stream", "new_thread_unsafe_stream")
# One may be simulated within another: all tests on a Mac, and one of them on a card.
_within: list[object] = []


@contextmanager
def simulated_card(
    total_bytes: int = 85 * 10**9, free_bytes: int = 80 * 10**9
) -> Iterator[pytest.MonkeyPatch]:
    """A GPU with memory of its own that takes no slices: what CUDA says and refuses."""
    said = {
        "device_name": NAME, "architecture": "sm_90", "uuid": "GPU-0", "total_memory": total_bytes,
        "free_memory": free_bytes, "compute_capability_major": 9,
    }  # fmt: skip
    with _gpu(said) as patch:
        patch.setattr(mx.metal, "is_available", lambda: False)
        patch.setattr(mx.cuda, "is_available", lambda: True)
        refuse_slices(patch, lambda: bool(mx.default_device() != mx.cpu))
        yield patch


@contextmanager
def simulated_mac() -> Iterator[pytest.MonkeyPatch]:
    """Apple's GPU in a machine of 48 GB."""
    said = {
        "device_name": MAC, "architecture": "applegpu_g16s", "memory_size": 48 * 2**30,
        "max_recommended_working_set_size": 36 * 2**30, "max_buffer_length": 27 * 2**30,
        "resource_limit": 499_000,
    }  # fmt: skip
    with _gpu(said) as patch:
        patch.setattr(mx.metal, "is_available", lambda: True)
        yield patch


SIMULATED = {"card": simulated_card, "mac": simulated_mac}


def refuse_slices(patch: pytest.MonkeyPatch, here: Callable[[], bool] = lambda: True) -> None:
    """MLX's quantized product takes whole arrays only, as on CUDA; `here`: whether it does now."""
    product = mx.quantized_matmul

    def whole_only(x: mx.array, *codes: mx.array, **settings: Any) -> mx.array:
        given = [each for each in (*codes, *settings.values()) if isinstance(each, mx.array)]
        mx.eval(given)
        if here() and not all(map(_in_one_piece, given)):
            raise RuntimeError(REFUSAL)
        return product(x, *codes, **settings)

    patch.setattr(mx, "quantized_matmul", whole_only)


def _in_one_piece(array: mx.array) -> bool:
    # No buffer has a type of Python's for bfloat16; a view has the same strides.
    viewed = array.view(mx.uint16) if array.dtype == mx.bfloat16 else array
    return memoryview(viewed).c_contiguous


@contextmanager
def _gpu(said: Mapping[str, str | int]) -> Iterator[pytest.MonkeyPatch]:
    in_use: list[Any] = [GPU]
    _within.append(said)
    mx.disable_compile()
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mx, "default_device", lambda: in_use[-1])
            patch.setattr(mx, "set_default_device", in_use.append)
            for name in STREAMS:
                patch.setattr(mx, name, _of_the_processor(getattr(mx, name)))
            patch.setattr(mx, "device_info", lambda: dict(said))
            yield patch
    finally:
        _within.pop()
        if not _within:
            mx.enable_compile()


def _of_the_processor(stream: Callable[[Any], Any]) -> Callable[[Any], Any]:
    return lambda device: stream(mx.cpu)

"""`metal_kernel`: called like `mx.fast.metal_kernel`, but the kernel runs on the processor."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import numpy as np

from apertus_mlx.backend.metal.kernel import KernelText

from .compile import Options, library
from .errors import HarnessError
from .mlx_text import Array, GeneratedKernel, generate
from .run import CPU_LIMIT_S, SCHEDULES, Contents, Extent, Schedule, check_extent, load, run
from .translate import to_cpp

BUFFERS_LIMIT = 31
THREADS_LIMIT = 1024


def metal_kernel(
    name: str,
    input_names: Sequence[str],
    output_names: Sequence[str],
    source: str,
    header: str = "",
    *,
    schedules: Sequence[Schedule] = SCHEDULES,
    contracts: bool = False,
    reduces_pairwise: bool = False,
    cpu_limit_s: float = CPU_LIMIT_S,
) -> Callable[..., list[mx.array]]:
    """A function that runs the kernel; it takes what this project's kernels need of MLX's.

    Args:
        name: as in MLX, like all before `schedules`.
        input_names: names of the inputs.
        output_names: names of the outputs.
        source: the body of the kernel.
        header: what comes before it.
        schedules: ways to run each launch; the outputs must be equal in all.
        contracts: whether the compiler may contract a * b + c, which Metal's may.
        reduces_pairwise: whether simd_sum and the like combine pairwise, not in lane order.
        cpu_limit_s: processor time after which a launch counts as endless.
    """
    text = KernelText(name, tuple(input_names), tuple(output_names), source, header)

    def launch(
        *,
        inputs: Sequence[Any],
        output_shapes: Sequence[Sequence[int]],
        output_dtypes: Sequence[mx.Dtype],
        grid: tuple[int, int, int],
        threadgroup: tuple[int, int, int],
    ) -> list[mx.array]:
        arrays = [mx.contiguous(mx.array(value)) for value in inputs]
        outputs = tuple(
            Array(tuple(shape), dtype)
            for shape, dtype in zip(output_shapes, output_dtypes, strict=True)
        )
        kernel = generate(text, tuple(map(Array.of, arrays)), outputs)
        check_extent(grid, threadgroup, THREADS_LIMIT)
        named = _buffers(kernel, text, arrays, outputs)
        if len(named) > BUFFERS_LIMIT:
            raise HarnessError(f"{len(named)} buffers; Metal has {BUFFERS_LIMIT}")
        written = run(
            load(library(to_cpp(kernel), Options(contracts))),
            [contents for _, contents in named],
            [buffer for buffer, _ in named],
            Extent(grid, threadgroup, reduces_pairwise),
            schedules,
            cpu_limit_s,
        )
        return [_array(data, output) for data, output in zip(written, outputs, strict=True)]

    return launch


def _buffers(
    kernel: GeneratedKernel,
    text: KernelText,
    inputs: Sequence[mx.array],
    outputs: Sequence[Array],
) -> list[tuple[str, Contents]]:
    """Name and contents of each buffer, in the order of the kernel's parameters."""
    known: dict[str, Contents] = {}
    for name, array in zip(text.input_names, inputs, strict=True):
        known[name] = _bytes(array)
        known[f"{name}_shape"] = np.array(array.shape, np.int32).tobytes()
        known[f"{name}_strides"] = _row_strides(array.shape).tobytes()
        known[f"{name}_ndim"] = np.int32(array.ndim).tobytes()
    for name, output in zip(text.output_names, outputs, strict=True):
        known[name] = math.prod(output.shape) * output.dtype.size
    return [
        (parameter.name, known[parameter.name])
        for parameter in kernel.parameters
        if parameter.buffer is not None
    ]


def _row_strides(shape: Sequence[int]) -> np.ndarray[Any, np.dtype[np.int64]]:
    """In elements, as MLX counts them."""
    return np.array([math.prod(shape[axis + 1 :]) for axis in range(len(shape))], np.int64)


def _bytes(array: mx.array) -> bytes:
    return np.array(array.reshape(-1).view(mx.uint8)).tobytes()


def _array(data: bytes, like: Array) -> mx.array:
    flat = mx.array(np.frombuffer(data, np.uint8))
    return flat.view(like.dtype).reshape(like.shape)

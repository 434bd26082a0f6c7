"""From a kernel's text for Metal to CUDA: another signature around the same header and body."""

from __future__ import annotations

import re
from pathlib import Path

from tests.metal_harness.mlx_text import GeneratedKernel
from tests.metal_harness.translate import THREADGROUP_VARIABLE

SHIM = Path(__file__).with_name("shim.cuh")
FUNCTION = "kernel"
# Metal's attribute of a thread -> its type, and what it is in CUDA.
ATTRIBUTES = {
    "thread_position_in_grid": (
        "uint3",
        "make_uint3(blockIdx.x * blockDim.x + threadIdx.x, blockIdx.y * blockDim.y + threadIdx.y, "
        "blockIdx.z * blockDim.z + threadIdx.z)",
    ),
    "threadgroup_position_in_grid": ("uint3", "make_uint3(blockIdx.x, blockIdx.y, blockIdx.z)"),
    "thread_position_in_threadgroup": (
        "uint3",
        "make_uint3(threadIdx.x, threadIdx.y, threadIdx.z)",
    ),
    "thread_index_in_threadgroup": ("uint", "metal_thread()"),
    "thread_index_in_simdgroup": ("uint", "metal_thread() & 31u"),
    "simdgroup_index_in_threadgroup": ("uint", "metal_thread() >> 5"),
}
# NVRTC has no <cstdint>; MLX's own text has.
INTEGERS = (
    "using uint8_t = unsigned char; using uint16_t = unsigned short;\n"
    "using uint32_t = unsigned int; using int32_t = int;\n"
)
BARRIER = re.compile(r"metal::threadgroup_barrier\([^;]*\);")


def to_cuda(kernel: GeneratedKernel) -> str:
    """A file for NVRTC with the function `kernel`; see `cuda_body` for what changes.

    Raises:
        ValueError: a parameter that CUDA has no counterpart of.
    """
    parameters, lines = [], []
    for parameter in kernel.parameters:
        if parameter.buffer is None:
            lines.append(attribute(parameter.name))
        elif parameter.is_reference:
            parameters.append(f"{parameter.pointee}* {parameter.name}_at")
            lines.append(f"  {parameter.pointee}& {parameter.name} = *{parameter.name}_at;\n")
        else:
            parameters.append(f"{parameter.type} {parameter.name}")
    buffers = [each.buffer for each in kernel.parameters if each.buffer is not None]
    if buffers != list(range(len(buffers))):
        raise ValueError(f"{kernel.function}: buffers {buffers} are not in order")
    return (
        f'#include "{SHIM.name}"\n{INTEGERS}using namespace metal;\n'
        f'#line 1 "header"\n{kernel.header}\n'
        f'#line 1 "signature"\nextern "C" __global__ void {FUNCTION}({", ".join(parameters)}) {{\n'
        f'{"".join(lines)}#line 1 "body"\n{cuda_body(kernel.body)}\n}}\n'
    )


def cuda_body(body: str) -> str:
    """The body with its variables in threadgroup memory declared as CUDA does; else the same."""
    return THREADGROUP_VARIABLE.sub(r"__shared__ \g<type> \g<name>\g<sizes>\g<end>", body)


def attribute(name: str) -> str:
    """The line that declares an attribute of the thread."""
    if name not in ATTRIBUTES:
        raise ValueError(f"[[{name}]] has no counterpart here")
    kind, value = ATTRIBUTES[name]
    return f"  const {kind} {name} = {value};\n"


def without_barriers(text: str) -> str:
    """The same with every barrier of a threadgroup taken out, which racecheck has to see."""
    return BARRIER.sub("", text)


def writing_beyond(text: str, output: str, size: int) -> str:
    """The same with a write behind the `size` numbers of `output`, which memcheck has to see."""
    end = text.rindex("}")
    planted = f"  if (metal_thread() == 0) {output}[{size}] = {output}[0];\n"
    return text[:end] + planted + text[end:]

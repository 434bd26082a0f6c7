"""The kernels inside MLX on CUDA: each alone, then the whole model with all that are right."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import mlx.core as mx

from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.backend.metal.needed import kernels_for
from apertus_mlx.backend.mlx import DTYPES
from apertus_mlx.checkpoint.inventory import take_inventory
from apertus_mlx.measure.doctor.mlx_device import MLXDevice
from benchmarks.kernels_on_cuda.translate import ATTRIBUTES, SHIM, attribute, cuda_body


def cuda_text(source: str, header: str) -> tuple[str, str]:
    """Body and header for `mx.fast.cuda_kernel`, which writes the signature itself."""
    used = [name for name in ATTRIBUTES if re.search(rf"\b{name}\b", source)]
    # MLX has included what the shim includes.
    shim = re.sub(r"(?m)^#(pragma once|include .*)\n", "", SHIM.read_text())
    return "".join(map(attribute, used)) + cuda_body(source), f"{shim}\n{header}"


def cuda_kernel(
    name: str, inputs: tuple[str, ...], outputs: tuple[str, ...], source: str, header: str = ""
) -> Callable[..., list[mx.array]]:
    """What `mx.fast.metal_kernel` makes, made of the same text by `mx.fast.cuda_kernel`."""
    make: Any = mx.fast.cuda_kernel
    made: Callable[..., list[mx.array]] = make(
        name, list(inputs), list(outputs), *cuda_text(source, header)
    )
    return made


def compare(directory: Path, dtype: str) -> Iterator[tuple[bool, str]]:
    """What the doctor measures on a Mac: whether it is right, and a line of words for each."""
    inventory = take_inventory(directory)
    device = MLXDevice(inventory, dtype, cuda_kernel)
    right: dict[str, Kernel] = {}
    for kernel in kernels_for(inventory.config, inventory.specs, DTYPES[dtype]):
        if kernel.place in right:
            continue
        found = device.attempt(kernel)
        fault = found.fault(kernel.tolerance)
        yield fault is None, f"{kernel.key}: {fault or f'error {found.error:.1e}'}"
        if fault is None:
            right[kernel.place] = kernel
    for words, compiled in (("whole model", False), ("whole model, compiled step", True)):
        seen = device.agreement(right, compiled)
        line = f"{words}: {seen.same} of {seen.tokens} greedy tokens the same, logits differ by "
        yield seen.fault() is None, f"{line}{seen.error:.1e}, at most {seen.bound:.0e}"

"""Kernels in a folder, with inputs and what float64 makes of them; and running them from there."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from benchmarks.kernels_on_cuda.translate import (
    FUNCTION,
    SHIM,
    to_cuda,
    without_barriers,
    writing_beyond,
)

# Model, bits, group size and type: every kind of kernel in every type, and every way to pack codes.
CASES = (
    ("0.5B", 4, 64, "bfloat16"), ("0.5B", 3, 64, "float16"), ("0.5B", 6, 32, "float32"),
    ("8B", 2, 64, "bfloat16"),
)  # fmt: skip
# Larger inputs take minutes in float64.
MOST_BYTES = 90 * 10**6
REPEATS = 3
# Of NVRTC, for a thread's functions that do not say that they are for the GPU.
OPTIONS = ("--device-as-default-execution-space", "--std=c++17", "-lineinfo")
FAULTS = ("none", "no-barriers", "out-of-bounds")
STORED = {"bfloat16": "uint16", "float16": "uint16"}


@dataclass(frozen=True, slots=True)
class Trial:
    """A kernel in a folder: `INDEX.cu`, `INDEX.in*.npy` and `INDEX.exact*.npy`."""

    index: int
    key: str
    tolerance: float
    grid: list[int]
    threadgroup: list[int]
    inputs: int
    outputs: list[str]
    shapes: list[list[int]]
    dtypes: list[str]


def write(
    folder: Path,
    cases: tuple[tuple[str, int, int, str], ...] = CASES,
    most_bytes: int = MOST_BYTES,
) -> list[Trial]:
    """Write a kernel for each place of these models; needs no GPU."""
    import mlx.core as mx

    from apertus_mlx.backend.mlx import DTYPES
    from apertus_mlx.quant.spec import QuantSpec
    from tests import metal_cases
    from tests.metal_harness.mlx_text import generate_for

    folder.mkdir(parents=True)
    shutil.copy(SHIM, folder)
    trials: list[Trial] = []
    places: set[str] = set()
    for name, bits, group_size, dtype in cases:
        for kernel in metal_cases.needed(name, QuantSpec(bits, group_size), DTYPES[dtype]):
            inputs = kernel.trial(0)
            if kernel.place in places or sum(array.nbytes for array in inputs) > most_bytes:
                continue
            places.add(kernel.place)
            index, launch, text = len(trials), kernel.launch(inputs), kernel.text()
            (folder / f"{index}.cu").write_text(to_cuda(generate_for(kernel)))
            for number, array in enumerate(inputs):
                wide = array.view(mx.uint16) if array.dtype in (mx.bfloat16, mx.float16) else array
                np.save(folder / f"{index}.in{number}.npy", np.array(wide))
            for number, exact in enumerate(kernel.exact(inputs)):
                np.save(folder / f"{index}.exact{number}.npy", exact)
            trials.append(
                Trial(
                    index, kernel.key, kernel.tolerance, list(launch.grid),
                    list(launch.threadgroup), len(inputs), list(text.output_names),
                    [list(shape) for shape in launch.output_shapes],
                    [str(each).rpartition(".")[2] for each in launch.output_dtypes],
                )
            )  # fmt: skip
    (folder / "trials.json").write_text(json.dumps([asdict(trial) for trial in trials], indent=1))
    return trials


def read(folder: Path) -> list[Trial]:
    """What `write` wrote."""
    return [Trial(**each) for each in json.loads((folder / "trials.json").read_text())]


def with_fault(text: str, trial: Trial, fault: str) -> str:
    """The text with one of `FAULTS` planted."""
    if fault == "no-barriers":
        return without_barriers(text)
    if fault == "out-of-bounds":
        return writing_beyond(text, trial.outputs[0], math.prod(trial.shapes[0]))
    return text


def run(folder: Path, fault: str = "none") -> Iterator[tuple[Trial, bool, str]]:
    """Run all kernels with CuPy; yields each, whether it is right, and what is to say of it."""
    if find_spec("cupy") is None:
        raise SystemExit("CuPy is not installed; pip install cupy-cuda13x")
    cupy: Any = import_module("cupy")
    cupy.cuda.set_allocator(None)  # cudaMalloc itself: memcheck sees the size of every buffer
    for trial in read(folder):
        text = with_fault((folder / f"{trial.index}.cu").read_text(), trial, fault)
        try:
            outputs, same = _launched(cupy, folder, trial, text)
        except Exception as error:
            yield trial, False, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
            continue
        errors = [
            _error(float64(found, dtype), np.load(folder / f"{trial.index}.exact{number}.npy"))
            for number, (found, dtype) in enumerate(zip(outputs, trial.dtypes, strict=True))
        ]
        words = f"error {max(errors):.1e}, at most {trial.tolerance:.1e}"
        words += "" if same else "; not the same each time"
        yield trial, max(errors) <= trial.tolerance and same, words


def _launched(cupy: Any, folder: Path, trial: Trial, text: str) -> tuple[list[Any], bool]:
    """The outputs as they are stored, and whether more launches gave the same bits."""
    options = (*OPTIONS, f"-I{folder}")
    kernel = cupy.RawModule(code=text, backend="nvrtc", options=options).get_function(FUNCTION)
    blocks, rest = zip(*map(divmod, trial.grid, trial.threadgroup), strict=True)
    if any(rest):
        raise ValueError(f"{trial.grid} threads are no whole number of blocks")
    names = [folder / f"{trial.index}.in{number}.npy" for number in range(trial.inputs)]
    inputs = [cupy.asarray(np.ascontiguousarray(np.load(name))) for name in names]
    outputs = [
        cupy.full(shape, 0xA5, STORED.get(dtype, dtype))
        for shape, dtype in zip(trial.shapes, trial.dtypes, strict=True)
    ]
    taken = []
    for _ in range(1 + REPEATS):
        kernel(blocks, tuple(trial.threadgroup), (*inputs, *outputs))
        cupy.cuda.runtime.deviceSynchronize()
        taken.append([cupy.asnumpy(output) for output in outputs])
    same = all(
        first.tobytes() == later.tobytes()
        for again in taken[1:]
        for first, later in zip(taken[0], again, strict=True)
    )
    return taken[0], same


def float64(stored: npt.NDArray[Any], dtype: str) -> npt.NDArray[np.float64]:
    """Numbers as they lie in memory, by what they are."""
    if dtype == "bfloat16":
        return (stored.astype(np.uint32) << 16).view(np.float32).astype(np.float64)
    return (stored.view(np.float16) if dtype == "float16" else stored).astype(np.float64)


def _error(found: npt.NDArray[np.float64], exact: npt.NDArray[Any]) -> float:
    return float(np.linalg.norm(found - exact) / (np.linalg.norm(exact) or 1.0))

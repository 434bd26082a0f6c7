"""The kernels' text as CUDA: no line is lost, and clang takes it as CUDA. No GPU is needed."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from apertus_mlx.backend.metal.kernel import Kernel
from apertus_mlx.checkpoint.inventory import Inventory
from apertus_mlx.quant.spec import QuantSpec
from benchmarks.kernels_on_cuda import in_mlx, trials
from benchmarks.kernels_on_cuda.__main__ import faults_found
from benchmarks.kernels_on_cuda.compiled import compile_all
from benchmarks.kernels_on_cuda.translate import ATTRIBUTES, SHIM, to_cuda, without_barriers
from tests import metal_cases
from tests.measure.test_doctor_device import inventory, kernels, plain_forms
from tests.metal_harness.mlx_text import generate_for

__all__ = ["inventory", "kernels"]

# What CUDA's own headers and compiler know, as far as shim and kernels use it.
CUDA = """
#define __global__ __attribute__((global))
#define __device__ __attribute__((device))
#define __shared__ __attribute__((shared))
#define __forceinline__ __attribute__((always_inline))
struct uint3 { unsigned x, y, z; };
extern __device__ const uint3 threadIdx, blockIdx, blockDim, gridDim;
__device__ uint3 make_uint3(unsigned, unsigned, unsigned);
__device__ float __fmaf_rn(float, float, float);
__device__ float __frsqrt_rn(float);
__device__ float __uint_as_float(unsigned);
__device__ float rintf(float); __device__ float cosf(float);
__device__ float sinf(float); __device__ float expf(float);
template <typename T> __device__ T __shfl_xor_sync(unsigned, T, int);
__device__ void __syncwarp();
using size_t = decltype(sizeof(0));
struct __nv_bfloat16 {
  __nv_bfloat16() = default;
  __device__ __nv_bfloat16(float); __device__ operator float() const;
};
struct __half { __half() = default; __device__ __half(float); __device__ operator float() const; };
"""
# As NVRTC's --device-as-default-execution-space.
IN_DEVICE = "#pragma clang force_cuda_host_device begin\n"


def of_all_places() -> list[Kernel]:
    """One for each place, in every type and way to pack."""
    found: dict[str, Kernel] = {}
    for bits, group_size, dtype in ((4, 64, mx.bfloat16), (3, 64, mx.float16), (6, 32, mx.float32)):
        for kernel in metal_cases.needed("0.5B", QuantSpec(bits, group_size), dtype):
            found.setdefault(kernel.place, kernel)
    return list(found.values())


KERNELS = of_all_places()


def refused(text: str) -> list[str]:
    """What clang has against a text in CUDA."""
    cindex = pytest.importorskip("clang.cindex")
    unit = cindex.Index.create().parse(
        "kernel.cu",
        args=[
            "-x", "cuda", "--cuda-device-only", "-nocudainc", "-nocudalib", "-std=c++17",
            "--cuda-gpu-arch=sm_90", "-nostdinc", "-I.", "-Wno-everything",
        ],
        unsaved_files=[
            ("kernel.cu", IN_DEVICE + text), ("./shim.cuh", SHIM.read_text()),
            ("./cuda_bf16.h", CUDA), ("./cuda_fp16.h", ""),
        ],
    )  # fmt: skip
    return [str(found) for found in unit.diagnostics if found.severity >= cindex.Diagnostic.Error]


@pytest.mark.parametrize("kernel", KERNELS, ids=lambda kernel: kernel.place)
def test_no_line_is_lost(kernel: Kernel) -> None:
    """But for threadgroup variables the lines are Metal's, in their order."""
    generated, text = generate_for(kernel), to_cuda(generate_for(kernel))
    wanted = [*generated.header.splitlines(), *generated.body.splitlines()]
    found = iter(text.splitlines())
    variable = re.compile(r"^(\s*)threadgroup (\w+(::\w+)* \w+(\[[^]]*\])*;)")
    for line in wanted:
        assert variable.sub(r"\1__shared__ \2", line) in found
    for parameter in generated.parameters:
        assert parameter.buffer is not None or parameter.name in ATTRIBUTES


def test_nvidias_compiler_takes_it(tmp_path: Path) -> None:
    """For every kind of GPU, where that compiler is installed."""
    pytest.importorskip("cuda.bindings")
    trials.write(tmp_path / "folder", (("0.5B", 4, 64, "bfloat16"),), 2 * 10**6)
    found = list(compile_all(tmp_path / "folder"))
    assert found and all(right for right, _ in found)
    assert any("sm_90: 9 of 9 compile" in words for _, words in found)
    text = tmp_path / "folder" / "0.cu"
    text.write_text(text.read_text().replace("metal::fma", "metal::no_such_function"))
    assert any(
        "no_such_function" in words for right, words in compile_all(text.parent) if not right
    )


@pytest.mark.parametrize(
    ("printed", "faults"),
    [
        ("========= ERROR SUMMARY: 2 errors", 2),
        ("========= ERROR SUMMARY: 0 errors\n", 0),
        ("========= RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)", 1),
        ("========= LEAK SUMMARY: 1024 bytes leaked in 1 allocations", None),
        ("========= Error: Target application terminated before first instrumented API call", None),
    ],
)
def test_what_the_sanitizer_found_is_read(printed: str, faults: int | None) -> None:
    """As its manual shows it; its exit code is that of what it watches, if that fails."""
    assert faults_found(printed) == faults


def test_a_whole_model_is_compared(
    inventory: Inventory, kernels: Mapping[str, Kernel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the kernels' plain forms instead of CUDA, one of them wrong the second time."""
    factory = plain_forms(kernels)
    monkeypatch.setattr(in_mlx, "cuda_kernel", factory)
    found = list(in_mlx.compare(inventory.checkpoint.directory, "float32"))
    assert all(right for right, _ in found)
    assert len(found) == len(kernels) + 2
    assert [words.split(":")[0] for _, words in found[-2:]] == [
        "whole model", "whole model, compiled step"
    ]  # fmt: skip

    def wrong_norm(name: str, *given: Any) -> Any:
        launch = factory(name, *given)
        return lambda **more: [x + (0.1 if "add_rms_norm" in name else 0) for x in launch(**more)]

    monkeypatch.setattr(in_mlx, "cuda_kernel", wrong_norm)
    again = list(in_mlx.compare(inventory.checkpoint.directory, "float32"))
    assert [words.startswith("add_rms_norm") for right, words in again if not right] == [True]


def test_clang_takes_it_as_cuda() -> None:
    for kernel in KERNELS:
        text = to_cuda(generate_for(kernel))
        assert not refused(text), kernel.key
    assert refused(text.replace("metal::fma", "metal::no_such_function"))
    assert refused(text.replace("thread_index_in_simdgroup", "lost", 1))


def test_what_is_planted_is_there(tmp_path: Path) -> None:
    made = trials.write(tmp_path / "folder", (("0.5B", 4, 64, "bfloat16"),), 2 * 10**6)
    assert trials.read(tmp_path / "folder") == made
    places = ("attention_input", "qk_norm_rope", "add_rms_norm", "rms_norm", "best_token")
    assert all(any(trial.key.startswith(place) for trial in made) for place in places)
    barriers = 0
    for trial in made:
        text = (tmp_path / "folder" / f"{trial.index}.cu").read_text()
        barriers += text.count("metal::threadgroup_barrier(")
        assert "threadgroup_barrier(" not in without_barriers(text)
        beyond = trials.with_fault(text, trial, "out-of-bounds")
        size = math.prod(trial.shapes[0])
        assert f"{trial.outputs[0]}[{size}] = " in beyond
        assert not refused(beyond)
        exact = np.load(tmp_path / "folder" / f"{trial.index}.exact0.npy")
        assert exact.size == size
        # Every launch is a whole number of blocks of at most 1,024 threads.
        assert not any(n % m for n, m in zip(trial.grid, trial.threadgroup, strict=True))
        assert math.prod(trial.threadgroup) <= 1024
    assert barriers


def test_numbers_are_read_as_they_are_stored() -> None:
    values = mx.array([1.5, -0.375, 3e4, -1e-3])
    for dtype in (mx.bfloat16, mx.float16, mx.float32):
        kept = values.astype(dtype)
        stored = np.array(kept if dtype == mx.float32 else kept.view(mx.uint16))
        found = trials.float64(stored, str(dtype).rpartition(".")[2])
        assert found.tolist() == np.array(kept.astype(mx.float32), np.float64).tolist()


def test_mlx_is_given_the_same_text() -> None:
    for kernel in KERNELS:
        text = kernel.text()
        body, header = in_mlx.cuda_text(text.source, text.header)
        assert header.endswith(text.header)
        assert "#include" not in header
        for parameter in generate_for(kernel).parameters:
            if parameter.buffer is None:
                assert f" {parameter.name} = " in body

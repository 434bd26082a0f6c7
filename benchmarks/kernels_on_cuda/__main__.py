"""Run the Metal kernels' own text as CUDA; for developers with such a GPU, never in CI.

    python -m benchmarks.kernels_on_cuda write FOLDER       # texts, inputs, float64; needs no GPU
    python -m benchmarks.kernels_on_cuda run FOLDER         # with NVRTC, against float64
    python -m benchmarks.kernels_on_cuda check FOLDER       # the same under compute-sanitizer
    python -m benchmarks.kernels_on_cuda model MODEL_DIR    # inside MLX, and the whole model

`run` and `check` need CuPy (`pip install cupy-cuda13x`), `model` MLX for CUDA (docs/cuda.md). Of a
kernel, header and body stay as Metal gets them, but for declarations of threadgroup memory. `check`
also plants a write out of bounds, which memcheck has to see, and takes barriers out, which
racecheck has to see.

On an H100 (2026-11-26, MLX 0.32.4) an earlier form of this had 18 of 18 kernels right and clean
under memcheck, racecheck, initcheck and synccheck, saw missing barriers, and had all 14 places of a
model right inside MLX. The comparison of the whole model, plain and compiled, and the planted write
out of bounds are written and have not been run yet; nor has this form on a GPU.

It proves nothing about Metal's compiler, address spaces, `precise::` functions, the order in which
Apple's GPUs add up a simdgroup, or speed there.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path

from benchmarks.kernels_on_cuda import trials

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What is planted -> the tool that has to see it.
PLANTED = {"out-of-bounds": "memcheck", "no-barriers": "racecheck"}
FOUND = 99


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="kernels_on_cuda", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", choices=["write", "run", "check", "model"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fault", choices=trials.FAULTS, default="none")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    asked = parser.parse_args()
    if asked.what == "write":
        print(f"{len(trials.write(asked.folder))} kernels in {asked.folder}")
        return 0
    if asked.what == "check":
        return check(asked.folder)
    wrong = 0
    lines: Iterable[tuple[bool, str]]
    if asked.what == "run":
        lines = (
            (ok, f"{t.key}: {words}") for t, ok, words in trials.run(asked.folder, asked.fault)
        )
    else:
        from benchmarks.kernels_on_cuda.in_mlx import compare

        lines = compare(asked.folder, asked.dtype)
    for right, line in lines:
        wrong += not right
        print("right" if right else "WRONG", line, flush=True)
    return int(wrong > 0)


def check(folder: Path) -> int:
    """Nothing may be found in the kernels as they are, and what is planted has to be."""
    wrong = 0
    for tool, fault in [*((tool, "none") for tool in TOOLS), *((t, f) for f, t in PLANTED.items())]:
        # Or a write behind one buffer could be inside the next.
        padding = ["--padding", "512"] if tool == "memcheck" else []
        command = [
            "compute-sanitizer", "--tool", tool, *padding, "--error-exitcode", str(FOUND),
            sys.executable, "-m", "benchmarks.kernels_on_cuda", "run", str(folder),
            "--fault", fault,
        ]  # fmt: skip
        code = subprocess.run(command, check=False, stdout=subprocess.DEVNULL).returncode
        right = code == (0 if fault == "none" else FOUND)
        wrong += not right
        print("right" if right else "WRONG", f"{tool}, planted: {fault}; exit code {code}")
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())

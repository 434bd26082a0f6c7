"""Run the Metal kernels' own text as CUDA; for developers with such a GPU, never in CI.

    python -m benchmarks.kernels_on_cuda write FOLDER       # texts, inputs, float64
    python -m benchmarks.kernels_on_cuda compile FOLDER     # for every kind of GPU
    python -m benchmarks.kernels_on_cuda run FOLDER         # with NVRTC, against float64
    python -m benchmarks.kernels_on_cuda check FOLDER       # the same under compute-sanitizer
    python -m benchmarks.kernels_on_cuda model MODEL_DIR    # inside MLX, and the whole model

`write` and `compile` need no GPU, `compile` needs `pip install cuda-bindings
'cuda-toolkit[nvrtc,cudart]==13.*'`, `run` and `check` need CuPy (`pip install cupy-cuda13x`),
`check` compute-sanitizer (`nvidia-cuda-sanitizer-api`), `model` MLX for CUDA (docs/cuda.md). Of a
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
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import which

from benchmarks.kernels_on_cuda import trials
from benchmarks.kernels_on_cuda.compiled import compile_all

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
# What is planted -> the tool that has to see it.
PLANTED = {"out-of-bounds": "memcheck", "no-barriers": "racecheck"}
# "ERROR SUMMARY: 2 errors", "RACECHECK SUMMARY: 1 hazard displayed (1 error, 0 warnings)"
SUMMARY = re.compile(r"(?:ERROR|RACECHECK) SUMMARY: (\d+)")


def main() -> int:
    parser = argparse.ArgumentParser(
        prog="kernels_on_cuda", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("what", choices=["write", "compile", "run", "check", "model"])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--fault", choices=trials.FAULTS, default="none")
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    asked = parser.parse_args()
    if asked.what == "write":
        print(f"{len(trials.write(asked.folder))} kernels in {asked.folder}")
        return 0
    wrong = 0
    for right, line in lines(asked):
        wrong += not right
        print("right" if right else "WRONG", line, flush=True)
    return int(wrong > 0)


def lines(asked: argparse.Namespace) -> Iterator[tuple[bool, str]]:
    """What was found, right or wrong, one after the other."""
    if asked.what == "compile":
        return compile_all(asked.folder)
    if asked.what == "check":
        return check(asked.folder)
    if asked.what == "run":
        found = trials.run(asked.folder, asked.fault)
        return ((right, f"{trial.key}: {words}") for trial, right, words in found)
    from benchmarks.kernels_on_cuda.in_mlx import compare

    return compare(asked.folder, asked.dtype)


def check(folder: Path) -> Iterator[tuple[bool, str]]:
    """Nothing may be found in the kernels as they are, and what is planted has to be."""
    if which("compute-sanitizer") is None:
        raise SystemExit(
            "compute-sanitizer is not in PATH; the CUDA toolkit has it, and so has "
            "`pip install nvidia-cuda-sanitizer-api` in nvidia/cu13/bin"
        )
    for tool, fault in [*((tool, "none") for tool in TOOLS), *((t, f) for f, t in PLANTED.items())]:
        # Or a write behind one buffer could be inside the next.
        padding = ["--padding", "512"] if tool == "memcheck" else []
        command = [
            "compute-sanitizer", "--tool", tool, *padding,
            sys.executable, "-m", "benchmarks.kernels_on_cuda", "run", str(folder),
            "--fault", fault,
        ]  # fmt: skip
        done = subprocess.run(command, check=False, capture_output=True, text=True)
        found = faults_found(done.stdout + done.stderr)
        # With a fault kernels are wrong, too, so that the exit code says nothing.
        right = found == 0 and done.returncode == 0 if fault == "none" else (found or 0) > 0
        yield right, f"{tool}, planted: {fault}; found: {found}, exit code {done.returncode}"


def faults_found(printed: str) -> int | None:
    """How many faults compute-sanitizer found; None where it did not come to its summary."""
    found = SUMMARY.findall(printed)
    return sum(map(int, found)) if found else None


if __name__ == "__main__":
    sys.exit(main())

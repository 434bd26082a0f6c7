"""Peak resident memory and time of conversion, ours beside mlx-lm's, at real sizes.

    python -m benchmarks.convert_memory WORK_DIR [--sizes 0.5B 1.5B 8B] [--bits 4]
        [--repeats 3] [--no-mlx-lm 8B]

Random checkpoints (`make_checkpoint`) are made in WORK_DIR where they are not there yet: 0.9, 3.0
and 16 GB, the 8B in shards of 5 GB. Each conversion is a process of its own; its peak is what the
kernel reports when it ends (`wait4`), its time is the wall clock. The checkpoint is read once
beforehand, so that neither side pays for a cold disk where it fits in memory. The best of the
repeats counts. mlx-lm is asked for the same: affine, groups of 64.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.make_checkpoint import GEOMETRIES, tensor_shapes

ROOT = Path(__file__).resolve().parents[1]
READ_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Measurement:
    """One process."""

    peak_bytes: int
    wall_s: float


def measure(command: list[str]) -> Measurement:
    """Run `command` to its end."""
    started = time.perf_counter()
    child = os.posix_spawn(
        command[0],
        command,
        {**os.environ, "PYTHONPATH": str(ROOT)},
        file_actions=[
            (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
            (os.POSIX_SPAWN_OPEN, 2, os.devnull, os.O_WRONLY, 0),
        ],
    )
    _, status, usage = os.wait4(child, 0)
    wall_s = time.perf_counter() - started
    if os.waitstatus_to_exitcode(status):
        raise SystemExit(f"{' '.join(command)}: failed")
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return Measurement(usage.ru_maxrss * unit, wall_s)


def best(command: list[str], output: Path, repeats: int) -> Measurement:
    """The smallest peak and the shortest time of several runs."""
    found = []
    for _ in range(repeats):
        for leftover in (output, output.with_name(f".{output.name}.partial")):
            shutil.rmtree(leftover, ignore_errors=True)
        found.append(measure(command))
    shutil.rmtree(output, ignore_errors=True)
    return Measurement(min(m.peak_bytes for m in found), min(m.wall_s for m in found))


def warm(directory: Path) -> None:
    """Read the weights once."""
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as file:
            while file.read(READ_BYTES):
                pass


def largest_tensor_bytes(size: str) -> int:
    """Bytes of the largest tensor in bfloat16."""
    largest = 0
    for _, shape in tensor_shapes(size):
        count = 1
        for length in shape:
            count *= length
        largest = max(largest, 2 * count)
    return largest


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=GEOMETRIES, default=["0.5B", "1.5B"])
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--no-mlx-lm", nargs="*", choices=GEOMETRIES, default=[])
    arguments = parser.parse_args()
    rows = []
    for size in arguments.sizes:
        source = arguments.work / size
        if not (source / "config.json").exists():
            # Not here: a child's peak starts from what its parent holds when it is started.
            maker = [sys.executable, "-m", "benchmarks.make_checkpoint", size, str(source)]
            measure(maker)
        warm(source)
        output = arguments.work / "out"
        bits = str(arguments.bits)
        ours = best(
            [sys.executable, "-m", "apertus_mlx", "convert", str(source), str(output),
             "--bits", bits],
            output, arguments.repeats,
        )  # fmt: skip
        row: dict[str, object] = {
            "size": size,
            "largest_tensor_bytes": largest_tensor_bytes(size),
            "ours": asdict(ours),
        }
        if size not in arguments.no_mlx_lm:
            theirs = best(
                [sys.executable, "-m", "mlx_lm", "convert", "--hf-path", str(source),
                 "--mlx-path", str(output), "-q", "--q-bits", bits, "--q-group-size", "64"],
                output, arguments.repeats,
            )  # fmt: skip
            row |= {
                "mlx_lm": asdict(theirs),
                "peak_ratio": round(ours.peak_bytes / theirs.peak_bytes, 3),
                "time_ratio": round(ours.wall_s / theirs.wall_s, 3),
            }
        rows.append(row)
        print(json.dumps(row), flush=True)
    peaks = [row["ours"]["peak_bytes"] for row in rows]  # type: ignore[index]
    for smaller, larger, row in zip(peaks, peaks[1:], rows[1:], strict=False):
        print(f"peak at {row['size']} is {larger / smaller:.2f} times that of the size before it")


if __name__ == "__main__":
    main()

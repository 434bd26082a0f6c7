"""Every figure that is worth having of a machine with a GPU, from one command that goes on.

    python -m benchmarks.on_a_gpu WORK_DIR [--sizes 0.5B 1.5B 8B] [--contexts 4096 16384 65536]
        [--tokens 65536] [--rounds 3] [--limit SECONDS]

Random checkpoints and 4-bit forms of them are made in WORK_DIR where they are not there yet. Each
benchmark is a process of its own, whose output is printed and kept in WORK_DIR/figures; one that
stands there is not run again, so that a machine may be lent in pieces. One that takes longer than
`--limit` is stopped and named. Conversion, calibration and distillation are of the first size
alone, caches of the 0.5B's layers. transformers is measured where it is installed.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path

from benchmarks.make_checkpoint import GEOMETRIES

ROOT = Path(__file__).resolve().parents[1]


def main() -> int:
    """Command line; fails if a benchmark did."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--sizes", nargs="+", choices=GEOMETRIES, default=["0.5B", "1.5B", "8B"])
    parser.add_argument("--contexts", type=int, nargs="+", default=[4096, 16384, 65536])
    parser.add_argument("--tokens", type=int, default=128 * 512)
    parser.add_argument("--prompt-tokens", type=int, nargs="+", default=[128, 512, 2048])
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--limit", type=float, default=900.0)
    given = parser.parse_args()
    given.work = given.work.resolve()
    kept, failed = given.work / "figures", 0
    kept.mkdir(parents=True, exist_ok=True)
    for name, command in commands(given):
        path = kept / f"{name}.txt"
        if path.exists():
            print(f"# {name}: {path} is there", flush=True)
            continue
        print(f"# {name}: {' '.join(command)}", flush=True)
        started = time.perf_counter()
        try:
            done = subprocess.run(
                [sys.executable, "-m", *command], cwd=ROOT, stdout=subprocess.PIPE, text=True,
                check=False, timeout=given.limit,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            print(f"# stopped after {given.limit:.0f} s", flush=True)
            failed += 1
            continue
        print(f"{done.stdout}# {time.perf_counter() - started:.0f} s", flush=True)
        if done.returncode:
            failed += 1
        else:
            path.write_text(done.stdout)
    return int(failed > 0)


def commands(given: argparse.Namespace) -> Iterator[tuple[str, list[str]]]:
    """A name for each benchmark, and what follows `python -m`, in the order of their use."""
    peers = ["ours", "mlx-lm"]
    if find_spec("torch") and find_spec("transformers"):
        peers.append("transformers")
    lengths, first = list(map(str, given.prompt_tokens)), given.sizes[0]
    yield "doctor", ["apertus_mlx", "doctor"]
    widest = str(max(GEOMETRIES[size][4] for size in given.sizes))
    yield "activation", ["benchmarks.activation", "--rows", "1", lengths[-1], "--columns", widest]
    for size in given.sizes:
        whole, packed = given.work / size, given.work / f"{size}-4bit"
        if not whole.exists():
            yield f"make-{size}", ["benchmarks.make_checkpoint", size, str(whole)]
        if not packed.exists():
            convert = ["apertus_mlx", "convert", str(whole), str(packed), "--bits", "4"]
            yield f"pack-{size}", convert
        speed = [
            "--prompt-tokens", *lengths, "--new-tokens", str(given.new_tokens),
            "--rounds", str(given.rounds), "--peers",
        ]  # fmt: skip
        yield f"speed-{size}", ["benchmarks.generation", str(whole), *speed, *peers]
        yield f"speed-{size}-4bit", ["benchmarks.generation", str(packed), *speed, *peers[:2]]
    yield "caches", ["benchmarks.kv_speed", "--contexts", *map(str, given.contexts)]
    yield "convert", ["benchmarks.convert_memory", str(given.work), "--sizes", first]
    yield "distill", ["benchmarks.distillation_memory", first, "--steps", "8"]
    calibrated = ["benchmarks.calibration_cost", str(given.work), "--size", first]
    yield "gptq", [*calibrated, "--tokens", str(given.tokens), "--limit", str(given.limit / 2)]


if __name__ == "__main__":
    sys.exit(main())

"""Every figure that is worth having of a machine with a GPU, from one command that goes on.

    python -m benchmarks.on_a_gpu WORK_DIR [--sizes 0.5B 1.5B 8B] [--contexts 4096 16384 65536]
        [--tokens 65536] [--rounds 3] [--limit SECONDS]

Random checkpoints and 4-bit forms of them are made in WORK_DIR where they are not there yet. Each
benchmark is a process of its own, whose output is printed and kept in WORK_DIR/figures; one that
stands there is not run again, so that a machine may be lent in pieces. One that takes longer than
`--limit` is stopped, with all that it started, and named. Conversion, calibration and distillation
are of the first size alone, caches of the 0.5B's layers. transformers is measured where it is
installed.
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import NamedTuple

from benchmarks.make_checkpoint import GEOMETRIES

ROOT = Path(__file__).resolve().parents[1]


class Step(NamedTuple):
    """What follows `python -m`; `made` is a folder that is there whole or not at all."""

    name: str
    command: list[str]
    made: Path | None = None

    @property
    def making(self) -> Path | None:
        """Where `made` is until it is whole."""
        return None if self.made is None else self.made.with_name(f".{self.made.name}")


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
    for step in steps(given):
        path = kept / f"{step.name}.txt"
        if path.exists():
            print(f"# {step.name}: {path} is there", flush=True)
            continue
        print(f"# {step.name}: {' '.join(step.command)}", flush=True)
        started = time.perf_counter()
        code, printed = run(step, given.limit)
        print(f"{printed}# {time.perf_counter() - started:.0f} s", flush=True)
        if code != 0:
            print(f"# {step.name}: failed" if code else f"# {step.name}: stopped", flush=True)
            failed += 1
        elif step.made is None:
            path.write_text(printed)
    return int(failed > 0)


def run(step: Step, limit_s: float) -> tuple[int | None, str]:
    """The exit code, None where it was stopped, and what it printed."""
    if step.making is not None:
        shutil.rmtree(step.making, ignore_errors=True)
    process = subprocess.Popen(
        [sys.executable, "-m", *step.command], cwd=ROOT, stdout=subprocess.PIPE, text=True,
        start_new_session=True,
    )  # fmt: skip
    try:
        printed = process.communicate(timeout=limit_s)[0]
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL)
        return None, process.communicate()[0]
    except BaseException:
        os.killpg(process.pid, signal.SIGKILL)
        raise
    if process.returncode == 0 and step.making is not None and step.made is not None:
        step.making.rename(step.made)
    return process.returncode, printed


def steps(given: argparse.Namespace) -> Iterator[Step]:
    """All, in the order of their use."""
    peers = ["ours", "mlx-lm"]
    if find_spec("torch") and find_spec("transformers"):
        peers.append("transformers")
    lengths, first = list(map(str, given.prompt_tokens)), given.sizes[0]
    yield Step("doctor", ["apertus_mlx", "doctor"])
    widest = str(max(GEOMETRIES[size][4] for size in given.sizes))
    activation = ["benchmarks.activation", "--rows", "1", lengths[-1], "--columns", widest]
    yield Step("activation", activation)
    for size in given.sizes:
        whole, packed = given.work / size, given.work / f"{size}-4bit"
        if not whole.exists():
            make = ["benchmarks.make_checkpoint", size, str(whole.with_name(f".{size}"))]
            yield Step(f"make-{size}", make, whole)
        if not packed.exists():
            convert = ["apertus_mlx", "convert", str(whole), str(packed), "--bits", "4"]
            yield Step(f"pack-{size}", convert)
        speed = [
            "--prompt-tokens", *lengths, "--new-tokens", str(given.new_tokens),
            "--rounds", str(given.rounds), "--peers",
        ]  # fmt: skip
        generation = "benchmarks.generation"
        yield Step(f"speed-{size}", [generation, str(whole), *speed, *peers])
        yield Step(f"speed-{size}-4bit", [generation, str(packed), *speed, *peers[:2]])
    contexts = list(map(str, given.contexts))
    yield Step("caches", ["benchmarks.kv_speed", "--contexts", *contexts])
    work = str(given.work)
    yield Step("convert", ["benchmarks.convert_memory", work, "--sizes", first])
    yield Step("distill", ["benchmarks.distillation_memory", first, "--steps", "8"])
    # Three sides, and the making of a checkpoint.
    calibrated = ["benchmarks.calibration_cost", work, "--size", first]
    limit = ["--tokens", str(given.tokens), "--limit", str(given.limit / 4)]
    yield Step("gptq", [*calibrated, *limit])


if __name__ == "__main__":
    sys.exit(main())

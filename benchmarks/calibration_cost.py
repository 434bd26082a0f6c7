"""Time and memory of calibrated quantization at a real size, beside mlx-lm's GPTQ.

    python -m benchmarks.calibration_cost WORK_DIR [--size 0.5B] [--layers N]
        [--tokens 65536] [--bits 4] [--limit SECONDS]

A checkpoint with random weights (`make_checkpoint`) is made in WORK_DIR where it is not there yet,
with all layers of that size or the first N. Both sides get the same random tokens in windows of
512 and groups of 64, each in a process of its own: seconds are its wall clock without imports, the
peak is what the kernel reports for the whole process. mlx-lm rounds a tied embedding, so that is
measured on our side as well. Where MLX has no GPU, mlx-lm gets float32 weights, since it would take
many times as long with the checkpoint's bfloat16.

Without a GPU the full size takes mlx-lm hours: 7.6 TFLOP per layer of the 0.5B at some 6 GFLOP/s.
`--layers 1 --tokens 2048` compares the same widths in minutes; whatever takes longer than `--limit`
is stopped. On a machine that is busy, compare the seconds of CPU.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks import make_checkpoint

ROOT = Path(__file__).resolve().parents[1]
LENGTH = 512
GROUP_SIZE = 64
OURS, OURS_ROUNDED, THEIRS = "gptq", "gptq, embedding rounded", "mlx-lm gptq"


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("work", type=Path)
    parser.add_argument("--size", choices=make_checkpoint.GEOMETRIES, default="0.5B")
    parser.add_argument("--layers", type=int)
    parser.add_argument("--tokens", type=int, default=128 * LENGTH)
    parser.add_argument("--bits", type=int, choices=(2, 4, 8), default=4)
    parser.add_argument("--sides", nargs="+", choices=(OURS, OURS_ROUNDED, THEIRS),
                        default=(OURS, OURS_ROUNDED, THEIRS))  # fmt: skip
    parser.add_argument("--limit", type=float, help="most seconds for each side")
    # What the processes that this one starts are told to do.
    parser.add_argument("--child", choices=("make", OURS, OURS_ROUNDED, THEIRS))
    arguments = parser.parse_args()
    layers = arguments.layers or make_checkpoint.GEOMETRIES[arguments.size][1]
    directory = arguments.work / f"{arguments.size}-{layers}"
    if arguments.child == "make":
        _make(arguments.size, layers, directory)
        return
    if arguments.child is not None:
        print(json.dumps(_measure(arguments.child, directory, arguments.tokens, arguments.bits)))
        return
    if not (directory / "config.json").exists():
        _child("make")
    print(
        f"{arguments.size}, {layers} layers, {arguments.tokens // LENGTH} x {LENGTH} tokens, "
        f"{arguments.bits} bits"
    )
    found: dict[str, dict[str, Any]] = {}
    for side in arguments.sides:
        try:
            answer = _child(side, arguments.limit)
        except subprocess.TimeoutExpired:
            print(f"{side}: more than {arguments.limit:.0f} s", flush=True)
            continue
        values = found[side] = json.loads(answer.strip().splitlines()[-1])
        peaks = [f"{values[key] / 1e6:,.0f} MB" for key in ("peak_bytes", "imports_bytes")]
        print(
            f"{side}: {values['wall_s']:.1f} s ({values['cpu_s']:.1f} s of CPU), peak {peaks[0]}, "
            f"of which imports {peaks[1]}, MLX's own peak {values['mlx_peak_bytes'] / 1e6:,.0f} MB",
            flush=True,
        )
    if THEIRS in found:
        theirs = found[THEIRS]
        for side in (OURS, OURS_ROUNDED):
            if side in found:
                ratios = {k: found[side][k] / theirs[k] for k in ("wall_s", "cpu_s", "peak_bytes")}
                print(
                    f"{side} / mlx-lm: time {ratios['wall_s']:.2f}, CPU time {ratios['cpu_s']:.2f},"
                    f" peak {ratios['peak_bytes']:.2f}"
                )


def _child(what: str, limit_s: float | None = None) -> str:
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.calibration_cost", *sys.argv[1:], "--child", what],
        cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False, timeout=limit_s,
    )  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{what}: failed")
    return done.stdout


def _make(size: str, layers: int, directory: Path) -> None:
    hidden, _, *others = make_checkpoint.GEOMETRIES[size]
    name = f"{size}, {layers} layers"
    make_checkpoint.GEOMETRIES[name] = (hidden, layers, *others)  # type: ignore[assignment]
    make_checkpoint.write_checkpoint(name, directory, 5 * 10**9)


def _measure(side: str, directory: Path, tokens: int, bits: int) -> dict[str, Any]:
    import mlx.core as mx
    import numpy as np

    from apertus_mlx.backend import tf32

    windows = np.random.default_rng(0).integers(
        make_checkpoint.SPECIAL_TOKENS, make_checkpoint.VOCAB_SIZE, (tokens // LENGTH, LENGTH)
    )
    run = _theirs if side == THEIRS else _ours
    tf32.switch_off()  # as the commands do; mlx-lm is measured alike
    quantize = run(directory, windows, bits, side == OURS)
    imports_bytes = _peak_bytes()
    wall, cpu = time.perf_counter(), time.process_time()
    quantize()
    return {
        "wall_s": time.perf_counter() - wall,
        "cpu_s": time.process_time() - cpu,
        "peak_bytes": _peak_bytes(),
        "imports_bytes": imports_bytes,
        "mlx_peak_bytes": mx.get_peak_memory(),
    }


def _ours(directory: Path, windows: Any, bits: int, embedding: bool) -> Callable[[], None]:
    """What `convert --method gptq` does before it writes: codes of all matrices, on disk."""
    import mlx.core as mx

    from apertus_mlx.checkpoint import layout
    from apertus_mlx.checkpoint.config import read_config
    from apertus_mlx.checkpoint.tensors import open_checkpoint
    from apertus_mlx.convert.calibration.calibrated import Calibration, make_codes
    from apertus_mlx.convert.evaluation.texts import Sample, TextSet
    from apertus_mlx.convert.plan.planning import make_plan
    from apertus_mlx.convert.plan.policy import Request, Rule
    from apertus_mlx.convert.sources.reading import Reader, block_rows
    from apertus_mlx.convert.sources.recognise import recognise
    from apertus_mlx.quant.arrays import blocks
    from apertus_mlx.quant.spec import QuantSpec

    def quantize() -> None:
        config = read_config(directory)
        source = recognise(config, open_checkpoint(directory).tensors, str(directory))
        rules = () if embedding else (Rule(layout.EMBEDDING, None, "rounded by MLX below"),)
        plan = make_plan(source, Request(QuantSpec(bits, GROUP_SIZE), rules, method="gptq"))
        calibration = Calibration(Sample(windows, "random", "", 0), TextSet("none", "", ()))
        with tempfile.TemporaryDirectory() as folder:
            make_codes(plan, directory, calibration, Path(folder), lambda *_: None)
        if not embedding:
            # As it is written: block by block.
            matrix = source.matrices[layout.EMBEDDING]
            width = 2 * config.hidden_size
            with Reader(directory) as reader:
                for part in blocks(config.vocab_size, block_rows(width)):
                    rows = matrix.read(reader, part.start, part.stop)
                    mx.eval(mx.quantize(rows, GROUP_SIZE, bits))

    return quantize


def _theirs(directory: Path, windows: Any, bits: int, _: bool) -> Callable[[], None]:
    import mlx.core as mx
    from mlx_lm.quant.gptq import gptq_quantize
    from mlx_lm.utils import load_model

    from apertus_mlx.backend.hardware import has_gpu

    def quantize() -> None:
        model, _ = load_model(directory, lazy=True)
        if not has_gpu():
            model.set_dtype(mx.float32)
        model, _ = gptq_quantize(model, mx.array(windows), bits, GROUP_SIZE, bits, GROUP_SIZE)
        mx.eval(model.parameters())

    return quantize


def _peak_bytes() -> int:
    # Linux counts kilobytes, macOS bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


if __name__ == "__main__":
    main()
